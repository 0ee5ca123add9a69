"""A condition beside the image: its channels come after those of x."""

import torch
from torch import Tensor


def join_concat(x: Tensor, concat: Tensor | None, channels: int) -> Tensor:
    """x (b, c, h, w) and the condition (b, channels, h, w), which is 0 where there is none: (b, c + channels, h, w).

    Raises ValueError for a condition of another shape.
    """
    wanted = (len(x), channels, *x.shape[2:])
    if concat is not None and tuple(concat.shape) != wanted:
        raise ValueError(f"concat is {tuple(concat.shape)}; this network, built with concat_channels={channels}, takes "
                         f"{wanted}")
    if channels == 0:
        return x
    return torch.cat([x, x.new_zeros(wanted) if concat is None else concat.to(x.dtype)], dim=1)

"""A condition beside the image: its channels come after those of x."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError


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


def without_concat(section: Mapping[str, Any]) -> dict[str, Any]:
    """A `backbone` section without its condition beside x: what the network was before `add_concat_channels`."""
    narrow = dict(section)
    channels = narrow.pop("concat_channels", 0)
    if "in_channels" in narrow:  # a UNet2D's count them, a U-ViT's in_chans do not
        narrow["in_channels"] -= channels
    return narrow


def add_concat_channels(net: nn.Module, channels: int) -> None:
    """Let a network without a condition beside x take one of so many channels, which changes nothing before it is
    trained. Raises UserError for a network that cannot.
    """
    if not hasattr(net, "add_concat_channels"):
        raise UserError(f"backbone.concat_channels={channels}: a {type(net).__name__} cannot take a condition beside "
                        "x; uvit and unet2d can")
    net.add_concat_channels(channels)


def widened(conv: nn.Conv2d, channels: int) -> nn.Conv2d:
    """The convolution with so many more input channels, after its own, whose weights are 0."""
    wide = nn.utils.skip_init(type(conv), conv.in_channels + channels, conv.out_channels, conv.kernel_size, conv.stride,
                              conv.padding, bias=conv.bias is not None, device=conv.weight.device,
                              dtype=conv.weight.dtype)
    with torch.no_grad():
        wide.weight[:, :conv.in_channels] = conv.weight
        wide.weight[:, conv.in_channels:] = 0
        if conv.bias is not None:
            wide.bias.copy_(conv.bias)
    return wide.train(conv.training)

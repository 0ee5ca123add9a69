"""Networks that take the guidance scale as an input, made from ones that do not."""

import copy

from torch import nn

from ..errors import UserError


def refuse_without_guidance_input(net: nn.Module) -> None:
    """Raise UserError for a network that cannot learn to take the scale."""
    if not hasattr(net, "add_guidance_input"):
        raise UserError(f"backbone: a {type(net).__name__} cannot take the guidance scale as an input; uvit and unet2d "
                        "can")


def add_guidance_input(net: nn.Module) -> nn.Module:
    """A copy of `net` that also takes `guidance` (b,), the scale w, and computes what `net` does until it is trained.

    Its `backbone` section is that of `net` with guidance_embed=True. Raises UserError for a network that cannot.
    """
    refuse_without_guidance_input(net)
    net = copy.deepcopy(net)
    if net.guidance_embedding is None:
        net.add_guidance_input()
    return net

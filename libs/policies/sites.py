"""Where a network can be cut: all that a caching policy knows of it."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import nn

from ..backbones.uvit import UViT
from ..errors import UserError


@dataclass(frozen=True)
class Sites:
    """The parts of a network with long skips, in the order they run.

    stem         what runs before the encoder and hands it one tensor (conv_in)
    encoder      outermost first; block i hands its outputs to decoder[-1 - i] too
    middle       between the two, or None
    decoder      innermost first
    depth        encoder blocks that Clockwork keeps running unless told otherwise
    time_token   index of the token that carries the time embedding; None where every block is handed it
    """

    stem: tuple[nn.Module, ...]
    encoder: tuple[nn.Module, ...]
    middle: nn.Module | None
    decoder: tuple[nn.Module, ...]
    depth: int = 1
    time_token: int | None = None


def diffusers_unet_sites(net: nn.Module) -> Sites:
    """UNet2DModel and UNet2DConditionModel: one shape of forward, whatever blocks they are made of."""
    # At depth 1 SDXL, which has no attention in its outer level, would skip 93 % of its multiply-adds.
    depth = 2 if net.config.get("addition_embed_type") == "text_time" else 1
    return Sites((net.conv_in,), tuple(net.down_blocks), net.mid_block, tuple(net.up_blocks), depth)


def uvit_sites(net: UViT) -> Sites:
    """U-ViT: in-blocks are the encoder, out-blocks the decoder. Its time embedding is a token."""
    if not net.has_skip:
        raise UserError("policy.name: a U-ViT with skip=False has no encoder and decoder to tell apart, so clockwork "
                        "and encoder_propagation cannot serve it")
    return Sites((), tuple(net.in_blocks), net.mid_block, tuple(net.out_blocks),
                 depth=max(1, len(net.in_blocks) // 4), time_token=int(net.num_classes > 0))


FAMILIES: dict[str, Callable[[nn.Module], Sites]] = {  # by the name of a class in the network's ancestry
    "UNet2DConditionModel": diffusers_unet_sites,
    "UNet2DModel": diffusers_unet_sites,
    "UViT": uvit_sites,
}


def unwrap(net: nn.Module) -> nn.Module:
    """The network inside what torch.compile, distributed training, peft and `PipelineNet` put around it."""
    while True:
        for name in ("_orig_mod", "module", "unet", "transformer"):
            if isinstance(inner := net._modules.get(name), nn.Module):
                net = inner
                break
        else:
            if type(net).__name__.startswith("Peft") and hasattr(net, "get_base_model"):
                return unwrap(net.get_base_model())
            return net


def sites(net: nn.Module) -> Sites:
    """The sites of a network of a known family. Raises UserError for any other."""
    for cls in type(net).__mro__:
        if cls.__name__ in FAMILIES:
            return FAMILIES[cls.__name__](net)
    raise UserError(f"policy.name: clockwork and encoder_propagation cannot serve a {type(net).__name__}; they know "
                    f"{', '.join(FAMILIES)}")


def deep_sizes(net: nn.Module, parts: Sites, depth: int) -> dict[str, int]:
    """Channels of r_in and r_out at a depth of a diffusers UNet, and the width of its time embedding."""
    return {"c_in": parts.encoder[depth - 1].resnets[-1].out_channels,
            "c_out": parts.decoder[-1 - depth].resnets[-1].out_channels,
            "temb_dim": net.time_embedding.linear_2.out_features}

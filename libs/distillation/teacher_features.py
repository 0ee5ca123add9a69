"""Features of a frozen teacher, as a discriminator sees them (2406.02347): the output of its middle block.

The network's own forward ends there, by an exception, so what comes after is never computed: about two thirds of a
Stable Diffusion UNet. A transformer's middle is block n // 2 of n, whose patch tokens are a map.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..errors import UserError, choose

FEATURES = ("middle", "output")  # output: the network's output, which the released code feeds of transformers


class _Reached(BaseException):
    """Ends a forward behind the middle block. No `except Exception` on the way up takes it for an error."""

    def __init__(self, out: Any):
        self.out = out


@dataclass(frozen=True)
class Middle:
    """Where a network is left, and what is found there, for inputs of any size.

    block      the last module that runs
    channels   of the map
    size       its (height, width), from the input's
    tokens     the block gives tokens (b, l, channels), of which the last are the patches, row by row; else a map
    """

    block: nn.Module
    channels: int
    size: Callable[[int, int], tuple[int, int]]
    tokens: bool

    def map(self, out: Any, height: int, width: int) -> Tensor:
        """(b, channels, *size) of what the block returned for an input (b, c, height, width)."""
        if not self.tokens:
            return out[0] if isinstance(out, tuple) else out  # a block of the encoder returns its residuals too
        tokens = out[-1] if isinstance(out, tuple) else out  # a joint block returns (text, image)
        rows, columns = self.size(height, width)
        return tokens[:, -rows * columns:].transpose(1, 2).unflatten(2, (rows, columns))


def _patches(side: int) -> Callable[[int, int], tuple[int, int]]:
    return lambda height, width: (height // side, width // side)


def _diffusers_unet(net: nn.Module) -> Middle:
    """Small UNets may have no middle block; theirs is the innermost of the encoder."""
    block = net.down_blocks[-1] if net.mid_block is None else net.mid_block
    stride = 2 ** sum(getattr(each, "downsamplers", None) is not None for each in net.down_blocks)
    return Middle(block, block.resnets[-1].out_channels, lambda *sides: tuple(-(-side // stride) for side in sides),
                  tokens=False)  # an odd side is rounded up


def _ddpm_unet(net: nn.Module) -> Middle:
    block = net.mid[-1]
    return Middle(block, block.resblocks.norm2.num_channels, _patches(net.stride), tokens=False)


def _uvit(net: nn.Module) -> Middle:
    return Middle(net.mid_block, net.embed_dim, _patches(net.patch_size), tokens=True)


def _diffusers_transformer(net: nn.Module) -> Middle:
    """AuraFlow's blocks are two lists, in the later of which text and patches are one sequence."""
    config = net.config
    blocks = [block for name, part in net.named_children() if name.endswith("transformer_blocks") for block in part]
    return Middle(blocks[len(blocks) // 2], config.num_attention_heads * config.attention_head_dim,
                  _patches(config.patch_size), tokens=True)


FAMILIES: dict[str, Callable[[nn.Module], Middle]] = {  # by the name of a class in the network's ancestry
    "UNet2DModel": _diffusers_unet,
    "UNet2DConditionModel": _diffusers_unet,
    "DDPMUNet": _ddpm_unet,
    "UViT": _uvit,
    **dict.fromkeys(("DiTTransformer2DModel", "PixArtTransformer2DModel", "SanaTransformer2DModel",
                     "SD3Transformer2DModel", "AuraFlowTransformer2DModel"), _diffusers_transformer),
}


def middle(net: nn.Module) -> Middle:
    """The middle of a network of a known family, whatever is wrapped around it. Raises UserError for any other."""
    for module in net.modules():  # outermost first
        for cls in type(module).__mro__:
            if cls.__name__ in FAMILIES:
                return FAMILIES[cls.__name__](module)
    raise UserError(f"--config.distill.discriminator_features=middle: the middle of a {type(net).__name__} is unknown, "
                    f"those of {', '.join(FAMILIES)} are known; choose output")


def feature_shape(net: nn.Module, shape: tuple[int, int, int], features: str = "middle") -> tuple[int, int, int]:
    """(c, h, w) of the features of an input of `shape` (c, h, w), from what the network is made of; nothing runs."""
    choose("--config.distill.discriminator_features", features, FEATURES)
    if features == "output":
        return shape
    found = middle(net)
    return found.channels, *found.size(*shape[1:])


class TeacherFeatures:
    """`features(x_t, t, cond) -> (b, c, h, w)` in x_t's precision, differentiable in x_t.

    denoiser   the teacher, which knows its unit of time and its precision; `denoiser.net` calls `net`, maybe through
               others, compiled or not: here it runs uncompiled, since no graph ends in its middle
    net        the network that holds the middle block; without gradients of its own where it is frozen
    features   middle or output
    """

    def __init__(self, denoiser: Denoiser, net: nn.Module, features: str = "middle"):
        choose("--config.distill.discriminator_features", features, FEATURES)
        self.denoiser, self.net = denoiser, net
        self.middle = middle(net) if features == "middle" else None

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict | None = None) -> Tensor:
        if self.middle is None:
            return self.denoiser.output(x_t, t, cond)
        try:
            with torch.compiler.set_stance("force_eager"), _ending_at(self.middle.block, self.net):
                self.denoiser.call(x_t, t, cond)
        except _Reached as reached:
            out = reached.out
        else:
            raise RuntimeError("the denoiser's forward did not pass the middle block of the network that it was given "
                               "with")
        return self.middle.map(out, *x_t.shape[2:]).to(x_t.dtype)


@contextlib.contextmanager
def _ending_at(block: nn.Module, net: nn.Module) -> Iterator[None]:
    """Inside, a forward of `net` ends behind `block` by `_Reached`, but not before the hooks of `net` itself have seen
    what it ends with as its output: those of sharded training part the weights again, and gather them for the backward
    pass. Any other forward, and a recomputation in the backward pass, goes on.
    """
    forward, patched, reached = net.forward, vars(net).get("forward"), []

    def until_block(*args, **kwargs) -> Any:
        try:
            return forward(*args, **kwargs)
        except _Reached as end:
            reached.append(True)
            return end.out

    def end(module: nn.Module, args: tuple, out: Any) -> None:
        if module is block or reached:
            raise _Reached(out)

    hooks = [block.register_forward_hook(end), net.register_forward_hook(end)]
    net.forward = until_block
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
        if patched is None:
            del net.forward
        else:
            net.forward = patched

"""The learned adaptors of Clockwork (2312.08128).

They see r_in of this step, r_out of the step before and the time embedding, and add a correction to the latter:
r_hat = r_prev + phi(concat(r_in, r_prev), temb). Three readings of the paper:
    residual   the connection from input to output adds r_prev, the only input with the output's channels
    start      the last layer starts at zero, so that an untrained adaptor is exactly the identity adaptor
    text       the paper also feeds a pooled text embedding; left out, since its own ablation shows no effect.
               Networks without text are served by the same class

Sizes on Stable Diffusion 1.5 (c_in 320, c_out 640, time embedding 1280), with the paper's:
    ResNetAdaptor     13.55 M   14 M (13.94 M with a text projection from 1024 to 384)
    UNetAdaptor      152.7 M   152 M
    UNetLightAdaptor   3.33 M    3 M
"""

from abc import ABC, abstractmethod
from math import gcd

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..errors import UserError
from .features import DeepFeatures


def _group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of two channels or more: a group of one at 1x1 pixel would have nothing to normalise."""
    return nn.GroupNorm(gcd(32, channels // 2), channels)


class ResBlock(nn.Module):
    """Residual block of DDPM (2006.11239) with an additive time embedding.

    c_in, c_out: even numbers of channels; temb_dim: of the time embedding.
    """

    def __init__(self, c_in: int, c_out: int, temb_dim: int):
        super().__init__()
        self.norm1 = _group_norm(c_in)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.time = nn.Linear(temb_dim, c_out)
        self.norm2 = _group_norm(c_out)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # b c h w
        h = h + self.time(F.silu(temb))[:, :, None, None]
        return self.shortcut(x) + self.conv2(F.silu(self.norm2(h)))


class LearnedAdaptor(nn.Module, ABC):
    """r_prev plus a correction that subclasses compute in `correction(x, temb)` and end with the layer `last`.

    The correction runs in the precision of its weights, the sum in that of r_prev.
    """

    uses = frozenset({"r_in", "r_prev", "temb"})
    cut = "before"
    last: nn.Module

    def __init__(self, c_in: int, c_out: int, temb_dim: int, width: int):
        super().__init__()
        for name, value in {"c_in": c_in, "c_out": c_out, "temb_dim": temb_dim}.items():
            if value < 1:
                raise UserError(f"adaptor {name}={value}: want at least 1")
        if width < 2 or width % 2:
            raise UserError(f"adaptor width={width}: want an even number of channels")
        self.sizes = {"c_in": c_in, "c_out": c_out, "temb_dim": temb_dim}

    def start_at_identity(self) -> None:
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @abstractmethod
    def correction(self, x: Tensor, temb: Tensor) -> Tensor:
        """(b, c_in + c_out, h, w), (b, temb_dim) -> (b, c_out, at least h, at least w)."""

    def forward(self, deep: DeepFeatures) -> Tensor:
        r_prev, dtype = deep.r_prev, self.last.weight.dtype
        x = torch.cat([deep.r_in.to(dtype), r_prev.to(dtype)], dim=1)
        change = self.correction(x, deep.temb.to(dtype))
        return r_prev + change[..., :r_prev.shape[-2], :r_prev.shape[-1]].to(r_prev.dtype)


class ResNetAdaptor(LearnedAdaptor):
    """The adaptor the paper proposes: half the resolution, two ResBlocks, no attention.

    c_in, c_out: channels of r_in and r_out; temb_dim: of the UNet's time embedding; width: channels inside. The
    paper does not print its width; 384 with a 4x4 transposed convolution gives its parameters and FLOPs.
    """

    def __init__(self, c_in: int, c_out: int, temb_dim: int, width: int = 384):
        super().__init__(c_in, c_out, temb_dim, width)
        self.first = nn.Conv2d(c_in + c_out, width, 3, stride=2, padding=1)
        self.blocks = nn.ModuleList(ResBlock(width, width, temb_dim) for _ in range(2))
        self.last = nn.ConvTranspose2d(width, c_out, 4, stride=2, padding=1)
        self.start_at_identity()

    def correction(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.first(x)  # b width ceil(h/2) ceil(w/2)
        for block in self.blocks:
            h = block(h, temb)
        return self.last(h)  # odd h and w come out one larger


class UNetAdaptor(LearnedAdaptor):
    """The paper's UNet without attention: two levels down, ResBlocks in the middle, two levels up.

    The paper gives channels, levels, middle blocks and the total. With DDPM's layout (two ResBlocks a level down,
    three up, every output of the encoder a skip), 1x1 convolutions in and out and one projection of the time
    embedding to `width` that all blocks share, both published totals come out.

    c_in, c_out, temb_dim: as in ResNetAdaptor; width: channels at all levels; middle: ResBlocks there.
    """

    def __init__(self, c_in: int, c_out: int, temb_dim: int, width: int = 640, middle: int = 4):
        super().__init__(c_in, c_out, temb_dim, width)
        self.time = nn.Linear(temb_dim, width)
        self.first = nn.Conv2d(c_in + c_out, width, 1)
        self.down = nn.ModuleList(nn.ModuleDict({
            "blocks": nn.ModuleList(ResBlock(width, width, width) for _ in range(2)),
            "sample": nn.Conv2d(width, width, 3, stride=2, padding=1),
        }) for _ in range(2))
        self.middle = nn.ModuleList(ResBlock(width, width, width) for _ in range(middle))
        self.up = nn.ModuleList(nn.ModuleDict({
            "sample": nn.Conv2d(width, width, 3, padding=1),
            "blocks": nn.ModuleList(ResBlock(2 * width, width, width) for _ in range(3)),
        }) for _ in range(2))
        self.norm = _group_norm(width)
        self.last = nn.Conv2d(width, c_out, 1)
        self.start_at_identity()

    def correction(self, x: Tensor, temb: Tensor) -> Tensor:
        temb = self.time(F.silu(temb))  # b width
        h = self.first(x)  # b width h w
        skips = []
        for level in self.down:
            skips.append(h)
            for block in level["blocks"]:
                h = block(h, temb)
                skips.append(h)
            h = level["sample"](h)
        for block in self.middle:
            h = block(h, temb)
        for level in self.up:
            h = level["sample"](F.interpolate(h, size=skips[-1].shape[-2:], mode="nearest"))
            for block in level["blocks"]:
                h = block(torch.cat([h, skips.pop()], dim=1), temb)
        return self.last(F.silu(self.norm(h)))


class UNetLightAdaptor(UNetAdaptor):
    """The paper's UNet-light: UNetAdaptor with 96 channels and two ResBlocks in the middle."""

    def __init__(self, c_in: int, c_out: int, temb_dim: int, width: int = 96, middle: int = 2):
        super().__init__(c_in, c_out, temb_dim, width, middle)

"""DDPM's UNet (2006.11239) with the names and shapes of diffusion_distiller's weights, which load strictly.

It differs from the original: the time embedding may scale and shift (`use_affine_time`), attention has heads, and its
logits are divided by the square root of all channels, not of a head's.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import UserError
from .attention import sdpa_attention
from .recompute import checkpoint

NEAR_ZERO = 1e-5  # gain of the layers that close a residual branch, where 0 would leave no gradient before them


class TimeEmbedding(nn.Module):
    """Sinusoids of `timesteps` (b,): (b, dim), sines first, in float32."""

    def __init__(self, dim: int, max_period: float = 10000.0):
        super().__init__()
        k = torch.arange(0, dim, 2, dtype=torch.float32)
        self.register_buffer("inv_freq", torch.exp(-math.log(max_period) / dim * k))  # in the published state dicts

    def forward(self, timesteps: Tensor) -> Tensor:
        angles = timesteps[:, None].float() * self.inv_freq[None]
        return torch.cat([angles.sin(), angles.cos()], dim=-1)


class ResBlock(nn.Module):
    """Two 3 x 3 convolutions, between them the time: added, or (affine) as scale and shift of the second norm."""

    def __init__(self, in_channels: int, out_channels: int, time_dim: int, groups: int, affine: bool, dropout: float):
        super().__init__()
        self.affine = affine
        self.norm1 = nn.GroupNorm(groups, in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time = nn.Sequential(nn.SiLU(), nn.Linear(time_dim, (1 + affine) * out_channels))
        self.norm2 = nn.GroupNorm(groups, out_channels, affine=not affine)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.skip = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        time = self.time(time)[:, :, None, None]  # b c 1 1, or b 2c 1 1
        if self.affine:
            gamma, beta = time.chunk(2, dim=1)
            h = (1 + gamma) * self.norm2(h) + beta
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(F.silu(h)))
        return h + (x if self.skip is None else self.skip(x))


class SelfAttention(nn.Module):
    """Multi-head attention over all places; the channels of `qkv` are laid out (heads, 3, head width)."""

    def __init__(self, channels: int, heads: int, groups: int):
        super().__init__()
        if channels % heads:
            raise ValueError(f"attn_heads={heads} must divide the {channels} channels of an attention layer")
        self.heads = heads
        self.norm = nn.GroupNorm(groups, channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = nn.Conv2d(channels, channels, 1)
        self.attention_function = sdpa_attention

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).flatten(2).transpose(1, 2).contiguous()  # b hw 3c: fused kernels want rows dense
        q, k, v = qkv.view(b, h * w, self.heads, 3, c // self.heads).permute(3, 0, 2, 1, 4).unbind(0)
        out = self.attention_function(q * self.heads**-0.5, k, v)  # it divides by sqrt(c / heads): together sqrt(c)
        return x + self.out(out.transpose(2, 3).reshape(b, c, h, w))


class Block(nn.Module):
    """A ResBlock and, at some strides, attention."""

    def __init__(self, in_channels: int, out_channels: int, heads: int, groups: int, **options):
        super().__init__()
        self.resblocks = ResBlock(in_channels, out_channels, groups=groups, **options)
        self.attention = SelfAttention(out_channels, heads, groups) if heads else None
        self.use_checkpoint = False

    def forward(self, x: Tensor, time: Tensor) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, time, use_reentrant=False)
        return self._forward(x, time)

    def _forward(self, x: Tensor, time: Tensor) -> Tensor:
        x = self.resblocks(x, time)
        return x if self.attention is None else self.attention(x)


class DDPMUNet(nn.Module):
    """A UNet whose level i works at stride 2^i, with `channel_multiplier[i]` times `channel` channels.

    Arguments (the published names)
        in_channels, channel   channels of the images; the width of the outermost level, a multiple of 4
        channel_multiplier     widths of the levels over `channel`
        n_res_blocks           blocks of a level on the way down; one more on the way up
        attn_strides           strides at which every block has attention; the first middle block always has
        attn_heads             heads of an attention layer
        use_affine_time        the time embedding scales and shifts instead of being added
        dropout                rate before the second convolution of a block
        fold                   side of the squares of pixels that are stacked into channels first; 1 for none
    and ours
        out_channels           channels of the output; those of the input unless given
        num_classes            rows of a label embedding, the null class counted, added to the time's; -1 for none

    `net(x, timesteps, y=None, context=None)`: x (b, c, h, w), timesteps (b,) in the unit the network was trained on,
    y (b,) int64 labels; returns (b, out_channels, h, w).
    """

    context_shape = None  # it has no cross-attention

    def __init__(self, in_channels: int = 3, channel: int = 128, channel_multiplier: tuple[int, ...] = (1, 2, 2, 2),
                 n_res_blocks: int = 2, attn_strides: tuple[int, ...] = (16,), attn_heads: int = 1,
                 use_affine_time: bool = False, dropout: float = 0.0, fold: int = 1, out_channels: int | None = None,
                 num_classes: int = -1):
        super().__init__()
        for name, value in (("channel", channel), ("n_res_blocks", n_res_blocks), ("attn_heads", attn_heads),
                            ("fold", fold), ("levels in channel_multiplier", len(channel_multiplier))):
            if value < 1:
                raise ValueError(f"DDPM UNet: {name}={value} must be at least 1")
        if channel % 4:
            raise ValueError(f"DDPM UNet: channel={channel} must be a multiple of 4, the channels of a group")
        self.fold, self.num_classes = fold, num_classes
        self.stride = fold * 2 ** (len(channel_multiplier) - 1)
        widths = [channel * multiplier for multiplier in channel_multiplier]
        strides = [2**i for i in range(len(widths))]
        time_dim, groups = 4 * channel, channel // 4

        def block(before: int, after: int, attention: bool) -> Block:
            return Block(before, after, attn_heads if attention else 0, groups, time_dim=time_dim,
                         affine=use_affine_time, dropout=dropout)

        self.time = nn.Sequential(TimeEmbedding(channel), nn.Linear(channel, time_dim), nn.SiLU(),
                                  nn.Linear(time_dim, time_dim))
        down: list[nn.Module] = [nn.Conv2d(in_channels * fold**2, channel, 3, padding=1)]
        kept = [channel]  # channels of every output on the way down
        for width, stride in zip(widths, strides, strict=True):
            for _ in range(n_res_blocks):
                down.append(block(kept[-1], width, stride in attn_strides))
                kept.append(width)
            if stride < strides[-1]:
                down.append(nn.Sequential(nn.Conv2d(width, width, 3, stride=2, padding=1)))
                kept.append(width)
        self.down = nn.ModuleList(down)

        width = widths[-1]
        self.mid = nn.ModuleList([block(width, width, True), block(width, width, False)])

        up: list[nn.Module] = []
        before = width
        for width, stride in zip(reversed(widths), reversed(strides), strict=True):
            for _ in range(n_res_blocks + 1):
                up.append(block(before + kept.pop(), width, stride in attn_strides))
                before = width
            if stride > 1:
                up.append(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1)))
        self.up = nn.ModuleList(up)

        out_channels = in_channels if out_channels is None else out_channels
        self.out = nn.Sequential(nn.GroupNorm(groups, before), nn.SiLU(),
                                 nn.Conv2d(before, out_channels * fold**2, 3, padding=1))
        if num_classes > 0:
            self.label_emb = nn.Embedding(num_classes, time_dim)
        self._initialize()

    def _initialize(self) -> None:
        """Weights uniform with variance 2 / (fan in + fan out), biases 0; NEAR_ZERO at the ends of the branches."""
        closing = [self.out[2]]
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, ResBlock):
                closing += [module.conv2, module.time[1]] if module.affine else [module.conv2]
            elif isinstance(module, SelfAttention):
                closing.append(module.out)
        for layer in closing:
            nn.init.xavier_uniform_(layer.weight, gain=NEAR_ZERO)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None) -> Tensor:
        if context is not None:
            raise ValueError("DDPMUNet has no cross-attention: it takes labels y, not a context")
        if (y is None) == (self.num_classes > 0):
            raise ValueError("this DDPMUNet was built with labels: y (b,) is missing" if y is None else
                             "this DDPMUNet was built without labels (num_classes=-1): it takes no y")
        if x.shape[2] % self.stride or x.shape[3] % self.stride:
            raise UserError(f"data.image_size: this UNet's innermost level has stride {self.stride}, which must divide "
                            f"images of {x.shape[2]} x {x.shape[3]}")
        time = self.time(timesteps)
        if y is not None:
            time = time + self.label_emb(y)
        x = F.pixel_unshuffle(x, self.fold)
        kept = []
        for layer in self.down:
            x = layer(x, time) if isinstance(layer, Block) else layer(x)
            kept.append(x)
        for layer in self.mid:
            x = layer(x, time)
        for layer in self.up:
            x = layer(torch.cat([x, kept.pop()], dim=1), time) if isinstance(layer, Block) else layer(x)
        return F.pixel_shuffle(self.out(x), self.fold)

"""U-ViT (arXiv 2209.12152): a vision transformer whose first half feeds its second half by long skips.

One class serves images, labels and text; parameter names, token order and patch layout are the published
ones, so the official `.pth` files load strictly.
"""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ..heads import MeanCertainty, UEMHeads
from .attention import choose_attention, sdpa_attention
from .concat import join_concat, widened
from .recompute import checkpoint

TOGETHER = 4  # layers whose heads run in one batch
GUIDANCE_UNIT = 10.0  # sinusoids see 10 w: a change of w by a tenth shows, one by a thousandth hardly


def timestep_embedding(timesteps: Tensor, dim: int, max_period: float = 10000.0) -> Tensor:
    """Sinusoids of `timesteps` (b,): (b, dim), cosines first, in float32."""
    half = dim // 2
    k = torch.arange(half, dtype=torch.float32, device=timesteps.device)
    angles = timesteps[:, None].float() * torch.exp(-math.log(max_period) / half * k)[None]
    embedding = torch.cat([angles.cos(), angles.sin()], dim=-1)
    return torch.cat([embedding, torch.zeros_like(embedding[:, :1])], dim=-1) if dim % 2 else embedding


class GuidanceEmbedding(nn.Module):
    """An MLP on sinusoids of the guidance scale w, for a network that takes w beside the time (2210.03142, section
    3.1). Its last layer starts at zero, so that a trained network which is given one computes what it did.

    dim, hidden, out   numbers of sinusoids, of hidden units, and the width of the result
    """

    def __init__(self, dim: int, hidden: int, out: int):
        super().__init__()
        self.dim = dim
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.SiLU()
        self.fc2 = nn.Linear(hidden, out)
        nn.init.zeros_(self.fc2.weight)
        nn.init.zeros_(self.fc2.bias)

    def forward(self, w: Tensor | None, x: Tensor) -> Tensor:
        """(b, out) from w (b,); where it is None, every row of x (b, ...) gets w = 1, which is no guidance."""
        w = torch.ones(x.shape[:1], device=x.device) if w is None else w
        return self.fc2(self.act(self.fc1(timestep_embedding(GUIDANCE_UNIT * w, self.dim).to(self.fc1.weight.dtype))))


class Attention(nn.Module):
    """Multi-head self-attention; the rows of `qkv` are laid out (3, heads, head width)."""

    def __init__(self, dim: int, num_heads: int, qkv_bias: bool):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.attention_function = sdpa_attention

    def forward(self, x: Tensor) -> Tensor:
        b, l, d = x.shape
        qkv = self.qkv(x).view(b, l, 3, self.num_heads, d // self.num_heads).permute(2, 0, 3, 1, 4)
        x = self.attention_function(*qkv.unbind(0))  # b heads l d/heads
        return self.proj(x.transpose(1, 2).reshape(b, l, d))


class MLP(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm transformer block; an out-block first merges a long skip, Linear(2d -> d)."""

    def __init__(self, dim: int, num_heads: int, mlp_ratio: float, qkv_bias: bool, skip: bool,
                 use_checkpoint: bool):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, num_heads, qkv_bias)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = MLP(dim, int(dim * mlp_ratio))
        self.skip_linear = nn.Linear(2 * dim, dim) if skip else None
        self.use_checkpoint = use_checkpoint

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.use_checkpoint and torch.is_grad_enabled():
            return checkpoint(self._forward, x, skip, use_reentrant=False)
        return self._forward(x, skip)

    def _forward(self, x: Tensor, skip: Tensor | None) -> Tensor:
        if skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1))
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    def __init__(self, patch_size: int, in_chans: int, embed_dim: int):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, kernel_size=patch_size, stride=patch_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)  # b l d, row-major


class UViT(nn.Module):
    """U-ViT with `depth` / 2 in-blocks, one mid block and `depth` / 2 out-blocks.

    Arguments (the published names)
        img_size, patch_size, in_chans   image side, patch side (divides it), channels
        embed_dim, depth, num_heads      width d, number of blocks less the mid block (even), heads
        mlp_ratio, qkv_bias              hidden width of the MLP over d; bias of the qkv projection
        mlp_time_embed                   an MLP on the time embedding (False in every published model)
        num_classes                      rows of the label embedding, the null class counted; -1 for none
        conv, skip                       3 x 3 convolution at the end; long skips
        clip_dim, num_clip_token         width and number of text tokens; None and 0 for none
        use_checkpoint                   recompute blocks in the backward pass
        attention                        sdpa, xformers or plain
    and, in no published model,
        guidance_embed                   the guidance scale is an input
        concat_channels                  channels of a condition beside x, which come on top of in_chans
        uem                              AdaDiff's uncertainty heads: released or paper; "" for none

    `net(x, timesteps, y=None, context=None, guidance=None, concat=None)`: x (b, c, h, w), timesteps (b,) in the unit
    the network was trained on (a `Denoiser` knows it), y (b,) int64 labels, context (b, tokens, clip_dim),
    guidance (b,) the scales w of `guidance_embed` (None is 1), concat (b, concat_channels, h, w) the condition
    beside x (None is 0); returns (b, c, h, w). Tokens stand in the order
    [label, time, text, patches]. With `every_layer=True` it returns what every layer would give were it the last, and
    how certain that is: two tensors (layers, b, c, h, w), see `every_head`.

    A policy may walk the sub-passes itself: `embed`, then `in_blocks`, `mid_block`, `out_blocks`
    (or `block_list()`), then `head`, with what `mean_certainty()` gives after any block.
    """

    def __init__(self, img_size: int = 224, patch_size: int = 16, in_chans: int = 3, embed_dim: int = 768,
                 depth: int = 12, num_heads: int = 12, mlp_ratio: float = 4.0, qkv_bias: bool = False,
                 mlp_time_embed: bool = False, num_classes: int = -1, conv: bool = True, skip: bool = True,
                 clip_dim: int | None = None, num_clip_token: int = 0, use_checkpoint: bool = False,
                 attention: str = "sdpa", guidance_embed: bool = False, uem: str = "",
                 concat_channels: int = 0):
        super().__init__()
        for name, whole, part in (("img_size", img_size, patch_size), ("embed_dim", embed_dim, num_heads),
                                  ("depth", depth, 2)):
            if whole % part:
                raise ValueError(f"U-ViT: {name}={whole} must be a multiple of {part}")
        self.img_size, self.patch_size, self.in_chans = img_size, patch_size, in_chans
        self.embed_dim, self.depth, self.num_classes = embed_dim, depth, num_classes
        self.num_clip_token, self.concat_channels = num_clip_token, concat_channels
        self.context_shape = (num_clip_token, clip_dim) if num_clip_token else None
        self.num_patches = (img_size // patch_size) ** 2

        self.patch_embed = PatchEmbed(patch_size, in_chans + concat_channels, embed_dim)
        self.time_embed = nn.Sequential(
            nn.Linear(embed_dim, 4 * embed_dim), nn.SiLU(), nn.Linear(4 * embed_dim, embed_dim),
        ) if mlp_time_embed else nn.Identity()
        if num_classes > 0:
            self.label_emb = nn.Embedding(num_classes, embed_dim)
        if clip_dim is not None:
            self.context_embed = nn.Linear(clip_dim, embed_dim)
        self.extras = 1 + (num_classes > 0) + num_clip_token  # tokens that are not patches
        self.pos_embed = nn.Parameter(torch.zeros(1, self.extras + self.num_patches, embed_dim))

        def block(has_skip: bool) -> Block:
            return Block(embed_dim, num_heads, mlp_ratio, qkv_bias, has_skip, use_checkpoint)

        self.in_blocks = nn.ModuleList([block(False) for _ in range(depth // 2)])
        self.mid_block = block(False)
        self.out_blocks = nn.ModuleList([block(skip) for _ in range(depth // 2)])

        self.norm = nn.LayerNorm(embed_dim)
        self.decoder_pred = nn.Linear(embed_dim, patch_size**2 * in_chans)
        self.final_layer = nn.Conv2d(in_chans, in_chans, 3, padding=1) if conv else nn.Identity()
        self.has_skip = skip
        self.apply(self._init_weights)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        if attention != "sdpa":
            function = choose_attention(attention)
            for each in self.block_list():
                each.attn.attention_function = function
        self.guidance_embedding = None
        if guidance_embed:
            self.add_guidance_input()
        self.lte_classifer = None  # spelt as in AdaDiff's weights
        if uem:
            self.add_uem_heads(uem)

    @staticmethod
    def _init_weights(module: nn.Module) -> None:
        """Linear layers from a truncated normal of std 0.02, zero biases; other layers as torch does."""
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)

    def add_guidance_input(self) -> None:
        """From now on the guidance scale is an input, which changes nothing before it is trained."""
        d = self.embed_dim
        self.guidance_embedding = GuidanceEmbedding(d, 4 * d, d).to(self.pos_embed.device, self.pos_embed.dtype)

    def add_concat_channels(self, channels: int) -> None:
        """From now on so many more channels, a condition beside x, are an input, which changes nothing before it is
        trained.
        """
        self.patch_embed.proj = widened(self.patch_embed.proj, channels)
        self.concat_channels += channels

    def add_uem_heads(self, form: str = "released") -> None:
        """From now on every layer has an uncertainty head (`heads.UEMHeads`), which changes nothing of the output."""
        heads = UEMHeads(self.embed_dim, self.decoder_pred.out_features, self.depth + 1, form)
        self.lte_classifer = heads.to(self.pos_embed.device, self.pos_embed.dtype)

    def block_list(self) -> list[Block]:
        """The depth + 1 blocks in the order they run."""
        return [*self.in_blocks, self.mid_block, *self.out_blocks]

    def embed(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
              guidance: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        """Tokens before the first block: (b, extras + patches, d)."""
        patches = self.patch_embed(join_concat(x, concat, self.concat_channels))
        time = self.time_embed(timestep_embedding(timesteps, self.embed_dim).to(patches.dtype))
        if self.guidance_embedding is not None:
            time = time + self.guidance_embedding(guidance, x)
        elif guidance is not None:
            raise ValueError("this U-ViT was built without guidance_embed: it does not take the guidance scale")
        tokens = [time[:, None], patches]
        if self.num_clip_token:
            if context is None:
                raise ValueError("this U-ViT was built with text tokens: context (b, tokens, clip_dim) is missing")
            tokens.insert(1, self.context_embed(context))
        if self.num_classes > 0:
            if y is None:
                raise ValueError("this U-ViT was built with labels: y (b,) is missing")
            tokens.insert(0, self.label_emb(y)[:, None])
        return torch.cat(tokens, dim=1) + self.pos_embed

    def head(self, tokens: Tensor) -> Tensor:
        """Tokens after any block (b, extras + patches, d) -> image (b, c, h, w)."""
        return self.final_layer(self.unpatchify(self.decoder_pred(self.norm(tokens))[:, self.extras:]))

    def unpatchify(self, patches: Tensor) -> Tensor:
        """(b, patches, p1 p2 c) -> (b, c, h, w)."""
        side, p = self.img_size // self.patch_size, self.patch_size
        image = patches.view(-1, side, side, p, p, self.in_chans).permute(0, 5, 1, 3, 2, 4)
        return image.reshape(-1, self.in_chans, self.img_size, self.img_size)

    def uem_time(self, timesteps: Tensor) -> Tensor | None:
        """(b, d) the timestep embedding as the uncertainty heads take it; None for heads that take none."""
        if self.lte_classifer is None or self.lte_classifer.form != "paper":
            return None
        return timestep_embedding(timesteps, self.embed_dim)

    def mean_certainty(self) -> MeanCertainty:
        """Asks the uncertainty head of any layer how certain `head(tokens)` is, one number a row, with the weights that
        the heads have now.
        """
        return MeanCertainty(self.lte_classifer, self.extras)

    def layers(self, tokens: Tensor) -> Iterator[Tensor]:
        """Run the blocks on what `embed` gives: the tokens after each of them in turn."""
        skips = []
        for block in self.in_blocks:
            tokens = block(tokens)
            skips.append(tokens)
            yield tokens
        tokens = self.mid_block(tokens)
        yield tokens
        for block in self.out_blocks:
            tokens = block(tokens, skips.pop()) if self.has_skip else block(tokens)
            yield tokens

    def every_head(self, maps: Iterable[Tensor], time: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Output and certainty after every layer, each (layers, b, c, h, w), by batched operations over the layers.

        maps: the tokens (b, extras + patches, d) after each layer. The uncertainty heads do not pass gradients on to
        them. Without uncertainty heads the certainty is None.

        The heads of `TOGETHER` layers run in one batch, as soon as an iterator has given these layers' tokens; so does
        their backward pass, just before that of these layers. All heads at the end would need the gradients of all
        layers at once. What is batched is made again in the backward pass, where kept it would cost as much.
        """
        maps = iter(maps)
        out, certainty, first = [], [], 0
        while group := list(itertools.islice(maps, TOGETHER)):
            arguments = (first, time, *group)
            results = (checkpoint(self._heads, *arguments, use_reentrant=False, preserve_rng_state=False)
                       if torch.is_grad_enabled() else self._heads(*arguments))
            out.append(results[0])
            certainty.append(results[1])
            first += len(group)
        return torch.cat(out), None if self.lte_classifer is None else torch.cat(certainty)

    def _heads(self, first: int, time: Tensor | None, *maps: Tensor) -> tuple[Tensor, Tensor | None]:
        """`every_head` of some layers, of which `first` is the first."""
        def images(values: Tensor) -> Tensor:  # n b extras+patches p1p2c -> n b c h w
            return self.unpatchify(values[:, :, self.extras:].flatten(0, 1))

        tokens = torch.stack(maps)
        size = tokens.shape[:2]
        out = self.final_layer(images(self.decoder_pred(self.norm(tokens)))).unflatten(0, size)
        if self.lte_classifer is None:
            return out, None
        return out, images(self.lte_classifer(tokens.detach(), time, first)).unflatten(0, size)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                guidance: Tensor | None = None, every_layer: bool = False,
                concat: Tensor | None = None) -> Tensor | tuple[Tensor, Tensor | None]:
        layers = self.layers(self.embed(x, timesteps, y, context, guidance, concat))
        if every_layer:
            return self.every_head(layers, self.uem_time(timesteps))
        for tokens in layers:  # noqa: B007, the last is what counts
            pass
        return self.head(tokens)

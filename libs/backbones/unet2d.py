"""diffusers' `UNet2DModel` behind the call that all backbones share.

It is a subclass, not a wrapper, so its parameter names, its block contract (`conv_in`, `down_blocks`,
`mid_block`, `up_blocks`) and `save_pretrained` / `from_pretrained` stay diffusers' own.
"""

import inspect

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from .concat import join_concat, widened
from .uvit import GuidanceEmbedding


class LabelEmbedding(nn.Embedding):
    """An embedding of labels that lets pass what is an embedding already."""

    def forward(self, y: Tensor) -> Tensor:
        return y if y.is_floating_point() else super().forward(y)


class UNet2D(UNet2DModel):
    """`net(x, timesteps, y=None)`: x (b, c, h, w), timesteps (b,), y (b,) int64 labels -> (b, c, h, w).

    A network with labels counts its null class last: where y is None, every row gets that class.

    Arguments are diffusers' and
        guidance_embed    the guidance scale is an input: `net(x, timesteps, y=None, guidance=None)`, (b,), None is 1
        concat_channels   so many of the `in_channels` are a condition beside x: `net(x, timesteps, concat=...)`,
                          (b, concat_channels, h, w), None is 0
    """

    context_shape = None  # it has no cross-attention

    def __init__(self, *args, guidance_embed: bool = False, concat_channels: int = 0, **kwargs):
        super().__init__(*args, **kwargs)
        if not 0 <= concat_channels < self.config.in_channels:
            raise ValueError(f"concat_channels={concat_channels} must be fewer than in_channels="
                             f"{self.config.in_channels}, of which they are a part")
        self.concat_channels = concat_channels
        self.register_to_config(concat_channels=concat_channels)
        self.guidance_embedding = None
        if guidance_embed:
            self.add_guidance_input()

    # diffusers reads a config.json by the names in the signature.
    _own = [inspect.Parameter("guidance_embed", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=bool),
            inspect.Parameter("concat_channels", inspect.Parameter.KEYWORD_ONLY, default=0, annotation=int)]
    _theirs = inspect.signature(UNet2DModel.__init__)
    __init__.__signature__ = _theirs.replace(parameters=[*_theirs.parameters.values(), *_own])
    del _own, _theirs

    def add_guidance_input(self) -> None:
        """From now on the guidance scale is an input, which changes nothing before it is trained.

        Its embedding reaches diffusers' forward, which adds that of the label to that of the time, as part of the
        label's.
        """
        if self.config.class_embed_type is not None:
            raise ValueError(f"guidance_embed=True does not go with class_embed_type={self.config.class_embed_type!r}")
        labels, width = self.class_embedding, self.time_embedding.linear_2.out_features
        if labels is None:
            self.class_embedding = nn.Identity()
        else:
            self.class_embedding = LabelEmbedding.from_pretrained(labels.weight, not labels.weight.requires_grad)
        embedding = GuidanceEmbedding(self.time_embedding.linear_1.in_features, width, width)
        self.guidance_embedding = embedding.to(self.conv_in.weight.device, self.conv_in.weight.dtype)
        self.register_to_config(guidance_embed=True)

    def add_concat_channels(self, channels: int) -> None:
        """From now on so many more channels, a condition beside x, are an input, which changes nothing before it is
        trained.
        """
        self.conv_in = widened(self.conv_in, channels)
        self.concat_channels += channels
        self.register_to_config(in_channels=self.conv_in.in_channels, concat_channels=self.concat_channels)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                guidance: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        if context is not None:
            raise ValueError("UNet2DModel has no cross-attention: it takes labels y, not a context")
        x = join_concat(x, concat, self.concat_channels)
        if y is None and self.config.num_class_embeds is not None:
            y = torch.full(x.shape[:1], self.config.num_class_embeds - 1, device=x.device)
        if self.guidance_embedding is not None:
            embedding = self.guidance_embedding(guidance, x)
            y = embedding if y is None else self.class_embedding(y) + embedding
        elif guidance is not None:
            raise ValueError("this UNet2D was built without guidance_embed: it does not take the guidance scale")
        return super().forward(x, timesteps, class_labels=y, return_dict=False)[0]

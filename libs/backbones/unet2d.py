"""diffusers' `UNet2DModel` behind the call that all backbones share.

It is a subclass, not a wrapper, so its parameter names, its block contract (`conv_in`, `down_blocks`,
`mid_block`, `up_blocks`) and `save_pretrained` / `from_pretrained` stay diffusers' own.
"""

import torch
from diffusers import UNet2DModel
from torch import Tensor


class UNet2D(UNet2DModel):
    """`net(x, timesteps, y=None)`: x (b, c, h, w), timesteps (b,), y (b,) int64 labels -> (b, c, h, w).

    A network with labels counts its null class last: where y is None, every row gets that class.
    """

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None,
                context: Tensor | None = None) -> Tensor:
        if context is not None:
            raise ValueError("UNet2DModel has no cross-attention: it takes labels y, not a context")
        if y is None and self.class_embedding is not None:
            y = torch.full(x.shape[:1], self.config.num_class_embeds - 1, device=x.device)
        return super().forward(x, timesteps, class_labels=y, return_dict=False)[0]

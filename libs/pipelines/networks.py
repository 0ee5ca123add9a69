"""Networks of diffusers pipelines behind the call that all backbones share: `net(x, timesteps, **cond)`.

Each holds the pipeline's own module under the name that it has there, `unet` or `transformer`, so that the names of its
weights, and of a LoRA's, are those by which a pipeline loads them.
"""

from collections.abc import Callable

from torch import Tensor, nn


class PipelineNet(nn.Module):
    """`net(x, timesteps, **cond)`: latents x (b, c, h, w), timesteps (b,) in the network's unit -> (b, c, h, w).

    The conditions are those of `PipelineModel.encode`. x and all that is added to features are cast to the precision
    of the weights; times and sizes, which go through sines, keep their own.
    """

    part: str  # what the pipeline calls the module

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.add_module(self.part, inner)

    @property
    def inner(self) -> nn.Module:
        """The pipeline's own module."""
        return self._modules[self.part]

    def enable_gradient_checkpointing(self, function: Callable | None = None) -> None:
        self.inner.enable_gradient_checkpointing(function)

    def cast(self, *tensors: Tensor) -> list[Tensor]:
        dtype = next(self.parameters()).dtype
        return [each.to(dtype) for each in tensors]


class StableDiffusionNet(PipelineNet):
    """A UNet with cross-attention, that of SDXL included.

    context (b, tokens, width); SDXL's pooled (b, width) and time_ids (b, 6); features of a T2I-Adapter adapter_0,
    adapter_1, ... (b, c_i, h_i, w_i), one for each level of the UNet.
    """

    part = "unet"

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor | None = None,
                time_ids: Tensor | None = None, **features: Tensor) -> Tensor:
        x, context, *residuals = self.cast(x, context, *(features[f"adapter_{i}"] for i in range(len(features))))
        added = None if pooled is None else {"text_embeds": self.cast(pooled)[0], "time_ids": time_ids}
        return self.inner(x, timesteps, context, added_cond_kwargs=added,
                          down_intrablock_additional_residuals=residuals or None, return_dict=False)[0]


class PixArtNet(PipelineNet):
    """PixArt-alpha's transformer (2310.00426), without the channels of its learned variance.

    context (b, tokens, width) and mask (b, tokens), 1 for a token of the text; resolution (b, 2) and aspect_ratio
    (b, 1) of the models for 1024 pixels.
    """

    part = "transformer"

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, mask: Tensor, resolution: Tensor | None = None,
                aspect_ratio: Tensor | None = None) -> Tensor:
        x, context = self.cast(x, context)
        out = self.inner(x, context, timesteps, added_cond_kwargs={"resolution": resolution,
                                                                   "aspect_ratio": aspect_ratio},
                         encoder_attention_mask=mask, return_dict=False)[0]
        return out[:, :x.shape[1]]


class StableDiffusion3Net(PipelineNet):
    """Stable Diffusion 3's transformer (2403.03206): context (b, tokens, width) and pooled (b, width)."""

    part = "transformer"

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, pooled: Tensor) -> Tensor:
        x, context, pooled = self.cast(x, context, pooled)
        return self.inner(x, context, pooled, timesteps, return_dict=False)[0]

"""Stable Diffusion 1.5's architecture with random weights, at any width: what it costs and what breaks it do not depend
on the weights.

The pipelines have neither text encoder nor autoencoder; they are given embeddings and hand out latents.
"""

from typing import Any

import torch
from diffusers import (
    ControlNetModel,
    DDIMScheduler,
    StableDiffusionControlNetPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)

WIDTHS = {"full": (320, 640, 1280, 1280), "small": (64, 128, 256, 256), "tiny": (32, 64, 64, 64)}  # channels a level
TOKENS, CROSS = 77, 768  # of CLIP's text features
FACTOR = 8  # pixels a latent
PARTS = dict.fromkeys(("vae", "text_encoder", "tokenizer", "safety_checker", "feature_extractor"))


def _levels(width: str) -> dict[str, Any]:
    return {"block_out_channels": WIDTHS[width], "cross_attention_dim": CROSS, "attention_head_dim": 8,
            "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)}


def unet(width: str = "full") -> UNet2DConditionModel:
    """A UNet of one of WIDTHS; "full" has the 859,520,964 parameters of Stable Diffusion 1.5. Always the same one."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DConditionModel(**_levels(width), sample_size=64,
                                    up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3).eval()


def control_net(width: str) -> ControlNetModel:
    """A ControlNet for `unet(width)`; its zero-initialised layers are random too, so that it does steer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        net = ControlNetModel(**_levels(width), conditioning_embedding_out_channels=(8, 16, 16, 16))
        for parameter in net.parameters():
            if not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    return net.eval()


def random(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _parts(net: UNet2DConditionModel) -> dict[str, Any]:
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
                              set_alpha_to_one=False, steps_offset=1)
    return PARTS | {"unet": net, "scheduler": scheduler, "requires_safety_checker": False}


def _call(steps: int, batch: int = 1, **others) -> dict[str, Any]:
    """Arguments of a guided call."""
    return {"prompt_embeds": random(batch, TOKENS, CROSS, seed=1), "num_inference_steps": steps,
            "negative_prompt_embeds": random(batch, TOKENS, CROSS, seed=2), "guidance_scale": 7.5,
            "output_type": "latent", **others}


def text_to_image(net: UNet2DConditionModel, steps: int, latent: int = 8, batch: int = 1):
    """(pipeline, arguments of its call); the UNet sees 2 batch rows of (4, latent, latent)."""
    pipe = StableDiffusionPipeline(**_parts(net))
    pipe.set_progress_bar_config(disable=True)
    return pipe, _call(steps, batch, height=FACTOR * latent, width=FACTOR * latent)


def image_to_image(net: UNet2DConditionModel, steps: int, latent: int = 8):
    """(pipeline, arguments of its call); the image is given as latents."""
    pipe = StableDiffusionImg2ImgPipeline(**_parts(net))
    pipe.set_progress_bar_config(disable=True)
    return pipe, _call(steps, image=random(1, 4, latent, latent, seed=3))


def controlled(net: UNet2DConditionModel, control: ControlNetModel, steps: int, latent: int = 8):
    """(pipeline with a ControlNet, arguments of its call)."""
    pipe = StableDiffusionControlNetPipeline(**_parts(net), controlnet=control)
    pipe.set_progress_bar_config(disable=True)
    size = FACTOR * latent
    return pipe, _call(steps, image=random(1, 3, size, size, seed=3).sigmoid(), height=size, width=size)

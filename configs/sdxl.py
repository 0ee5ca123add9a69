"""Stable Diffusion XL base 1.0, text to image: 1024 x 1024 pixels, a UNet of 2.6 B parameters, with or without reuse.

Neither Clockwork (2312.08128) nor Faster Diffusion (2312.09608) reports SDXL, so there is no published number.
Multiply-adds of a whole run, attention products counted: 0.64 of plain with encoder propagation (50 DDIM steps, the
paper's nine key steps). Clockwork's cut after the first level would skip 93 % of this UNet in a reuse step, so its
default depth is 2, which skips 69 %.

    python sample.py --config=configs/sdxl.py --config.compute.precision=fp16 --config.pipeline.variant=fp16 --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sdxl
    python sample.py --config=configs/sdxl.py:encoder_propagation --config.compute.precision=fp16 --config.pipeline.variant=fp16 --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sdxl_encoder_propagation --compare
    python sample.py --config=configs/sdxl.py:clockwork --config.compute.precision=fp16 --config.pipeline.variant=fp16 --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sdxl_clockwork --compare
"""

from libs.pipelines.settings import pipeline_config


def get_config(methods: str = ""):
    return pipeline_config(methods, "sdxl", "stabilityai/stable-diffusion-xl-base-1.0", guidance=5.0)

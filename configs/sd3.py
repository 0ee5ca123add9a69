"""Stable Diffusion 3 medium, text to image: 1024 x 1024 pixels, a transformer of 2 B parameters that matches flows.

No number is reproduced: the paper (2403.03206) compares by human preference. Its transformer has no long skips, so the
methods that reuse a UNet's features do not apply. The hub asks to accept the model's licence first.

    python sample.py --config=configs/sd3.py --config.compute.precision=fp16 --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sd3
    python sample.py --config=configs/sd3.py --config.compute.precision=fp16 --config.pipeline.negative_prompt="blurry" --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/sd3_negative
"""

from libs.pipelines.settings import pipeline_config


def get_config(methods: str = ""):
    return pipeline_config(methods, "sd3", "stabilityai/stable-diffusion-3-medium-diffusers", guidance=7.0, steps=28,
                           scheduler="own")  # Euler on the flow; flow_lcm for students of a few steps

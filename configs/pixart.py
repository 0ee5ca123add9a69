"""PixArt-alpha, text to image: 1024 x 1024 pixels, a transformer of 0.6 B parameters conditioned on T5-XXL.

No number is reproduced: the paper (2310.00426) reports FID 7.32 on MS-COCO with captions and images of its own choice.
Its transformer has no long skips, so the methods that reuse a UNet's features do not apply.

    python sample.py --config=configs/pixart.py --config.compute.precision=fp16 --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/pixart
    python sample.py --config=configs/pixart.py --config.compute.precision=fp16 --config.pipeline.steps=8 --prompts="a photo of an astronaut" --seeds=0-3 --out=outputs/pixart_8
"""

from libs.pipelines.settings import pipeline_config


def get_config(methods: str = ""):
    return pipeline_config(methods, "pixart", "PixArt-alpha/PixArt-XL-2-1024-MS", guidance=4.5, steps=20,
                           scheduler="own")  # DPM-Solver++

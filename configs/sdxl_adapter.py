"""SDXL steered by a T2I-Adapter of Canny edges: 1024 x 1024 pixels, with or without feature reuse.

No number is reproduced: the adapter (2302.08453) was released without one.

--control_image is the picture that the adapter was trained on, for this one white edges on black (not the photo
itself), or a folder of such pictures, which the seeds take in turn.
    python sample.py --config=configs/sdxl_adapter.py --config.compute.precision=fp16 --control_image=edges.png --prompts="a red car" --seeds=0-3 --out=outputs/sdxl_adapter
    python sample.py --config=configs/sdxl_adapter.py:clockwork --config.compute.precision=fp16 --control_image=edges.png --prompts="a red car" --seeds=0-3 --out=outputs/sdxl_adapter_clockwork --compare
"""

from libs.pipelines.settings import pipeline_config


def get_config(methods: str = ""):
    return pipeline_config(
        methods, "sdxl_adapter", "stabilityai/stable-diffusion-xl-base-1.0",
        guidance=7.5,
        adapter="TencentARC/t2i-adapter-canny-sdxl-1.0",  # the network beside the UNet: a folder or a hub id
        control_scale=0.8,  # factor of what the adapter adds
    )

"""Stable Diffusion 1.5 steered by a ControlNet of Canny edges: 512 x 512 pixels, with or without feature reuse.

Faster Diffusion (2312.09608) reports for edges, 50 DDIM steps: FID 13.78 -> 14.65 and CLIP score 0.769 -> 0.767 (2.5
cos) with encoder propagation, 3.20 -> 1.52 s an image; at steps that are not key steps the ControlNet does not run.

--control_image is the picture that the ControlNet was trained on, for this one white edges on black (not the photo
itself), or a folder of such pictures, which the seeds take in turn.
    python sample.py --config=configs/controlnet.py --control_image=edges.png --prompts="a red car" --seeds=0-3 --out=outputs/controlnet
    python sample.py --config=configs/controlnet.py:encoder_propagation --config.policy.parallel=true --control_image=edges.png --prompts="a red car" --seeds=0-3 --out=outputs/controlnet_encoder_propagation --compare
    python sample.py --config=configs/controlnet.py:clockwork --control_image=edges.png --prompts="a red car" --seeds=0-3 --out=outputs/controlnet_clockwork --compare
"""

from libs.pipelines.settings import pipeline_config


def get_config(methods: str = ""):
    return pipeline_config(
        methods, "controlnet", "stable-diffusion-v1-5/stable-diffusion-v1-5",
        controlnet="lllyasviel/sd-controlnet-canny",  # the network beside the UNet: a folder or a hub id
        control_scale=1.0,  # factor of what the ControlNet adds
    )

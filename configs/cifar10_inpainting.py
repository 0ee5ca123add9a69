"""Inpainting on CIFAR-10 by the released class-conditional UNet (20.1 M parameters), beside whose noisy image stand a mask
(1 in the hole) and the image with 0 in the hole. Holes are boxes, halves and strokes, one drawn for every image; known
pixels are kept exactly.

Train on from `cifar10_unet_v`, whose weights for the new channels start at 0 (a short training, for a CPU with bf16
instructions), make a folder of the images that training leaves out, fill holes in some of them, and measure:
    python train.py --config=configs/cifar10_inpainting.py --checkpoint=cifar10_unet_v --config.compute.precision=bf16 --workdir=runs/inpainting
    python prepare_data.py held_out --config=configs/cifar10_inpainting.py --out=data/cifar10_held_out
    python sample.py --config=configs/cifar10_inpainting.py --checkpoint=runs/inpainting --images=data/cifar10_held_out --seeds=0-15 --out=outputs/inpainting
    python eval.py --config=configs/cifar10_inpainting.py --checkpoint=runs/inpainting --images=data/cifar10_held_out --seeds=0-499 --out=outputs/eval/inpainting.json
Holes of one kind alone: --config.cond.masks=halves.

PSNR in the hole falls with --config.sampler.steps (see configs/cifar10_super_resolution.py); a hole is filled with one
plausible content, not with the blurred mean of all, by many.
"""

from libs.defaults import base_config, cifar10_unet_backbone
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.backbone = cifar10_unet_backbone(in_channels=7, concat_channels=4)
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="image", task="inpainting", drop=0.1)
    config.sampler.update(name="ddim", steps=20, grid="trailing", threshold="static")
    config.data.hold_out = 100
    config.train.update(
        steps=750, batch_size=16, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup=50, decay_from=0.4,
        clip_norm=1.0, ema=0.99, log_every=25, save_every=250, preview_every=250,
    )
    config.eval.metrics = ("psnr",)
    apply_methods(config, methods, METHODS)
    return config

"""Inpainting on CIFAR-10: a UNet of 1.6 M parameters beside whose noisy image stand a mask (1 in the hole) and the image
with 0 in the hole. Holes are boxes, halves and strokes, one drawn for every image; known pixels are kept exactly.

Train, fill holes in the images of a folder, and measure:
    python train.py --config=configs/cifar10_inpainting.py --workdir=runs/inpainting
    python sample.py --config=configs/cifar10_inpainting.py --checkpoint=runs/inpainting --images=photos --seeds=0-15 --out=outputs/inpainting
    python eval.py --config=configs/cifar10_inpainting.py --checkpoint=runs/inpainting --images=photos --config.eval.metrics=psnr --seeds=0-499 --out=outputs/eval/inpainting.json
Holes of one kind alone: --config.cond.masks=halves. The hyperparameters are a start, not a recipe.
"""

from libs.defaults import base_config
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.backbone = {
        "name": "unet2d", "sample_size": 32, "in_channels": 7, "concat_channels": 4, "out_channels": 3,
        "block_out_channels": (32, 64, 64), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 32, "attention_head_dim": 32,
    }
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="image", task="inpainting", drop=0.1)
    config.sampler.update(name="ddim", steps=20, grid="trailing", threshold="static")
    config.train.update(
        steps=20_000, batch_size=128, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay_from=0.4,
        clip_norm=1.0, ema=0.999, save_every=1000, preview_every=1000,
    )
    config.eval.metrics = ("psnr",)
    apply_methods(config, methods, METHODS)
    return config

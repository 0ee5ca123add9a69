"""Super-resolution on CIFAR-10: 16 x 16 pixels to 32 x 32, a UNet of 1.6 M parameters beside whose noisy image stands the
small one, enlarged (1 / 2 as large by the mean of 2 x 2 pixels, then bicubic).

Train, enlarge images of a folder (of which the small ones are made) and compare with bicubic:
    python train.py --config=configs/cifar10_super_resolution.py --workdir=runs/super_resolution
    python sample.py --config=configs/cifar10_super_resolution.py --checkpoint=runs/super_resolution --images=photos --seeds=0-15 --out=outputs/super_resolution
    python eval.py --config=configs/cifar10_super_resolution.py --checkpoint=runs/super_resolution --images=photos --config.eval.metrics=psnr --seeds=0-499 --out=outputs/eval/super_resolution.json
A factor of 4 is --config.cond.factor=4. The hyperparameters are a start, not a recipe.
"""

from libs.defaults import base_config
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.backbone = {
        "name": "unet2d", "sample_size": 32, "in_channels": 6, "concat_channels": 3, "out_channels": 3,
        "block_out_channels": (32, 64, 64), "layers_per_block": 2,
        "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        "up_block_types": ("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        "norm_num_groups": 32, "attention_head_dim": 32,
    }
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="image", task="super_resolution", factor=2, drop=0.1)
    config.sampler.update(name="ddim", steps=8, grid="trailing", threshold="static")
    config.train.update(
        steps=20_000, batch_size=128, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=200, decay_from=0.4,
        clip_norm=1.0, ema=0.999, save_every=1000, preview_every=1000,
    )
    config.eval.metrics = ("psnr",)
    apply_methods(config, methods, METHODS)
    return config

"""Super-resolution on CIFAR-10: 16 x 16 pixels to 32 x 32, by the released class-conditional UNet (20.1 M parameters),
beside whose noisy image stands the small one, enlarged (1 / 2 as large by the mean of 2 x 2 pixels, then bicubic).

Train on from `cifar10_unet_v`, whose weights for the small image's channels start at 0 (a short training, for a CPU with
bf16 instructions), make a folder of the images that training leaves out, enlarge some of them (of which the small ones
are made) and compare with bicubic:
    python train.py --config=configs/cifar10_super_resolution.py --checkpoint=cifar10_unet_v --config.compute.precision=bf16 --workdir=runs/super_resolution
    python prepare_data.py held_out --config=configs/cifar10_super_resolution.py --out=data/cifar10_held_out
    python sample.py --config=configs/cifar10_super_resolution.py --checkpoint=runs/super_resolution --images=data/cifar10_held_out --seeds=0-15 --out=outputs/super_resolution
    python eval.py --config=configs/cifar10_super_resolution.py --checkpoint=runs/super_resolution --images=data/cifar10_held_out --seeds=0-499 --out=outputs/eval/super_resolution.json
A factor of 4 is --config.cond.factor=4.

After sampling the means of 2 x 2 pixels are set to the small image's, which knows them. More steps give sharper images, of a
larger expected squared error than the mean of all that fit (1711.06077, theorem 2). 2 steps lie between. Expect 27.4 dB, where
bicubic has 26.5, after --config.train.steps=450.
"""

from libs.defaults import base_config, cifar10_unet_backbone
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.backbone = cifar10_unet_backbone(in_channels=6, concat_channels=3)
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="image", task="super_resolution", factor=2, drop=0.1)
    config.sampler.update(name="ddim", steps=2, grid="trailing", threshold="static")
    config.data.hold_out = 100
    config.train.update(
        steps=750, batch_size=16, lr=3e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup=50, decay_from=0.4,
        clip_norm=1.0, ema=0.99, log_every=25, save_every=250, preview_every=250,
    )
    config.eval.metrics = ("psnr",)
    apply_methods(config, methods, METHODS)
    return config

"""A DDPM-style UNet on CIFAR-10: the released `cifar10_unet_v` (20.1 M parameters, class-conditional, v).

Sample the released weights, classes in turn (seed i shows class i mod 10):
    python sample.py --config=configs/cifar10_unet.py --seeds=0-63 --out=outputs/unet
Train them again (6,464 updates of 512 images; 535 s on one H200 in bf16):
    accelerate launch --mixed_precision bf16 train.py --config=configs/cifar10_unet.py --workdir=runs/unet
Expect a final loss of 0.1066 and images like the released ones, within the noise of a training run.
"""

from libs.defaults import base_config, cifar10_unet_backbone
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.checkpoint = "cifar10_unet_v"
    config.backbone = cifar10_unet_backbone()
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="label", num_classes=10, null_label=10, drop=0.1)
    config.sampler.update(name="ddim", steps=50, grid="trailing", threshold="static")
    config.train.update(
        steps=6464, batch_size=512, lr=6e-4, betas=(0.9, 0.99), weight_decay=0.01, warmup=500, decay_from=0.4,
        clip_norm=1.0, ema=0.9998, eval_every=2000, save_every=1000, preview_every=1000,
    )
    apply_methods(config, methods, METHODS)
    return config

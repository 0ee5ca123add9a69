"""A small U-ViT on the 1,797 handwritten 8 x 8 digits inside scikit-learn: nothing to download.

Train, sample and look, on two CPU cores:
    python train.py --config=configs/digits_uvit.py --workdir=runs/digits
    python sample.py --config=configs/digits_uvit.py --checkpoint=runs/digits --seeds=0-99 --out=outputs/digits
The released `digits_uvit` comes from the first command (600 updates, about a minute): a classifier of the real
digits recognises more than 80 % of its samples with confidence. Half the steps by one distillation:
    python distillate.py --config=configs/digits_uvit.py:progressive --checkpoint=runs/digits --workdir=runs/student
    python sample.py --config=configs/digits_uvit.py --checkpoint=runs/student --seeds=0-99 --out=outputs/student
"""

from libs.defaults import base_config
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.checkpoint = "digits_uvit"
    config.backbone = {
        "name": "uvit", "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 96, "depth": 4,
        "num_heads": 3, "mlp_ratio": 4.0, "qkv_bias": False, "mlp_time_embed": False, "num_classes": 11,
        "conv": True, "skip": True,
    }
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="label", num_classes=10, null_label=10, drop=0.1)
    config.data.update(name="digits", path="", image_size=8, channels=1, flip=False)
    config.compute.rows = 50
    config.sampler.update(name="ddim", steps=16, grid="trailing", threshold="static", cfg_scale=2.5)
    config.train.update(
        steps=600, batch_size=64, lr=4e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=100, decay_from=0.3,
        clip_norm=1.0, ema=0.99, log_every=50, save_every=300, preview_every=300,
    )
    config.eval.metrics = ()
    apply_methods(config, methods, METHODS)
    if "distill" in config:  # seconds instead of the papers' tens of thousands of updates
        config.train.update(steps=100, lr=1e-3, log_every=10, save_every=50, preview_every=50)
        if config.distill.name == "flash":
            config.distill.update(stage_updates="50,50,50,50", teacher_steps="16", guidance="2.5", discriminator_lr=1e-3)
            config.train.update(steps=200)
    return config

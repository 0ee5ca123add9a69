"""U-ViT-tiny on CIFAR-10: the released `cifar10_uvit_tiny` (11.1 M parameters, unconditional, eps).

Sample the released weights:
    python sample.py --config=configs/cifar10_uvit_tiny.py --seeds=0-63 --out=outputs/uvit_tiny
Train them again (9,860 updates of 512 images; 500 s on one H200 in bf16):
    accelerate launch --mixed_precision bf16 train.py --config=configs/cifar10_uvit_tiny.py --workdir=runs/uvit_tiny
Expect a final loss of 0.0302 and images like the released ones, within the noise of a training run.
"""

from libs.defaults import base_config
from libs.methods import apply_methods, with_early_exit


def get_config(methods: str = ""):
    config = base_config()
    config.checkpoint = "cifar10_uvit_tiny"
    config.backbone = {
        "name": "uvit", "img_size": 32, "patch_size": 2, "in_chans": 3, "embed_dim": 256, "depth": 12,
        "num_heads": 4, "mlp_ratio": 4.0, "qkv_bias": False, "mlp_time_embed": False, "num_classes": -1,
        "conv": True, "skip": True,
    }
    config.sampler.update(name="ddim", steps=50, threshold="static")
    config.train.update(
        steps=9860, batch_size=512, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.03, warmup=500, decay_from=0.4,
        clip_norm=1.0, ema=0.9998, eval_every=2000, save_every=1000, preview_every=1000,
    )
    apply_methods(config, methods, with_early_exit(threshold=0.92, steps=480, batch_size=32, lr=2e-4, warmup=20, decay_from=0.5, ema=0.99,
                                                    save_every=20, preview_every=0, eval_every=0, log_every=10))
    return config

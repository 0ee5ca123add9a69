"""U-ViT-S/2 on CIFAR-10, unconditional: 44.26 M parameters, 12.20 GMACs a forward.

U-ViT (2209.12152) reports FID 3.11 (50,000 samples). With the published weights and statistics:
    bash scripts/download.sh cifar10_uvit_small fid_stats_cifar10
    python eval.py --config=configs/cifar10_uvit_small.py --checkpoint=data/pretrained/cifar10_uvit_small.pth \
        --config.eval.reference=data/fid_stats/fid_stats_cifar10_train_pytorch.npz --config.eval.metrics=fid \
        --seeds=0-49999 --out=outputs/cifar10_uvit_small.json
Train from scratch (fp16):
    accelerate launch --mixed_precision fp16 train.py --config=configs/cifar10_uvit_small.py \
        --workdir=runs/cifar10_uvit_small
AdaDiff's early exit on these weights (2309.17074, its scripts: 75,000 updates, certainty 0.92):
    accelerate launch --mixed_precision fp16 train.py --config=configs/cifar10_uvit_small.py:early_exit \
        --checkpoint=data/pretrained/cifar10_uvit_small.pth --workdir=runs/cifar10_uvit_small_early_exit
`bash scripts/cifar10_uvit.sh` does all of it, stage by stage.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import apply_methods, with_early_exit


def get_config(methods: str = ""):
    config = base_config()
    config.seed = 1234
    config.compute.update(precision="fp16", rows=64)
    config.backbone = uvit_backbone(32, 2, 512, 12, 8)
    config.schedule = {"name": "vp_linear"}
    config.denoiser.update(prediction="eps", time_input="999t")
    config.sampler.update(name="euler_sde", steps=1000, grid="uniform", t_end=0.0)
    config.train.update(
        steps=500_000, batch_size=128, lr=2e-4, betas=(0.99, 0.999), weight_decay=0.03, warmup=2500, ema=0.9999,
    )
    config.eval.metrics = ("fid",)
    apply_methods(config, methods, with_early_exit(threshold=0.92, steps=75_000, batch_size=512, lr=4e-4))
    return config

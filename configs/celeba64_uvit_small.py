"""U-ViT-S/4 on CelebA 64 x 64, unconditional: 44.29 M parameters, 12.21 GMACs a forward.

U-ViT (2209.12152) reports FID 2.87 (50,000 samples). With the published weights and statistics:
    bash scripts/download.sh celeba64_uvit_small fid_stats_celeba64
    python eval.py --config=configs/celeba64_uvit_small.py --checkpoint=data/pretrained/celeba64_uvit_small.pth \
        --config.eval.reference=data/fid_stats/fid_stats_celeba64_train_50000_ddim.npz --config.eval.metrics=fid \
        --seeds=0-49999 --out=outputs/celeba64_uvit_small.json
Train from scratch (fp16):
    accelerate launch --mixed_precision fp16 train.py --config=configs/celeba64_uvit_small.py \
        --workdir=runs/celeba64_uvit_small
AdaDiff's early exit on these weights (2309.17074, its scripts: 200,000 updates, certainty 0.95):
    accelerate launch --mixed_precision fp16 train.py --config=configs/celeba64_uvit_small.py:early_exit \
        --checkpoint=data/pretrained/celeba64_uvit_small.pth --workdir=runs/celeba64_uvit_small_early_exit
`bash scripts/celeba64_uvit.sh` does all of it, stage by stage.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import apply_methods, with_early_exit


def get_config(methods: str = ""):
    config = base_config()
    config.seed = 1234
    config.compute.update(precision="fp16", rows=64)
    config.backbone = uvit_backbone(64, 4, 512, 12, 8)
    config.schedule = {"name": "vp_linear"}
    config.denoiser.update(prediction="eps", time_input="999t")
    config.data.update(name="celeba", path="data/celeba", image_size=64, flip=True)
    config.sampler.update(name="euler_sde", steps=1000, grid="uniform", t_end=0.0)
    config.train.update(
        steps=500_000, batch_size=128, lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000, ema=0.9999,
    )
    config.eval.metrics = ("fid",)
    apply_methods(config, methods, with_early_exit(threshold=0.95, steps=200_000, batch_size=1024, lr=8e-4))
    return config

"""U-ViT-M/4 on ImageNet 64 x 64, class-conditional: 130.94 M parameters, 35.24 GMACs a forward.

U-ViT (2209.12152) reports FID 5.85 (50,000 samples). With the published weights and statistics:
    bash scripts/download.sh imagenet64_uvit_mid fid_stats_imagenet64
    python eval.py --config=configs/imagenet64_uvit_mid.py --checkpoint=data/pretrained/imagenet64_uvit_mid.pth \
        --config.eval.reference=data/fid_stats/fid_stats_imagenet64_guided_diffusion.npz --config.eval.metrics=fid \
        --seeds=0-49999 --out=outputs/imagenet64_uvit_mid.json
Train from scratch (fp16):
    accelerate launch --mixed_precision fp16 train.py --config=configs/imagenet64_uvit_mid.py \
        --workdir=runs/imagenet64_uvit_mid
`bash scripts/imagenet64_uvit.sh` does all of it, stage by stage.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.seed = 1234
    config.compute.update(precision="fp16", rows=64)
    config.backbone = uvit_backbone(64, 4, 768, 16, 12, num_classes=1000)
    config.schedule = {"name": "vp_linear"}
    config.denoiser.update(prediction="eps", time_input="999t")
    config.cond.update(kind="label", num_classes=1000, null_label=-1, drop=0.0)
    config.data.update(name="imagenet", path="data/imagenet", image_size=64, flip=True)
    config.sampler.update(name="dpm_solver", order=3, steps=50, grid="logsnr", t_end=1e-4)
    config.train.update(
        steps=300_000, batch_size=1024, lr=3e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000,
        ema=0.9999, grad_checkpoint=True,
    )
    config.eval.metrics = ("fid",)
    apply_methods(config, methods, METHODS)
    return config

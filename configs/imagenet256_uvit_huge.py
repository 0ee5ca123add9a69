"""U-ViT-H/2 on ImageNet 256 x 256 latents, class-conditional: 500.83 M parameters, 133.20 GMACs a forward.

U-ViT (2209.12152) reports FID 2.29 (50,000 samples). Its guidance s = 0.4 is cfg_scale = 1 + s = 1.4.
With the published weights and statistics:
    bash scripts/download.sh imagenet256_uvit_huge autoencoder_kl_ema fid_stats_imagenet256
    python eval.py --config=configs/imagenet256_uvit_huge.py --checkpoint=data/pretrained/imagenet256_uvit_huge.pth \
        --config.codec.pretrained=data/pretrained/autoencoder_kl_ema.pth --config.eval.metrics=fid \
        --config.eval.reference=data/fid_stats/fid_stats_imagenet256_guided_diffusion.npz \
        --seeds=0-49999 --out=outputs/imagenet256_uvit_huge.json
Latents to train on, in U-ViT's layout, and training from scratch (fp16):
    python prepare_data.py latents --config=configs/imagenet256_uvit_huge.py --images=data/imagenet/train --flips \
        --config.codec.pretrained=data/pretrained/autoencoder_kl.pth --out=data/imagenet256_features
    accelerate launch --mixed_precision fp16 train.py --config=configs/imagenet256_uvit_huge.py \
        --workdir=runs/imagenet256_uvit_huge
`MODEL=huge bash scripts/imagenet256_uvit.sh` does all of it, stage by stage.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.seed = 1234
    config.compute.update(precision="fp16", rows=50)
    config.backbone = uvit_backbone(32, 2, 1152, 28, 16, in_chans=4, num_classes=1001, conv=False)
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.update(prediction="eps", time_input="step")
    config.codec = {"name": "kl", "pretrained": "stabilityai/sd-vae-ft-ema", "scale_factor": 0.18215}
    config.cond.update(kind="label", num_classes=1000, null_label=1000, drop=0.1)
    config.data.update(name="features", path="data/imagenet256_features", image_size=256, flip=False)
    config.sampler.update(name="dpm_solver_pp_singlestep", order=3, steps=50, grid="uniform", t_end=1e-3,
                          cfg_scale=1.4)  # s = 0.4
    config.train.update(
        steps=500_000, batch_size=1024, lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000,
        ema=0.9999, grad_checkpoint=True,
    )
    config.eval.metrics = ("fid",)
    apply_methods(config, methods, METHODS)
    return config

"""U-ViT-L/4 on ImageNet 512 x 512 latents, class-conditional: 286.86 M parameters, 76.48 GMACs a forward.

U-ViT (2209.12152) reports FID 4.67 (50,000 samples). Its guidance s = 0.7 is cfg_scale = 1 + s = 1.7.
With the published weights and statistics:
    bash scripts/download.sh imagenet512_uvit_large autoencoder_kl fid_stats_imagenet512
    python eval.py --config=configs/imagenet512_uvit_large.py --checkpoint=data/pretrained/imagenet512_uvit_large.pth \
        --config.codec.pretrained=data/pretrained/autoencoder_kl.pth --config.eval.metrics=fid \
        --config.eval.reference=data/fid_stats/fid_stats_imagenet512_guided_diffusion.npz \
        --seeds=0-49999 --out=outputs/imagenet512_uvit_large.json
Latents to train on, in U-ViT's layout, and training from scratch (fp16):
    python prepare_data.py latents --config=configs/imagenet512_uvit_large.py --images=data/imagenet/train --flips \
        --config.codec.pretrained=data/pretrained/autoencoder_kl.pth --out=data/imagenet512_features
    accelerate launch --mixed_precision fp16 train.py --config=configs/imagenet512_uvit_large.py \
        --workdir=runs/imagenet512_uvit_large
`bash scripts/imagenet512_uvit.sh` does all of it, stage by stage.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.seed = 1234
    config.compute.update(precision="fp16", rows=50)
    config.backbone = uvit_backbone(64, 4, 1024, 20, 16, in_chans=4, num_classes=1001)
    config.schedule = {"name": "vp_linear"}
    config.denoiser.update(prediction="eps", time_input="999t")
    config.codec = {"name": "kl", "pretrained": "stabilityai/sd-vae-ft-ema", "scale_factor": 0.18215}
    config.cond.update(kind="label", num_classes=1000, null_label=1000, drop=0.15)
    config.data.update(name="features", path="data/imagenet512_features", image_size=512, flip=False)
    config.sampler.update(name="dpm_solver", order=3, steps=50, grid="logsnr", t_end=1e-4, cfg_scale=1.7)  # s = 0.7
    config.train.update(
        steps=500_000, batch_size=1024, lr=2e-4, betas=(0.99, 0.99), weight_decay=0.03, warmup=5000,
        ema=0.9999, grad_checkpoint=True,
    )
    config.eval.metrics = ("fid",)
    apply_methods(config, methods, METHODS)
    return config

"""U-ViT-S/2 (Deep) on MS-COCO 256 x 256 latents, text to image: 58.35 M parameters, 21.24 GMACs a forward.

U-ViT (2209.12152) reports FID 5.48 (30,000 captions of val2014) with DPM-Solver++ and guidance s = 1.0, which is
cfg_scale = 1 + s = 2.0. The latents' scale factor is 0.23010, not Stable Diffusion's, in training and in sampling. The
text is CLIP ViT-L/14's last hidden state, 77 tokens of width 768. Pictures of prompts with the published weights, and
their FID:
    bash scripts/download.sh mscoco_uvit_small_deep autoencoder_kl fid_stats_mscoco
    python sample.py --config=configs/mscoco_uvit_deep.py --checkpoint=data/pretrained/mscoco_uvit_small_deep.pth \
        --config.codec.pretrained=data/pretrained/autoencoder_kl.pth --prompts="a green train is coming down the tracks" \
        --seeds=0-7 --out=outputs/mscoco_uvit_deep
    python eval.py --config=configs/mscoco_uvit_deep.py --checkpoint=data/pretrained/mscoco_uvit_small_deep.pth \
        --config.codec.pretrained=data/pretrained/autoencoder_kl.pth --prompts=data/coco/annotations/captions_val2014.json \
        --config.eval.reference=data/fid_stats/fid_stats_mscoco256_val.npz --config.eval.metrics=fid \
        --seeds=0-29999 --out=outputs/mscoco_uvit_deep.json
--config.eval.metrics=fid,clip_score adds how well the images fit their captions. --prompts=data/coco256_features/run_vis
shows prompts whose embeddings are on disk, without the text encoder. Features to train on, of the images and annotations
of cocodataset.org as they are, in U-ViT's layout (the same for the two parts, --split=train and --split=val):
    python prepare_data.py latents --config=configs/mscoco_uvit_deep.py --images=data/coco/train2014.zip --split=train \
        --captions=data/coco/annotations_trainval2014.zip --out=data/coco256_features
    python prepare_data.py text --config=configs/mscoco_uvit_deep.py --split=train \
        --captions=data/coco/annotations_trainval2014.zip --out=data/coco256_features
    python prepare_data.py text --config=configs/mscoco_uvit_deep.py --prompts=prompts.txt --out=data/coco256_features
Train from scratch (fp16); the previews show the last command's prompts:
    accelerate launch --mixed_precision fp16 train.py --config=configs/mscoco_uvit_deep.py --workdir=runs/mscoco_uvit_deep
AdaDiff's early exit on these weights, with the settings published for S/2:
    accelerate launch --mixed_precision fp16 train.py --config=configs/mscoco_uvit_deep.py:early_exit \
        --checkpoint=data/pretrained/mscoco_uvit_small_deep.pth --workdir=runs/mscoco_uvit_deep_early_exit
`MODEL=deep bash scripts/mscoco_uvit.sh` does all of it, stage by stage.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import apply_methods, with_early_exit


def get_config(methods: str = ""):
    config = base_config()
    config.seed = 1234
    config.compute.update(precision="fp16", rows=50)
    config.backbone = uvit_backbone(32, 2, 512, 16, 8, in_chans=4, clip_dim=768, num_clip_token=77)
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.update(prediction="eps", time_input="step")
    config.codec = {"name": "kl", "pretrained": "stabilityai/sd-vae-ft-ema", "scale_factor": 0.23010}
    config.cond.update(kind="text", drop=0.1)
    config.data.update(name="features", path="data/coco256_features", image_size=256, flip=False)
    config.sampler.update(name="dpm_solver_pp_singlestep", order=3, steps=50, grid="uniform", t_end=1e-3,
                          cfg_scale=2.0)  # U-ViT's s = 1
    config.train.update(
        steps=1_000_000, batch_size=256, lr=2e-4, betas=(0.9, 0.9), weight_decay=0.03, warmup=5000, ema=0.9999,
    )
    config.eval.metrics = ("fid",)
    apply_methods(config, methods, with_early_exit(threshold=0.87, steps=330_000))
    return config

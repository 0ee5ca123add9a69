"""U-ViT-S/2 on MS-COCO 256 x 256 latents, text to image: 44.69 M parameters, 16.23 GMACs a forward.

U-ViT (2209.12152) reports FID 5.95 (30,000 prompts of the validation set) with DPM-Solver++ and guidance
s = 1.0, which is cfg_scale = 1 + s = 2.0. The latents' scale factor is 0.23010, not Stable Diffusion's.
The text is CLIP ViT-L/14's last hidden state, 77 tokens of width 768. This file builds the network and loads
the published weights (`mscoco_uvit_small.pth`); training and sampling from prompts need text
conditioning, `cond.kind="text"`, which train.py and sample.py refuse for now.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import apply_methods, with_early_exit


def get_config(methods: str = ""):
    config = base_config()
    config.seed = 1234
    config.compute.update(precision="fp16", rows=50)
    config.backbone = uvit_backbone(32, 2, 512, 12, 8, in_chans=4, clip_dim=768, num_clip_token=77)
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.update(prediction="eps", time_input="step")
    config.codec = {"name": "kl", "pretrained": "stabilityai/sd-vae-ft-ema", "scale_factor": 0.23010}
    config.cond.update(kind="text", drop=0.1)
    config.data.update(name="folder", path="data/mscoco256/train", image_size=256, flip=False)
    config.sampler.update(name="dpm_solver_pp_singlestep", order=3, steps=50, grid="uniform", t_end=1e-3,
                          cfg_scale=2.0)
    config.train.update(
        steps=1_000_000, batch_size=256, lr=2e-4, betas=(0.9, 0.9), weight_decay=0.03, warmup=5000, ema=0.9999,
    )
    config.eval.metrics = ("fid",)
    apply_methods(config, methods, with_early_exit(threshold=0.87, steps=330_000))
    return config

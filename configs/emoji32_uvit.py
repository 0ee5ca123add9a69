"""Small latent U-ViTs for pictures of 32 x 32 with captions; latents of 4 x 16 x 16. No paper's row.

The regimes of U-ViT (2209.12152) in latents, as methods after the colon: continuous time (no method), discrete time
(:discrete) and text to image (:text, in discrete time). scripts/emoji32_uvit.sh makes the autoencoder, the features
and the text encoder in runs/emoji32, then trains and samples all three. Its commands are of this form:
    python train.py --config=configs/emoji32_uvit.py --config.codec.scale_factor=0.9 --workdir=runs/emoji32/continuous
    python train.py --config=configs/emoji32_uvit.py:discrete --config.codec.scale_factor=0.9 --workdir=runs/emoji32/discrete
    python train.py --config=configs/emoji32_uvit.py:text --config.codec.scale_factor=0.9 --workdir=runs/emoji32/text
    python sample.py --config=configs/emoji32_uvit.py:text --checkpoint=runs/emoji32/text --prompts="emoji of red heart" --seeds=0-15 --out=outputs/emoji32_text
with the scale factor that the autoencoder's training told. They predict v. Of 16 pictures an update, and 243 pictures, 9,000
updates from text gave recognisable ones, 2,000 blotches; of all 1,660 emoji 1,200 were far too few. A LoRA of a few steps
of the text model, by Flash Diffusion: `:text,flash`, with the same folder of features.
"""

from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods


def discrete(config) -> None:
    """Stable Diffusion's 1000 steps in place of continuous time, as U-ViT's text-to-image models have them."""
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.time_input = "step"
    config.sampler.t_end = 1e-3


def text(config) -> None:
    """Discrete time, and captions through a text encoder; guidance s = 1, which is cfg_scale = 1 + s."""
    discrete(config)
    config.backbone.update(clip_dim=64, num_clip_token=16)
    config.cond.update(kind="text", text_encoder="runs/emoji32/text_encoder", tokens=16, drop=0.1)
    config.sampler.cfg_scale = 2.0


def get_config(methods: str = ""):
    config = base_config()
    config.compute.rows = 32
    config.backbone = uvit_backbone(16, 2, 128, 6, 4, in_chans=4)
    config.schedule = {"name": "vp_linear"}
    config.denoiser.update(prediction="v", time_input="999t")
    config.codec = {"name": "kl", "pretrained": "runs/emoji32/autoencoder/autoencoder", "scale_factor": 1.0}
    config.data.update(name="features", path="runs/emoji32/features", image_size=32, flip=False)
    config.sampler.update(name="dpm_solver_pp", order=2, steps=25, grid="logsnr", t_end=1e-4)
    config.train.update(
        steps=20_000, batch_size=16, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=0.01, warmup=100, decay_from=0.4,
        clip_norm=1.0, ema=0.99, log_every=50, save_every=1000, preview_every=2000, preview_images=32,
    )
    config.eval.metrics = ()
    apply_methods(config, methods, METHODS | {"discrete": discrete, "text": text})
    return config

"""A small AutoencoderKL for pictures of 32 x 32: latents of 4 x 16 x 16, 0.16 M parameters. No paper's row.

    python train.py --config=configs/emoji32_autoencoder.py --config.data.path=data/emoji64 --workdir=runs/emoji32_autoencoder
The diffusers folder runs/emoji32_autoencoder/autoencoder is codec.pretrained of the latent U-ViTs, and its
`scaling_factor`, which the log tells too, their codec.scale_factor. scripts/emoji32_uvit.sh runs the whole chain.
"""

from libs.defaults import base_config


def get_config():
    config = base_config()
    config.compute.rows = 64
    config.backbone = {
        "name": "autoencoder_kl", "latent_channels": 4, "block_out_channels": (16, 32), "layers_per_block": 1,
        "norm_num_groups": 8, "mid_attention": False,
    }
    config.autoencoder = {
        "kl_weight": 1e-3,  # of the KL term, a mean over the latents' values
        "hold_out": 20,  # every 20th image is not learnt from, and measured
    }
    config.data.update(name="folder", path="data/emoji64", image_size=32, flip=False)
    config.train.update(
        steps=6000, batch_size=8, lr=3e-3, betas=(0.9, 0.99), weight_decay=0.0, warmup=50, decay_from=0.5,
        clip_norm=1.0, ema=0.99, log_every=50, save_every=1000, preview_every=1000, preview_images=24,
    )
    config.eval.metrics = ()
    return config

"""diffusion_distiller's UNet on CelebA-HQ 256 x 256, unconditional: 92.70 M parameters, v, 1024 steps.

Its data, training and distillation to 8 steps, with its hyperparameters (batches of 3; 150,000 images for the model,
5,000 for each student, 10,000 from 32 steps on). No FID or other number is published for it, only pictures.
    python prepare_data.py lmdb --size=256 --out=data/celeba_256 data/celeba_hq
    python train.py --config=configs/celebahq256_unet.py --workdir=runs/celeba
    python distillate.py --config=configs/celebahq256_unet.py:hramchenko --checkpoint=runs/celeba --config.distill.start_steps=1024 --config.distill.end_steps=8 --config.distill.updates=1667,1667,1667,1667,3334,3334,3334 --workdir=runs/celeba_students
    python sample.py --config=configs/celebahq256_unet.py --checkpoint=runs/celeba_students --seeds=0-15 --out=outputs/celeba
With :progressive in place of :hramchenko the students learn as in the paper (2202.00512) and repeat their teachers'
steps exactly. Its published `checkpoint.pt` are read as they are, students with their number of steps; also as teachers:
    python sample.py --config=configs/celebahq256_unet.py --checkpoint=checkpoint.pt --seeds=0-15 --out=outputs/celeba
Ours is written for its scripts by: python -m libs.distiller_checkpoint --checkpoint=runs/celeba --out=checkpoint.pt

Where it differs: samples are of the averaged weights (EMA 0.999), which the original's training computes and drops.
"""

from libs.defaults import base_config
from libs.methods import METHODS, apply_methods


def get_config(methods: str = ""):
    config = base_config()
    config.compute.rows = 4
    config.backbone = {
        "name": "ddpm_unet", "in_channels": 3, "channel": 112, "channel_multiplier": (1, 2, 2, 4, 4),
        "n_res_blocks": 2, "attn_strides": (8, 16), "attn_heads": 4, "use_affine_time": True, "dropout": 0.0,
        "fold": 1,
    }
    config.schedule = {"name": "squared_cosine", "steps": 1024}
    config.denoiser.update(prediction="v", time_input="index")
    config.codec.order = "bgr"  # as the original's reader of the database hands the images over
    config.data.update(name="lmdb", path="data/celeba_256", image_size=256, flip=False)
    config.sampler.update(name="ddpm", steps=1024, grid="trailing", threshold="static")
    config.train.update(
        steps=50_000, batch_size=3, lr=5e-5, betas=(0.9, 0.999), weight_decay=0.01, warmup=0, clip_norm=1.0, ema=0.999,
        preview_images=1,
    )
    config.eval.metrics = ()
    apply_methods(config, methods, METHODS)
    return config

"""Tiny models of images: their config, their images, and what a refused command says."""

from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits

from libs.data.images import save_png

CONFIG = '''
from libs.defaults import base_config
from libs.methods import METHODS, apply_methods

UVIT = {{"name": "uvit", "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 4, "num_heads": 2}}
UNET = {{"name": "unet2d", "sample_size": 8, "in_channels": 1 + {channels}, "out_channels": 1, "layers_per_block": 1,
         "block_out_channels": (8, 16), "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "DownBlock2D"),
         "up_block_types": ("UpBlock2D", "UpBlock2D")}}

def get_config(methods=""):
    config = base_config()
    config.backbone = {network} | {{"concat_channels": {channels}}}
    config.schedule = {{"name": "squared_cosine", "steps": 64}}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="image", task="{task}", factor=2, drop=0.2)
    config.compute.update(rows=4, device="cpu")
    config.sampler.update(name="ddim", steps=2, grid="trailing", threshold="static")
    config.data.update(name="digits", path="", image_size=8, channels=1, flip=True)
    config.train.update(steps=4, batch_size=8, warmup=2, log_every=1, save_every=2, keep=9, preview_every=4,
                        preview_images=3, ema=0.5, lr=1e-3)
    config.eval.metrics = ("psnr",)
    apply_methods(config, methods, METHODS)
    return config
'''
TASKS = {"super_resolution": ("UNET", 1), "inpainting": ("UVIT", 2)}


def write_config(path, task="super_resolution", network="UNET", channels=1):
    path.write_text(CONFIG.format(task=task, network=network, channels=channels))
    return path


def save_digits(folder: Path) -> Path:
    """A folder of five digits."""
    for i, image in enumerate(load_digits().images[:5]):
        save_png(folder / f"{i}.png", np.round(image * (255 / 16)).astype(np.uint8)[:, :, None])
    return folder


def refused(run_main, main, *argv):
    ran = run_main(main, *argv)
    assert ran.status == 2, ran.stderr
    [line] = [line for line in ran.stderr.splitlines() if line.startswith("error")]
    return line

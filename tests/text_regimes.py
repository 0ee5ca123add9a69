"""The four regimes of U-ViT, tiny: pixels, latents with continuous and with discrete time, text to image."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_pipelines import autoencoder, clip_text_model, clip_tokenizer

from libs import config as config_files
from libs.data.feature_files import write_feature
from libs.data.images import save_png
from libs.text import TextEncoder

CPU = torch.device("cpu")
TOKENS = 9
CAPTIONS = [["a cat", "the cat"], ["a red dog"], ["the sea", "the red sea", "a photo of the sea"], ["a dog of the sea"]]
SHOWN = ["a photo of a cat", "the red sea"]

REGIMES = {
    "pixels": """
    config.backbone = uvit_backbone(32, 8, 16, 2, 2)
    config.schedule = {"name": "vp_linear"}
    config.data.update(name="folder", path="{root}/images")
    """,
    "continuous": """
    config.backbone = uvit_backbone(8, 2, 16, 2, 2, in_chans=4, num_classes=4)
    config.schedule = {"name": "vp_linear"}
    config.cond.update(kind="label", num_classes=3, null_label=3, drop=0.2)
    config.codec = {"name": "kl", "pretrained": "{root}/vae", "scale_factor": 0.18215}
    config.data.update(name="features", path="{root}/imagenet")
    config.sampler.cfg_scale = 1.4
    """,
    "discrete": """
    config.backbone = uvit_backbone(8, 2, 16, 2, 2, in_chans=4, num_classes=4, conv=False)
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.time_input = "step"
    config.cond.update(kind="label", num_classes=3, null_label=3, drop=0.1)
    config.codec = {"name": "kl", "pretrained": "{root}/vae", "scale_factor": 0.18215}
    config.data.update(name="features", path="{root}/imagenet")
    config.sampler.cfg_scale = 1.4
    """,
    "text": """
    config.backbone = uvit_backbone(8, 2, 16, 2, 2, in_chans=4, clip_dim=32, num_clip_token=9)
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.time_input = "step"
    config.cond.update(kind="text", drop=0.3, text_encoder="{root}/clip", tokens=9)
    config.codec = {"name": "kl", "pretrained": "{root}/vae", "scale_factor": 0.23010}
    config.data.update(name="features", path="{root}/coco", flip=False)
    config.sampler.update(name="dpm_solver_pp_singlestep", order=3, grid="uniform", t_end=1e-3, cfg_scale=2.0)
    """,
}
CONFIG = '''
from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods

def get_config(methods=""):
    config = base_config()
    config.compute.update(rows=3, device="cpu")
    config.data.update(image_size=32, channels=3)
    config.sampler.steps = 3
    config.train.update(batch_size=4, warmup=0, lr=1e-3, save_every=2, log_every=1, preview_every=0, keep=9)
    config.eval.update(reference="{root}/images", cost_images=2)
    {regime}
    apply_methods(config, methods, METHODS)
    return config
'''


def make_root(root: Path) -> Path:
    """Images, an autoencoder, a text encoder, features of both kinds, and a config for each regime."""
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        save_png(root / "images" / f"{i}.png", torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8,
                                                             generator=generator))
    autoencoder().save_pretrained(root / "vae")
    tokenizer = clip_tokenizer(root / "vocabulary")
    clip_text_model(tokenizer).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    encoder = TextEncoder(str(root / "clip"), TOKENS)
    for i in range(5):
        write_feature(root / "imagenet" / f"{i}.npy", moments(generator), i % 3)
    for i, captions in enumerate(CAPTIONS):
        write_feature(root / "coco" / "train" / f"{i}.npy", moments(generator))
        for k, context in enumerate(encoder(captions)):
            write_feature(root / "coco" / "train" / f"{i}_{k}.npy", context.numpy())
    write_feature(root / "coco" / "empty_context.npy", encoder.empty.numpy())
    for j, context in enumerate(encoder(SHOWN)):
        write_feature(root / "coco" / "run_vis" / f"{j}.npy", SHOWN[j], context.numpy())
    (root / "prompts.txt").write_text("\n".join(SHOWN))
    for name, regime in REGIMES.items():
        (root / f"{name}.py").write_text(CONFIG.replace("{regime}", regime.strip("\n ")).replace("{root}", str(root)))
    return root


def moments(generator):
    """(8, 8, 8): means of unit size, small variances."""
    return torch.cat([torch.randn(4, 8, 8, generator=generator), torch.full((4, 8, 8), -4.0)]).numpy()


def load(root, name="text", **fields):
    config = config_files.load(str(root / f"{name}.py"))
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def png(folder, seed):
    return np.asarray(Image.open(folder / f"{seed:06d}.png")).astype(int)

"""Tiny runs of progressive distillation, for the tests of stages."""

import distillate
import train
from libs import config as config_files
from libs.checkpoint import load_described
from libs.training.state import Checkpoints

TINY = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.patch_size=4",
        "--config.backbone.embed_dim=16", "--config.backbone.depth=2", "--config.backbone.num_heads=2")
SHORT = ("--config.train.steps=4", "--config.train.batch_size=8", "--config.train.log_every=1",
         "--config.train.save_every=2", "--config.train.preview_every=0")
DIGITS = "--config=configs/digits_uvit.py"
DISTIL = f"{DIGITS}:progressive"
ENDS = ("--config.distill.start_steps=16", "--config.distill.end_steps=4", "--config.distill.pair_images=2")
EPS = ("--config.denoiser.prediction=eps",)
ONE = ("--config.distill.start_steps=16", "--config.distill.end_steps=8", "--config.distill.convert_updates=4",
       "--config.distill.pair_images=2")
BASE = {"denoiser": {"prediction": "v"}, "schedule": {"name": "squared_cosine", "steps": 1024}}


def train_teacher(folder, *flags):
    assert train.main([DIGITS, *TINY, *SHORT, *flags, f"--workdir={folder}"]) == 0
    return folder


def distil(teacher, folder, *flags):
    assert distillate.main([DISTIL, *TINY, *SHORT, *flags, f"--checkpoint={teacher}", f"--workdir={folder}"]) == 0
    return folder


def config_of(methods="progressive", name="digits_uvit", **fields):
    config = config_files.load(f"configs/{name}.py:{methods}")
    for field, text in fields.items():
        config_files.override(config, f"distill.{field}", text)
    return config


def weights(folder, step=4):
    return Checkpoints(folder / "ckpts").load(step).weights


def averaged(folder, step=4):
    return load_described(Checkpoints(folder / "ckpts").path(step) / "backbone_ema.safetensors")


def description(folder, step=4):
    return averaged(folder, step)[1]

"""Tiny trainings of early exit, for its tests."""

import torch

import train
from libs import config as config_files
from libs.training.batches import Batch
from libs.training.state import Checkpoints

FLAGS = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.patch_size=4",
         "--config.backbone.embed_dim=16", "--config.backbone.depth=2", "--config.backbone.num_heads=2",
         "--config.sampler.steps=2", "--config.train.steps=5", "--config.train.batch_size=8", "--config.train.warmup=2",
         "--config.train.log_every=1", "--config.train.save_every=2", "--config.train.preview_every=0")
DIGITS = "--config=configs/digits_uvit.py"


def fit(workdir, *flags, method="early_exit"):
    """The weights after the command."""
    argv = [f"{DIGITS}:{method}" if method else DIGITS, *FLAGS, *flags, f"--workdir={workdir}"]
    assert train.main(argv) == 0
    return Checkpoints(workdir / "ckpts").load(5)


def config_with_flags(method="early_exit"):
    config = config_files.load(f"configs/digits_uvit.py:{method}")
    for flag in FLAGS:
        config_files.override(config, *flag.removeprefix("--config.").split("="))
    return config


def a_batch(rows=4):
    generator = torch.Generator().manual_seed(3)
    cond = {"y": torch.arange(rows) % 10}
    return Batch(torch.randn(rows, 1, 8, 8, generator=generator), cond, torch.arange(rows), seed=1, step=0)


def error_of(ran):
    assert (ran.status, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr
    [line] = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]
    return line

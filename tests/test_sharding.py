"""Sharded training, as `accelerate launch --use_fsdp` starts it: equal to one process, and resumed as any other."""

import json
import os

import pytest
import torch
from two_processes import run_in_two

import distillate
import train
from libs.training.state import Checkpoints

DIGITS = "--config=configs/digits_uvit.py"
TINY = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.patch_size=4",
        "--config.backbone.embed_dim=16", "--config.backbone.depth=2", "--config.backbone.num_heads=2",
        "--config.sampler.steps=2", "--config.train.steps=5", "--config.train.batch_size=8", "--config.train.warmup=2",
        "--config.train.log_every=1", "--config.train.save_every=2", "--config.train.preview_every=0")


def sharded(argv):
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    return train.main(argv)


def sharded_distillate(argv):
    os.environ.update(ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    return distillate.main(argv)


def losses_of(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "stats.jsonl").read_text().splitlines()]


def assert_close(one, two, step=5):
    assert losses_of(two) == pytest.approx(losses_of(one), abs=1e-4)
    one, two = (Checkpoints(folder / "ckpts").load(step) for folder in (one, two))
    for mine, theirs in ((one.weights, two.weights), (one.ema, two.ema)):
        assert mine.keys() == theirs.keys()
        for name, tensor in mine.items():
            torch.testing.assert_close(theirs[name], tensor, atol=1e-4, rtol=0)


def test_train(tmp_path):
    assert train.main([DIGITS, *TINY, f"--workdir={tmp_path / 'one'}"]) == 0
    run_in_two(sharded, [DIGITS, *TINY, f"--workdir={tmp_path / 'two'}", "--config.train.accumulate=2"])
    assert_close(tmp_path / "one", tmp_path / "two")

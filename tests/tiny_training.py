"""A training of a tiny network on the digits, and what it leaves behind."""

import json
import time

import torch

from libs import config as config_files
from libs.processes import Processes
from libs.training import Run, Trainer, diffusion_loss, load_training_data, new_network

CPU = torch.device("cpu")


def tiny_config(**train):
    """The digits' config with a network of a few thousand weights."""
    config = config_files.load("configs/digits_uvit.py")
    with config.unlocked():
        config.compute.update(device="cpu", rows=4)
        config.backbone.update(patch_size=4, embed_dim=16, depth=2, num_heads=2)
        config.sampler.steps = 2
        config.train.update(**{"steps": 6, "batch_size": 8, "warmup": 2, "log_every": 1, "save_every": 2, "keep": 9,
                               "preview_every": 0, "preview_images": 4, **train})
    return config


def tiny_trainer(config, workdir, objective=diffusion_loss, precision="fp32"):
    """(trainer, data), restored from what is in `workdir`."""
    run = Run(workdir, config, None, Processes(CPU))
    saved = run.resume()
    net, description = new_network(config)
    trainer = Trainer(config, run, net, description, objective, precision)
    trainer.restore(saved)
    return trainer, load_training_data(config.data, description, CPU)


def fit(config, workdir, objective=diffusion_loss, precision="fp32"):
    """(trainer, exit status) after the command has run once."""
    trainer, data = tiny_trainer(config, workdir, objective, precision)
    return trainer, trainer.train(data, time.monotonic())


def assert_equal_runs(one, other, step=6):
    """Weights, averages and optimizers of two runs are the same bits."""
    one, other = (run.checkpoints.load(step) for run in (one, other))
    for mine, theirs in ((one.weights, other.weights), (one.ema, other.ema)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    moments = [saved.state["optimizer"] for saved in (one, other)]
    assert moments[0].keys() == moments[1].keys() != set()
    for index, held in moments[0].items():
        assert held.keys() == {"step", "exp_avg", "exp_avg_sq"}
        assert all(torch.equal(held[name], moments[1][index][name]) for name in held)


def failing_at(step, action):
    """The plain loss, before which `action` is taken in the update after `step` others."""
    def objective(denoiser, batch):
        if batch.step == step:
            action()
        return diffusion_loss(denoiser, batch)

    return objective


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "stats.jsonl").read_text().splitlines()]

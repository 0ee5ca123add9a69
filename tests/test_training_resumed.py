"""A training that stops: it goes on as if it had not, in the folder of the same run alone."""

import json
import math
import os
import signal
import time

import pytest
import torch
from tiny_training import CPU, assert_equal_runs, failing_at, fit, rows_of, tiny_config, tiny_trainer

from libs.data import ImageData
from libs.errors import UserError
from libs.processes import Processes
from libs.training import Run, diffusion_loss
from libs.training.loop import StopSignals
from libs.training.report import Report
from libs.training.state import Checkpoints

# Stopping and going on


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    return fit(tiny_config(), tmp_path_factory.mktemp("uninterrupted"))[0].run


def crash():
    raise RuntimeError("killed")


def test_killed_run_goes_on_bit_for_bit(tmp_path, uninterrupted):
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_config(), tmp_path, failing_at(5, crash))
    assert Checkpoints(tmp_path / "ckpts").steps() == [2, 4]
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5]
    trainer, status = fit(tiny_config(), tmp_path)
    assert status == 0
    assert_equal_runs(trainer.run, uninterrupted)
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]  # step 5 was done twice, told once
    losses = [[row["loss"] for row in rows_of(folder)] for folder in (tmp_path, uninterrupted.workdir)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signal_ends_the_step_and_saves(tmp_path, uninterrupted, number):
    before = signal.getsignal(number)
    _, status = fit(tiny_config(), tmp_path, failing_at(2, lambda: os.kill(os.getpid(), number)))
    assert status == 130
    assert Checkpoints(tmp_path / "ckpts").steps() == [2, 3]
    assert signal.getsignal(number) is before
    trainer, status = fit(tiny_config(), tmp_path)
    assert status == 0
    assert_equal_runs(trainer.run, uninterrupted)


def test_second_signal_interrupts_at_once():
    with StopSignals() as signals:
        assert not signals.received
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


def test_time_limit(tmp_path, uninterrupted):
    trainer, data = tiny_trainer(tiny_config(max_minutes=1.0), tmp_path)
    assert trainer.train(data, time.monotonic() - 61) == 0
    assert Checkpoints(tmp_path / "ckpts").steps() == [1]
    trainer, status = fit(tiny_config(), tmp_path)
    assert status == 0
    assert_equal_runs(trainer.run, uninterrupted)


def test_damaged_checkpoint_is_passed_over(tmp_path, uninterrupted):
    fit(tiny_config(), tmp_path)
    checkpoints = Checkpoints(tmp_path / "ckpts", keep=9)
    for step, name in ((6, "backbone_ema.safetensors"), (4, "train_state.pt")):
        file = checkpoints.path(step) / name
        file.write_bytes(file.read_bytes()[:-40])
    trainer, data = tiny_trainer(tiny_config(), tmp_path)
    assert trainer.step == 2
    assert trainer.train(data, time.monotonic()) == 0
    assert_equal_runs(trainer.run, uninterrupted)
    assert sorted(path.name for path in checkpoints.folder.iterdir()) == [
        "00000002", "00000004", "00000006", "damaged-00000004", "damaged-00000006"]

    for step in checkpoints.steps():
        (checkpoints.path(step) / "train_state.pt").unlink()
    with pytest.raises(UserError, match="no checkpoint in .* can be read"):
        tiny_trainer(tiny_config(), tmp_path)
    assert checkpoints.steps() == [2, 4, 6]


def test_checkpoint_is_whole_or_absent(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path, keep=2)
    weights = {"w": torch.ones(2)}
    for step in (1, 2, 3):
        checkpoints.save(step, weights, weights, {"a": 1}, {"best": None})
    assert checkpoints.steps() == [2, 3]
    assert checkpoints.load(3).state == {"step": 3, "best": None}

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    for step in (3, 4):
        with pytest.raises(OSError, match="No space left"):
            checkpoints.save(step, weights, weights, {"a": 1}, {"best": None})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000002", "00000003"]
    assert checkpoints.load(3).step == 3
    assert Checkpoints(tmp_path / "none").newest() is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_loss_that_is_not_finite_stops_the_run(tmp_path, bad):
    def objective(denoiser, batch):
        losses = diffusion_loss(denoiser, batch)
        return losses * torch.where(batch.positions == 3 * 8 + 5, bad, 1.0) if batch.step == 3 else losses

    with pytest.raises(UserError, match=r"not finite at step 4; the last good checkpoint is .*/00000002"):
        fit(tiny_config(log_every=100, save_every=2), tmp_path, objective)
    assert Checkpoints(tmp_path / "ckpts").steps() == [2]
    assert all(tensor.isfinite().all() for tensor in Checkpoints(tmp_path / "ckpts").load(2).weights.values())


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    def objective(denoiser, batch):
        losses = diffusion_loss(denoiser, batch)
        if batch.step == 1:  # adds 0, with the gradient inf * 0
            losses = losses + (denoiser.net.norm.bias[0] * 0).abs().sqrt()
        return losses

    with pytest.raises(UserError, match="not finite at step 2; nothing was saved"):
        fit(tiny_config(log_every=100, save_every=2, clip_norm=0.0), tmp_path, objective)


# Which run a folder holds


def test_folder_of_another_run_is_refused(tmp_path):
    fit(tiny_config(steps=2), tmp_path)
    processes = Processes(CPU)

    def refuse(field, start=None, **changes):
        config = tiny_config(steps=2)
        config.update_from_flattened_dict(changes)
        with pytest.raises(UserError, match=field):
            Run(tmp_path, config, start, processes)

    refuse("--config.train.batch_size=16: the run in .* has 8; go on with that", **{"train.batch_size": 16})
    refuse("--config.seed=1: ", seed=1)
    refuse("--config.backbone.embed_dim=32: ", **{"backbone.embed_dim": 32})
    refuse("--config.data.name='cifar10': ", **{"data.name": "cifar10"})
    refuse("--config.train.lr=", **{"train.lr": 1.0})
    refuse("--checkpoint='digits_uvit': .* has ''", start="digits_uvit")

    config = tiny_config(steps=3, log_every=2, save_every=5, preview_every=7, eval_images=9, max_minutes=4.0, keep=3)
    config.compute.precision = "bf16"
    config.data.update(shard_cache="elsewhere", shard_cache_gb=1.0)
    assert Run(tmp_path, config, None, processes).resume().step == 2
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        Run(tmp_path, config, None, processes)


def test_a_run_from_before_a_field_goes_on_with_its_usual_value(tmp_path):
    config = tiny_config(steps=2)
    fit(config, tmp_path)
    held = json.loads((tmp_path / "config.json").read_text())
    del held["data"]["caption_key"]
    (tmp_path / "config.json").write_text(json.dumps(held))
    Run(tmp_path, config, None, Processes(CPU))
    config.data.caption_key = "other"
    with pytest.raises(UserError, match="--config.data.caption_key='other': the run in .* has 'caption'"):
        Run(tmp_path, config, None, Processes(CPU))


def test_data_that_changed_is_refused(tmp_path):
    fit(tiny_config(steps=2), tmp_path)
    trainer, data = tiny_trainer(tiny_config(steps=4), tmp_path)
    fewer = ImageData(data.images[:-1], data.labels[:-1])
    with pytest.raises(UserError, match="learns from 1797 images, the data set now has 1796"):
        trainer.train(fewer, time.monotonic())


def test_run_that_never_saved_is_no_obstacle(tmp_path):
    with pytest.raises(RuntimeError, match="killed"):
        fit(tiny_config(), tmp_path, failing_at(1, crash))
    _, status = fit(tiny_config(batch_size=4), tmp_path)
    assert status == 0
    assert [row["step"] for row in rows_of(tmp_path)] == [1, 2, 3, 4, 5, 6]
    assert json.loads((tmp_path / "config.json").read_text())["train"]["batch_size"] == 4


def test_report_drops_later_and_torn_rows(tmp_path):
    (tmp_path / "stats.jsonl").write_text('{"step": 1, "loss": 2}\n{"step": 2, "loss": 1}\n{"step": 3, "l')
    Report(tmp_path, 1).close()
    assert rows_of(tmp_path) == [{"step": 1, "loss": 2}]

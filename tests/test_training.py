"""Training: what a run leaves behind, and that it goes on as if it had not stopped."""

import json
import math
import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from tiny_training import CPU, assert_equal_runs, failing_at, fit, rows_of, tiny_config, tiny_trainer
from torch import nn

from libs.backbones.recompute import recompute_activations
from libs.codecs import PixelCodec
from libs.data import ImageData
from libs.errors import UserError
from libs.lora import AdaptersOff, add_lora
from libs.processes import Processes
from libs.training import Batches, Run, Trainer, diffusion_loss, load_training_data, new_network, validate
from libs.training import quality as training_quality
from libs.training.loop import StopSignals
from libs.training.report import Report
from libs.training.setup import choose_precision, start_network
from libs.training.state import Checkpoints

# A run


def test_training_lowers_the_loss_and_leaves_its_files(tmp_path):
    config = tiny_config(steps=60, lr=3e-3, log_every=10, save_every=25, keep=2, preview_every=30)
    trainer, status = fit(config, tmp_path)
    assert status == 0
    rows = rows_of(tmp_path)
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert rows[-1]["loss"] < 0.93 * rows[0]["loss"]
    assert rows[0].keys() == {"step", "loss", "lr", "grad_norm", "images_per_second", "seconds"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "ckpts", "config.json", "loss.png", "previews", "stats.jsonl", "tensorboard"]
    assert sorted(path.name for path in (tmp_path / "ckpts").iterdir()) == ["00000050", "00000060"]
    assert sorted(path.name for path in (tmp_path / "previews").iterdir()) == ["00000030.png", "00000060.png"]
    saved = trainer.run.checkpoints.load(60)
    assert not torch.equal(saved.weights["pos_embed"], saved.ema["pos_embed"])


def test_accumulation_gives_the_same_losses(tmp_path):
    fit(tiny_config(), tmp_path / "whole")
    fit(tiny_config(accumulate=4), tmp_path / "parts")
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("whole", "parts")]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


def test_logged_loss_is_the_mean_over_the_batch(tmp_path):
    config = tiny_config(steps=1, lr=1e-12)
    fit(config, tmp_path)
    trainer, data = tiny_trainer(tiny_config(steps=2, lr=1e-12), tmp_path / "other")
    [batch] = Batches(data, PixelCodec(), config.cond, False, 0, 8).parts(0)
    with torch.no_grad():
        expected = diffusion_loss(trainer.denoiser, batch).mean()
    assert rows_of(tmp_path)[0]["loss"] == pytest.approx(float(expected), rel=1e-5)


def test_recomputed_activations_change_nothing(tmp_path):
    one, _ = fit(tiny_config(), tmp_path / "kept")
    other, _ = fit(tiny_config(grad_checkpoint=True), tmp_path / "recomputed")
    assert all(block.use_checkpoint for block in other.net.block_list())
    assert not any(block.use_checkpoint for block in one.net.block_list())
    assert_equal_runs(one.run, other.run)
    with pytest.raises(UserError, match="grad_checkpoint=True: Linear has no such option"):
        recompute_activations(nn.Linear(1, 1))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_float32_weights(tmp_path, precision):
    seen = set()

    def objective(denoiser, batch):
        handle = denoiser.net.mid_block.mlp.fc1.register_forward_hook(lambda *call: seen.add(call[2].dtype))
        losses = diffusion_loss(denoiser, batch)
        handle.remove()
        return losses

    trainer, _ = fit(tiny_config(), tmp_path / "half", objective, precision)
    fit(tiny_config(), tmp_path / "full")
    assert seen == {torch.bfloat16 if precision == "bf16" else torch.float16}
    losses = [[row["loss"] for row in rows_of(tmp_path / name)] for name in ("half", "full")]
    assert losses[0] != losses[1]
    assert losses[0] == pytest.approx(losses[1], rel=0.02)
    saved = trainer.run.checkpoints.load(6)
    assert {tensor.dtype for tensor in (*saved.weights.values(), *saved.ema.values())} == {torch.float32}
    assert ("scale" in saved.state["scaler"]) == (precision == "fp16")


def test_gradient_is_clipped(tmp_path):
    norms = []
    for clip in (0.0, 0.01):
        trainer, _ = fit(tiny_config(steps=1, clip_norm=clip), tmp_path / str(clip))
        grads = torch.cat([parameter.grad.flatten() for parameter in trainer.parameters])
        norms.append(float(grads.norm()))
        assert rows_of(tmp_path / str(clip))[0]["grad_norm"] == pytest.approx(norms[0], rel=1e-4)
    assert norms[0] > 0.1
    assert norms[1] == pytest.approx(0.01, rel=1e-3)


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


# What learns beside the network, and what samples


class Beside:
    """The diffusion loss, and a module that learns beside the network by a loss whose gradient is infinite at `at`."""

    def __init__(self, at):
        self.modules, self.at = nn.Linear(1, 1), at

    def __call__(self, denoiser, batch):
        weight = self.modules.weight.sum()
        return diffusion_loss(denoiser, batch) + ((weight - weight.detach()).abs().sqrt() if batch.step == self.at
                                                  else weight)


def test_nothing_is_saved_after_what_learns_beside_the_network_has_failed(tmp_path):
    with pytest.raises(UserError, match="the loss is not finite at step 2; the last good checkpoint is .*00000001"):
        fit(tiny_config(save_every=1), tmp_path, Beside(1))
    assert Checkpoints(tmp_path / "ckpts").steps() == [1]


def test_a_policy_of_the_previews_leaves_training_alone(tmp_path):
    """Without an average too, where the network that learns could be the one that samples."""
    runs = []
    for policy in ({"name": "full"}, {"name": "encoder_propagation", "key_steps": "every:2", "parallel": False}):
        config = tiny_config(steps=2, preview_every=1, preview_images=1, ema=0.0)
        with config.unlocked():
            config.policy = policy
        runs.append(fit(config, tmp_path / policy["name"])[0].run)
    assert_equal_runs(*runs, step=2)


def test_a_lora_learns_on_a_network_that_drops_nothing(tmp_path):
    """With its LoRA off it is a teacher. Before and after a preview."""
    config = tiny_config()
    with config.unlocked():
        config.backbone = {"name": "ddpm_unet", "in_channels": 1, "channel": 8, "channel_multiplier": (1,),
                           "n_res_blocks": 1, "attn_strides": (), "num_classes": 11, "dropout": 0.5}
    net, description = new_network(config)
    add_lora(net, 2)
    trainer = Trainer(config, Run(tmp_path, config, None, Processes(CPU)), net, description, diffusion_loss)
    teacher, given = AdaptersOff(net), (torch.randn(2, 1, 8, 8), torch.full((2,), 500.0), torch.tensor([1, 2]))
    assert torch.equal(teacher(*given), teacher(*given))
    trainer.window = 0.0
    with trainer._aside():
        pass
    assert torch.equal(teacher(*given), teacher(*given))
    net.train()
    assert not torch.equal(teacher(*given), teacher(*given))


# Quality of the average


def test_best_average_is_kept(tmp_path, monkeypatch):
    values = iter([3.0, 1.0, 2.0])
    trainer, data = tiny_trainer(tiny_config(save_every=100), tmp_path)
    trainer.section = config_with = tiny_config(save_every=100, eval_every=2).train
    assert config_with.eval_every == 2
    trainer.quality = type("Quality", (), {"measure": lambda self: {"frechet_cifar10": next(values)}})()
    assert trainer.train(data, time.monotonic()) == 0
    measured = {row["step"]: row["frechet_cifar10"] for row in rows_of(tmp_path) if "frechet_cifar10" in row}
    assert measured == {2: 3.0, 4: 1.0, 6: 2.0}
    from libs.checkpoint import read

    _, description = read(tmp_path / "ckpts/best/backbone_ema.safetensors")
    assert description["quality"] == {"frechet_cifar10": 1.0}
    assert description["trained"]["steps"] == 4
    assert trainer.run.checkpoints.steps() == [6]
    assert trainer.run.checkpoints.load(6).state["best"] == 1.0


def test_a_measurement_that_cannot_be_made_ends_no_training(tmp_path, caplog):
    class Quality:
        def measure(self):
            raise UserError("no such images")

    trainer, data = tiny_trainer(tiny_config(save_every=100), tmp_path)
    trainer.section, trainer.quality = tiny_config(save_every=100, eval_every=4).train, Quality()
    assert trainer.train(data, time.monotonic()) == 0
    assert trainer.net.training
    assert trainer.run.checkpoints.steps() == [6]
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert told == [f"step {step}: no measurement (no such images); the training goes on" for step in (4, 6)]


def test_what_is_not_finite_ends_a_training_at_a_measurement(tmp_path):
    trainer, data = tiny_trainer(tiny_config(), tmp_path)
    trainer.section, trainer.quality = tiny_config(log_every=100, save_every=100, eval_every=4).train, object()
    trainer.failed_step.fill_(3)
    with pytest.raises(UserError, match="the loss is not finite at step 3; nothing was saved"):
        trainer.train(data, time.monotonic())


def test_processes_fail_together_at_a_measurement(monkeypatch):
    """One that went on alone would be waited for for ever."""
    monkeypatch.setattr(training_quality, "score_seeds", lambda *args, **options: None)
    processes, chain = Processes(CPU), SimpleNamespace(num_classes=0, rows=2)
    monkeypatch.setattr(processes, "agree", lambda failed: 1)
    with pytest.raises(UserError, match="another process cannot make its images"):
        training_quality.score(object(), chain, [0, 1], processes)


def test_missing_reference_is_told_before_the_first_step(tmp_path):
    config = tiny_config(eval_every=2)
    config.eval.update(metrics=("frechet_cifar10",), reference="nowhere.npz")
    with pytest.raises(UserError, match="frechet|features|reference"):
        tiny_trainer(config, tmp_path)
    assert list(tmp_path.iterdir()) == []


# Mistakes


@pytest.mark.parametrize(("field", "value", "text"), [
    ("train.steps", 0, "train.steps=0 must be at least 1"),
    ("train.log_every", 0, "train.log_every=0 must be at least 1"),
    ("train.ema", 1.0, "train.ema=1.0 is too large"),
    ("train.decay_from", 1.5, "train.decay_from=1.5 is too large"),
    ("train.lr", 0.0, "train.lr=0.0 must be positive"),
    ("train.betas", (0.9, 1.0), "train.betas="),
    ("cond.drop", 1.5, "cond.drop=1.5 must lie between 0 and 1"),
    ("seed", -1, "seed=-1 must be from 0"),
    ("train.eval_every", 5, "train.eval_every=5: eval.metrics names nothing"),
    ("train.accumulate", 3, r"train.batch_size=8 cannot be divided among 1 process x 3 \(train.accumulate\)"),
])
def test_bad_numbers(field, value, text):
    config = tiny_config()
    validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=text):
        validate(config)


def test_batch_that_processes_cannot_share():
    validate(tiny_config(), 4)
    with pytest.raises(UserError, match="train.batch_size=8 cannot be divided among 3 processes x 1"):
        validate(tiny_config(), 3)


@pytest.mark.parametrize(("changes", "text"), [
    ({"cond.num_classes": 9}, "cond.num_classes=9: the data set has labels up to 9"),
    ({"cond.null_label": -1}, "cond.drop=0.1: there is no cond.null_label"),
    ({"cond.kind": "text"}, r"cond.kind='text': this network takes no text tokens \(backbone.num_clip_token\)"),
    ({"cond.kind": "words"}, "cond.kind='words' is unknown; choose from none, label, text"),
])
def test_labels_that_do_not_fit(changes, text):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    _, description = new_network(config)
    with pytest.raises(UserError, match=text):
        load_training_data(config.data, description, CPU)


def test_network_that_does_not_fit():
    config = tiny_config()
    config.cond.kind = "none"
    with pytest.raises(UserError, match="cond.kind='none', but the network has classes"):
        start_network(config, None)
    _, description = new_network(tiny_config())
    with pytest.raises(UserError, match="data.image_size=16, data.channels=1: this network is for images of 8x8x1"):
        load_training_data(config.data.to_dict() | {"image_size": 16}, description, CPU)


def test_labels_that_are_missing(tmp_path):
    from libs.data.images import save_png

    save_png(tmp_path / "a.png", torch.zeros(8, 8, 1, dtype=torch.uint8))
    section = tiny_config().data.to_dict() | {"name": "folder", "path": str(tmp_path)}
    _, description = new_network(tiny_config())
    with pytest.raises(UserError, match="cond.kind='label': the data set 'folder' has no labels"):
        load_training_data(section, description, CPU)


def test_launcher_decides_the_precision(monkeypatch):
    config = tiny_config()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    config.compute.precision = "bf16"
    assert choose_precision(config) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision(config) == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert choose_precision(config) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="--mixed_precision='fp8' is unknown; choose from no, bf16, fp16"):
        choose_precision(config)
    config.compute.precision = "fp8"
    with pytest.raises(UserError, match="compute.precision='fp8'"):
        choose_precision(config)

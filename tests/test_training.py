"""Training: what a step is made from, what a run leaves behind, and that it goes on as if it had not stopped."""

import json
import math
import os
import signal
import time

import pytest
import torch
from torch import nn

from libs import config as config_files
from libs.codecs import KLCodec, PixelCodec
from libs.data import ImageData
from libs.errors import UserError
from libs.processes import Processes
from libs.training import Batches, Run, Trainer, diffusion_loss, load_training_data, new_network, validate
from libs.training.batches import Batch, DataOrder
from libs.training.ema import EMA
from libs.training.loop import StopSignals
from libs.training.optimizer import learning_rate, make_optimizer, parameter_groups
from libs.training.report import Report
from libs.training.setup import choose_precision, recompute_activations, start_network
from libs.training.state import Checkpoints

CPU = torch.device("cpu")
LABELLED = {"kind": "label", "num_classes": 10, "null_label": 10, "drop": 0.3}


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


# What a step is made from


def test_order_is_a_permutation_in_every_epoch():
    order = DataOrder(7, seed=3)
    sequence = order(torch.arange(21))
    epochs = sequence.view(3, 7)
    assert all(epoch.sort().values.tolist() == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    shuffled = torch.tensor([20, 3, 8, 0])
    assert torch.equal(DataOrder(7, seed=3)(shuffled), sequence[shuffled])  # no state
    assert not torch.equal(DataOrder(7, seed=4)(torch.arange(21)), sequence)


def digits_like(n=20, labels=True):
    images = torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8)
    return ImageData(images, torch.arange(n) % 10 if labels else None)


def joined(parts):
    return [torch.cat(each) for each in zip(*((part.x_0, part.cond["y"], part.noise(), part.uniform())
                                              for part in parts), strict=True)]


def test_batch_does_not_depend_on_how_it_is_cut():
    data = digits_like()
    whole = joined(Batches(data, PixelCodec(), LABELLED, True, 5, 12).parts(4))
    for count, accumulate in ((1, 3), (2, 1), (2, 3)):
        parts = [part for rank in range(count)
                 for part in Batches(data, PixelCodec(), LABELLED, True, 5, 12, accumulate, rank, count).parts(4)]
        assert len(parts) == count * accumulate
        assert all(torch.equal(one, other) for one, other in zip(joined(parts), whole, strict=True))
    for seed, step in ((6, 4), (5, 5)):
        other = joined(Batches(data, PixelCodec(), LABELLED, True, seed, 12).parts(step))
        assert not any(torch.equal(one, another) for one, another in zip(other, whole, strict=True))


def test_flips_and_dropped_labels_have_their_rates():
    images = torch.zeros(4, 8, 8, 1, dtype=torch.uint8)
    images[:, :, 0] = 255  # bright on the left
    data = ImageData(images, torch.arange(4))
    [batch] = Batches(data, PixelCodec(), LABELLED, True, 0, 2000).parts(0)
    mirrored = batch.x_0[:, 0, 0, 7] == 1
    assert torch.equal(batch.x_0[:, 0, 0, 0] == 1, ~mirrored)
    assert abs(mirrored.float().mean() - 0.5) < 0.04
    assert abs((batch.cond["y"] == 10).float().mean() - 0.3) < 0.04
    kept = batch.cond["y"] != 10
    assert torch.equal(batch.cond["y"][kept], DataOrder(4, 0)(batch.positions)[kept])

    [plain] = Batches(data, PixelCodec(), LABELLED | {"drop": 0.0}, False, 0, 1000).parts(0)
    assert (plain.x_0[:, 0, 0, 0] == 1).all()
    assert (plain.cond["y"] < 4).all()
    [unlabelled] = Batches(data, PixelCodec(), LABELLED | {"kind": "none"}, False, 0, 4).parts(0)
    assert unlabelled.cond is None


def test_draws_are_of_their_distributions_and_independent():
    batch = Batch(torch.zeros(2000, 1, 2, 2), None, torch.arange(2000), seed=1, step=0)
    noise, u = batch.noise(), batch.uniform()
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert (u.min() > 0) & (u.max() < 1)
    assert abs(u.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([noise[:, 0, 0, 0].double(), u]))[0, 1]) < 0.08


def test_codec_gets_noise_of_its_latents_only_if_it_takes_it():
    class Latents(PixelCodec):
        takes_noise = True

        def latent_shape(self, image_size, channels):
            return 3, image_size // 2, image_size // 2

        def encode(self, images, noise=None):
            return noise

    [batch] = Batches(digits_like(), Latents(), LABELLED, False, 0, 6).parts(0)
    assert batch.x_0.shape == (6, 3, 4, 4)
    assert len(batch.x_0.flatten().unique()) == batch.x_0.numel()
    assert not torch.equal(batch.x_0, batch.noise())  # a stream of its own
    assert (KLCodec.takes_noise, PixelCodec.takes_noise) == (True, False)


@pytest.mark.parametrize("steps", [None, 4])
def test_plain_loss_is_the_denoisers_at_uniform_times(steps):
    class Spy:
        schedule = type("Schedule", (), {"steps": steps})

        def loss(self, x_0, eps, t, cond):
            self.seen = x_0, eps, t, cond
            return x_0

    spy, batch = Spy(), Batch(torch.zeros(1000, 1, 2, 2), {"y": 3}, torch.arange(1000), seed=1, step=0)
    assert diffusion_loss(spy, batch) is batch.x_0
    _, eps, t, cond = spy.seen
    assert torch.equal(eps, batch.noise())
    assert cond == {"y": 3}
    assert t.dtype == torch.float64
    if steps is None:
        assert torch.equal(t, batch.uniform())
    else:
        values, counts = t.unique(return_counts=True)
        assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
        assert counts.min() > 200


def test_learning_rate():
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay_from=0.4) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:41] == [2.0] * 31
    assert rates[41:] == pytest.approx([2.0 * (100 - step) / 60 for step in range(41, 100)])
    assert {learning_rate(step, 100, 2.0) for step in range(100)} == {2.0}
    assert [learning_rate(step, 4, 1.0, decay_from=0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_what_decays():
    config = tiny_config(weight_decay=0.5, lr=0.1)
    net, _ = new_network(config)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decayed, free = ({names[id(each)] for each in group["params"]} for group in parameter_groups(net, 0.5))
    assert decayed | free == set(names.values())
    assert {"patch_embed.proj.weight", "label_emb.weight", "mid_block.mlp.fc1.weight"} < decayed
    assert {"pos_embed", "norm.weight", "mid_block.norm1.weight", "decoder_pred.bias"} < free
    net.norm.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(net, 0.5)) == len(names) - 1

    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    make_optimizer(net, config.train, CPU).step()  # of zero gradients: decay alone is left
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if name in decayed else 1.0))


def test_average_follows_weights_and_buffers():
    net = nn.BatchNorm1d(3)
    ema = EMA(net, 0.9)
    expected = torch.ones(3)
    for value in (2.0, 5.0):
        with torch.no_grad():
            net.weight.fill_(value)
            net.running_mean.fill_(value - 1)
            net.num_batches_tracked += 1
        ema.update()
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(ema.net.weight, expected)
    torch.testing.assert_close(ema.net.running_mean, expected - 1)
    assert int(ema.net.num_batches_tracked) == 2
    assert not ema.net.training
    assert not ema.net.weight.requires_grad

    copying = EMA(net, 0.0)
    with torch.no_grad():
        net.weight.normal_()
    copying.update()
    assert torch.equal(copying.net.weight, net.weight)


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
    assert Run(tmp_path, config, None, processes).resume().step == 2
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match="config.json cannot be read"):
        Run(tmp_path, config, None, processes)


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

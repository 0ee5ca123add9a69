"""Training: what a run leaves behind, what learns beside the network, and the quality of the average."""

import time
from types import SimpleNamespace

import pytest
import torch
from tiny_training import CPU, assert_equal_runs, fit, rows_of, tiny_config, tiny_trainer
from torch import nn

from libs.backbones.recompute import recompute_activations
from libs.codecs import PixelCodec
from libs.errors import UserError
from libs.lora import AdaptersOff, add_lora
from libs.processes import Processes
from libs.training import Batches, Run, Trainer, diffusion_loss, new_network
from libs.training import quality as training_quality
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

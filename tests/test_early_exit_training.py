"""train.py with the method early_exit: where it starts, what it leaves behind, and that it goes on."""

import json

import pytest
import torch
from early_exit_runs import DIGITS, FLAGS, config_with_flags, error_of, fit
from two_processes import run_in_two

import distillate
import train
from libs import config as config_files
from libs.backbones.uvit import UViT
from libs.build import load_chain
from libs.checkpoint import load_described, read
from libs.heads import UEMHeads
from libs.training import setup
from libs.training.early_exit import LayerwiseLoss
from libs.training.state import Checkpoints

HEADS = "lte_classifer."


def losses_of(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "stats.jsonl").read_text().splitlines()]


def assert_same(one, other):
    for mine, theirs in ((one.weights, other.weights), (one.ema, other.ema)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    moments = [each.state["optimizer"] for each in (one, other)]
    assert moments[0].keys() == moments[1].keys() != set()
    assert all(torch.equal(held[name], moments[1][index][name]) for index, held in moments[0].items() for name in held)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of the paper's preset, whose loss of an image is its own."""
    workdir = tmp_path_factory.mktemp("trained")
    fit(workdir, method="early_exit_paper")
    return workdir


def test_trains_heads_that_sample(trained):
    net, description = load_described(Checkpoints(trained / "ckpts").path(5) / "backbone_ema.safetensors")
    assert description["backbone"]["uem"] == net.lte_classifer.form == "paper"
    assert len(net.lte_classifer) == 3
    config = config_files.load("configs/digits_uvit.py:early_exit")
    with config.unlocked():
        config.compute.update(device="cpu", rows=2)
        config.backbone = description["backbone"]
        config.sampler.steps = 2
        config.policy.threshold = 0.3
    chain, _ = load_chain(config, str(trained), torch.device("cpu"))
    [(_, images)] = chain.images([0, 1], [3, 4])
    assert images.shape == (2, 8, 8, 1)
    assert chain.policy.stats()["layer_ratio"] < 1  # fresh heads say about 0.5


def test_killed_run_goes_on_bit_for_bit(tmp_path, trained, monkeypatch):
    whole = LayerwiseLoss.__call__

    def killed(loss, denoiser, batch):
        if batch.step == 3:
            raise RuntimeError("killed")
        return whole(loss, denoiser, batch)

    monkeypatch.setattr(LayerwiseLoss, "__call__", killed)
    with pytest.raises(RuntimeError, match="killed"):
        fit(tmp_path, method="early_exit_paper")
    monkeypatch.undo()
    assert Checkpoints(tmp_path / "ckpts").steps() == [2]
    assert_same(fit(tmp_path, method="early_exit_paper"), Checkpoints(trained / "ckpts").load(5))
    assert losses_of(tmp_path) == losses_of(trained)


def test_recomputed_activations_change_nothing(tmp_path, trained):
    other = fit(tmp_path, "--config.train.grad_checkpoint=True", method="early_exit_paper")
    assert_same(other, Checkpoints(trained / "ckpts").load(5))


def test_accumulation_gives_the_same_losses(tmp_path, trained):
    fit(tmp_path / "paper", "--config.train.accumulate=4", method="early_exit_paper")
    assert losses_of(tmp_path / "paper") == pytest.approx(losses_of(trained), abs=1e-5)
    fit(tmp_path / "code")  # whose weights of the layers are means over the rows at hand
    fit(tmp_path / "parts", "--config.train.accumulate=4")
    assert losses_of(tmp_path / "parts") == pytest.approx(losses_of(tmp_path / "code"), rel=1e-2)


def test_half_precision(tmp_path, trained):
    saved = fit(tmp_path, "--config.compute.precision=bf16", method="early_exit_paper")
    assert losses_of(tmp_path) != losses_of(trained)
    assert losses_of(tmp_path) == pytest.approx(losses_of(trained), rel=0.02)
    assert {tensor.dtype for tensor in saved.weights.values()} == {torch.float32}


def test_two_processes_equal_one(tmp_path, trained):
    run_in_two(train.main, [f"{DIGITS}:early_exit_paper", *FLAGS, "--config.train.accumulate=2",
                            f"--workdir={tmp_path}"])
    assert losses_of(tmp_path) == pytest.approx(losses_of(trained), abs=1e-4)
    one, two = (Checkpoints(folder / "ckpts").load(5) for folder in (trained, tmp_path))
    for name, tensor in one.ema.items():
        torch.testing.assert_close(two.ema[name], tensor, atol=1e-4, rtol=0)


# Where it starts


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without heads."""
    workdir = tmp_path_factory.mktemp("plain")
    fit(workdir, method="")
    return workdir


def test_uvits_file_leaves_the_heads_fresh(tmp_path, plain):
    path = tmp_path / "uvit.pth"
    published = Checkpoints(plain / "ckpts").load(5).ema
    torch.save(published, path)
    net, description = setup.start_network(config_with_flags(), str(path))
    fresh = fresh_heads()
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, fresh[name] if name.startswith(HEADS) else published[name]), name
    assert description["backbone"]["uem"] == "released"


def fresh_heads():
    torch.manual_seed(0)  # the config's
    return {f"{HEADS}{name}": each for name, each in UEMHeads(16, 16, 3).state_dict().items()}


def test_adadiffs_file_goes_on_with_its_heads(tmp_path, plain):
    heads = UViT(**{name: value for name, value in config_with_flags().backbone.items() if name != "name"})
    tensors = Checkpoints(plain / "ckpts").load(5).ema | {
        name: torch.randn_like(each) for name, each in heads.state_dict().items() if name.startswith(HEADS)}
    torch.save(tensors, tmp_path / "adadiff.pth")
    net, description = setup.start_network(config_with_flags(), str(tmp_path / "adadiff.pth"))
    assert all(torch.equal(each, tensors[name]) for name, each in net.state_dict().items())
    assert description["backbone"]["uem"] == "released"


def test_heads_of_the_other_form_are_refused(run_main, tmp_path, trained):
    ran = run_main(train.main, f"{DIGITS}:early_exit", *FLAGS, f"--checkpoint={trained}", f"--workdir={tmp_path}")
    assert error_of(ran) == "error: --config.backbone.uem=released: the checkpoint's heads are 'paper'"


def test_frozen_backbone(tmp_path, plain):
    saved = fit(tmp_path, f"--checkpoint={plain}", "--config.early_exit.freeze_backbone=True")
    before = Checkpoints(plain / "ckpts").load(5).ema
    for weights in (saved.weights, saved.ema):
        assert {name for name in weights if name not in before} == {
            f"{HEADS}{i}.lte.{part}" for i in range(3) for part in ("weight", "bias")}
        assert all(torch.equal(weights[name], each) for name, each in before.items())
    assert not any(torch.equal(saved.weights[name], each) for name, each in fresh_heads().items())


@pytest.mark.parametrize(("flags", "problem"), [
    (["--config.early_exit.target=gap"], "error: early_exit.target='gap' is unknown; choose from eps_error, final_gap"),
    (["--config.early_exit.beta_ual=-1"], "error: --config.early_exit.beta_ual=-1.0 must be a number of at least 0"),
    (["--config.early_exit.freeze_backbone=True", "--config.early_exit.lambda_u=0"],
     "error: --config.early_exit.lambda_u=0: with early_exit.freeze_backbone nothing is left to learn"),
    (["--config.backbone.uem=both"], "error: backbone: U-ViT: uem='both'; choose from released, paper"),
    (["--config=configs/cifar10_unet.py:early_exit"],
     "error: method early_exit: it leaves a U-ViT between two blocks; this config's backbone.name is 'unet2d'")])
def test_mistakes(run_main, tmp_path, flags, problem):
    argv = flags if flags[0].startswith("--config=") else [f"{DIGITS}:early_exit", *FLAGS, *flags]
    assert error_of(run_main(train.main, *argv, f"--workdir={tmp_path / 'run'}")) == problem
    assert not list(tmp_path.glob("run/*"))


def test_a_ratio_out_of_reach_of_a_previews_heads_ends_no_training(tmp_path, caplog):
    """Heads that have hardly learnt may not reach what they will."""
    fit(tmp_path, "--config.train.preview_every=2", "--config.policy.target_layer_ratio=0.01",
        "--config.policy.calibration_images=2")
    told = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    for step, line in zip((2, 4, 5), told, strict=True):
        assert line.startswith(f"step {step}: no preview (policy.target_layer_ratio=0.01: no threshold reaches it; ")
    assert not list(tmp_path.glob("previews/*"))


def test_other_trainings_leave_the_heads_out(tmp_path, trained, plain):
    """On several processes parameters without a gradient would stop them, and weight decay would eat them."""
    saved = fit(tmp_path, f"--checkpoint={trained}", method="")
    before = Checkpoints(plain / "ckpts").load(5).ema
    assert saved.weights.keys() == saved.ema.keys() == before.keys()
    description = read(Checkpoints(tmp_path / "ckpts").path(5) / "backbone_ema.safetensors")[1]
    assert not description["backbone"].get("uem")


def test_distillation_leaves_the_heads_out(tmp_path, trained):
    argv = [f"{DIGITS}:progressive", *FLAGS, "--config.sampler.steps=8", "--config.distill.pair_images=0",
            f"--checkpoint={trained}", f"--workdir={tmp_path}"]
    assert distillate.main(argv) == 0
    net, description = load_described(Checkpoints(tmp_path / "steps_0004/ckpts").path(5) / "backbone_ema.safetensors")
    assert (net.lte_classifer, description["backbone"]["uem"]) == (None, "")

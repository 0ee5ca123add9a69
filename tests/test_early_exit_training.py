"""train.py with the method early_exit: where it starts, what it leaves behind, and that it goes on."""

import copy
import json
from pathlib import Path

import pytest
import torch
from two_processes import run_in_two

import distillate
import train
from libs import config as config_files
from libs.backbones.uvit import UViT
from libs.build import load_chain, make_denoiser
from libs.checkpoint import load_described, read, save_backbone
from libs.denoiser import Denoiser
from libs.distillation.progressive import student_sampler
from libs.errors import UserError
from libs.heads import UEMHeads
from libs.schedule import make_schedule
from libs.training import early_exit_speed, setup
from libs.training.batches import Batch
from libs.training.early_exit import LayerwiseLoss
from libs.training.state import Checkpoints

ROOT = Path(train.__file__).parent
HEADS = "lte_classifer."


def a_batch(rows=4):
    generator = torch.Generator().manual_seed(3)
    cond = {"y": torch.arange(rows) % 10}
    return Batch(torch.randn(rows, 1, 8, 8, generator=generator), cond, torch.arange(rows), seed=1, step=0)


# A run

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


def losses_of(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "stats.jsonl").read_text().splitlines()]


def assert_same(one, other):
    for mine, theirs in ((one.weights, other.weights), (one.ema, other.ema)):
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[name], theirs[name]) for name in mine)
    moments = [each.state["optimizer"] for each in (one, other)]
    assert moments[0].keys() == moments[1].keys() != set()
    assert all(torch.equal(held[name], moments[1][index][name]) for index, held in moments[0].items() for name in held)


def error_of(ran):
    assert (ran.status, ran.stdout) == (2, "")
    assert "Traceback" not in ran.stderr
    [line] = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]
    return line


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


def config_with_flags(method="early_exit"):
    config = config_files.load(f"configs/digits_uvit.py:{method}")
    for flag in FLAGS:
        config_files.override(config, *flag.removeprefix("--config.").split("="))
    return config


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


def test_other_trainings_leave_the_heads_out(tmp_path, trained, plain):
    """On several processes parameters without a gradient would stop them, and weight decay would eat them."""
    saved = fit(tmp_path, f"--checkpoint={trained}", method="")
    before = Checkpoints(plain / "ckpts").load(5).ema
    assert saved.weights.keys() == saved.ema.keys() == before.keys()
    description = read(Checkpoints(tmp_path / "ckpts").path(5) / "backbone_ema.safetensors")[1]
    assert not description["backbone"].get("uem")


# Students of few steps


@pytest.fixture
def student(tmp_path):
    """The file of a student of 4 steps."""
    config = config_with_flags("progressive")
    net, description = setup.new_network(config)
    description["sampler"] = student_sampler(4, make_schedule(**description["schedule"]))
    description["distilled"] = {"cfg_scale": 1.0}
    path = tmp_path / "student.safetensors"
    save_backbone(path, net.state_dict(), json.loads(json.dumps(description)))
    return path


def test_student_stays_one(student):
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.learn_from = "start"
    net, description = setup.start_network(config, str(student), {"sampler.eta"})
    assert description["sampler"]["steps"] == config.sampler.steps == 4
    assert description["distilled"] == {"cfg_scale": 1.0}
    objective = setup.make_objective(config, net, description, "fp32", torch.device("cpu"))
    assert objective.lesson.times.tolist() == pytest.approx([1, 0.75, 0.5, 0.25], abs=1e-9)

    before, batch = copy.deepcopy(net), a_batch(32)
    denoiser = make_denoiser(net, description)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter += 0.1
    x_t, t, cond, target = objective.lesson(denoiser, batch)
    assert {*t.tolist()} == {*objective.lesson.times.tolist()}
    assert torch.equal(x_t, denoiser.diffuse(batch.x_0, batch.noise(), t))
    assert cond is batch.cond
    assert torch.equal(target, make_denoiser(before, description).output(x_t, t, cond))  # the student that it was
    assert not target.requires_grad


def test_student_with_a_scale_input_learns_at_all_scales(student):
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.learn_from = "start"
    net, description = setup.start_network(config, str(student))
    net.add_guidance_input()
    torch.nn.init.normal_(net.guidance_embedding.fc2.weight)
    description["cond"]["guidance"] = [1.0, 4.0]
    objective = setup.make_objective(config, net, description, "fp32", torch.device("cpu"))
    x_t, t, cond, target = objective.lesson(make_denoiser(net, description), a_batch(16))
    w = cond["guidance"]
    assert w.dtype == torch.float32
    assert 1 < w.min() < 2 < 3 < w.max() < 4
    assert torch.equal(target, make_denoiser(net, description).output(x_t, t, cond))


def test_models_of_many_steps_learn_from_their_start_at_all_times(plain):
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.learn_from = "start"
    net, description = setup.start_network(config, str(plain))
    assert "sampler" not in description
    lesson = setup.make_objective(config, net, description, "fp32", torch.device("cpu")).lesson
    assert (lesson.times, lesson.scales) == (None, None)
    assert len(lesson(make_denoiser(net, description), a_batch(8)).t.unique()) == 8
    with pytest.raises(UserError, match="learn_from=start: there is no --checkpoint from which to start"):
        setup.start_network(config, None)


def test_a_student_learns_to_say_the_same_in_other_terms(student):
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.update(learn_from="start", prediction="v")
    net, held = setup.start_network(config, str(student))
    held["denoiser"]["prediction"] = "eps_damped"
    objective = setup.make_objective(config, net, held, "fp32", torch.device("cpu"))
    description = setup.describe_trained(config, held)
    assert (held["denoiser"]["prediction"], description["denoiser"]["prediction"]) == ("eps_damped", "v")
    batch = a_batch(8)
    x_t, t, cond, target = objective.lesson(make_denoiser(net, description), batch)
    said = make_denoiser(net, held)(x_t, t, cond)
    again = Denoiser(lambda x, timesteps, **_: target, make_schedule(**held["schedule"]), "v")(x_t, t)
    torch.testing.assert_close(again.x_0, said.x_0.detach(), rtol=1e-4, atol=1e-4)
    config.early_exit.freeze_backbone = True
    with pytest.raises(UserError, match="early_exit.prediction=v: the checkpoint predicts eps_damped, and with early"):
        setup.describe_trained(config, held)
    config.early_exit.update(freeze_backbone=False, prediction="w")
    with pytest.raises(UserError, match="early_exit.prediction='w' is unknown; choose from eps, eps_damped,"):
        setup.describe_trained(config, held)


def test_a_model_of_eps_teaches_damped(plain):
    """Else x_0 at high noise, 150 times the error of eps, would be in the target of v."""
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.update(learn_from="start", prediction="v")
    net, held = setup.start_network(config, str(plain))
    held["denoiser"]["prediction"] = "eps"
    lesson = setup.make_objective(config, net, held, "fp32", torch.device("cpu")).lesson
    assert (lesson.teacher.prediction, lesson.times) == ("eps_damped", None)
    config.early_exit.prediction = "eps"
    assert setup.make_objective(config, net, held, "fp32", torch.device("cpu")).lesson.teacher.prediction == "eps"


def test_data_would_unteach_a_student(student):
    with pytest.raises(UserError, match="learn_from=data: the checkpoint is a student of 4 steps, .*; use start"):
        setup.start_network(config_with_flags(), str(student))
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.learn_from = "teacher"
    net, description = setup.start_network(config, str(student))
    with pytest.raises(UserError, match=r"learn_from \(data, start, or a checkpoint\)='teacher' is not there"):
        setup.make_objective(config, net, description, "fp32", torch.device("cpu"))


def test_two_trainings_by_command_the_second_of_which_keeps_the_teacher(student, tmp_path):
    fit(tmp_path / "one", f"--checkpoint={student}", "--config.early_exit.learn_from=start",
        "--config.early_exit.prediction=x_0")
    fit(tmp_path / "two", f"--checkpoint={tmp_path / 'one'}", f"--config.early_exit.learn_from={student}")
    for name in ("one", "two"):
        _, description = load_described(Checkpoints(tmp_path / name / "ckpts").path(5) / "backbone_ema.safetensors")
        assert (description["denoiser"]["prediction"], description["sampler"]["steps"]) == ("x_0", 4)


def test_a_training_goes_on_learning_from_what_it_started_from(student, plain, tmp_path):
    """What the checkpoint says by now is not the target."""
    net, description = load_described(student)
    for parameter in net.parameters():
        parameter.data += 0.1
    save_backbone(tmp_path / "moved.safetensors", net.state_dict(), description)
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.learn_from = str(student)
    net, held = setup.start_network(config, str(tmp_path / "moved.safetensors"))
    objective = setup.make_objective(config, net, held, "fp32", torch.device("cpu"))
    x_t, t, cond, target = objective.lesson(make_denoiser(net, held), a_batch(8))
    assert {*t.tolist()} <= {1, 0.75, 0.5, 0.25}
    with torch.no_grad():
        assert torch.equal(target, make_denoiser(*load_described(student)).output(x_t, t, cond))
        assert not torch.allclose(target, make_denoiser(net, held).output(x_t, t, cond))
    config.early_exit.learn_from = str(plain)
    with pytest.raises(UserError, match="learn_from=.*: its sampler is None, and the checkpoint's {.*; learn from"):
        setup.make_objective(config, net, held, "fp32", torch.device("cpu"))


def test_speed_reports_both_ratios(run_main, tmp_path):
    tiny = [flag for flag in FLAGS if "backbone" in flag]
    ran = run_main(early_exit_speed.main, DIGITS, *tiny, "--config.compute.device=cpu", "--batch_size=4",
                   "--repeats=2", f"--out={tmp_path / 'speed.json'}")
    assert ran.status == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result == json.loads((tmp_path / "speed.json").read_text())
    assert result["goals"] == {"time_ratio": 1.35, "memory_ratio": 1.1}
    assert result["met"] == {name: result[name] <= most for name, most in result["goals"].items()}
    assert result["command"].startswith("python -m libs.training.early_exit_speed --config=configs/digits_uvit.py "
                                        "--config.backbone.depth=2 ")
    assert result["machine"]
    held = result | {"memory_ratio": 1.2, "met": {"time_ratio": True, "memory_ratio": False}}
    rows = early_exit_speed.table(held).splitlines()[2:]
    assert [row.split(" | ")[3:] for row in rows] == [
        [f"{result['time_ratio']:.3f}", "<= 1.35", "yes |"], ["1.200", "<= 1.1", "no |"]]
    assert result["peak_memory_mib"].keys() == result["seconds"].keys() == {"plain", "early_exit"}
    assert "must end in .json" in error_of(run_main(early_exit_speed.main, DIGITS, "--out=x.txt"))


@pytest.mark.parametrize("depth", [2, 4, 10])
def test_the_output_head_and_the_uncertainty_heads_run_batched(depth):
    """Four layers at a time."""
    net = UViT(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=depth, num_heads=2, uem="released")
    calls = []
    net.decoder_pred.register_forward_hook(lambda _, given, out: calls.append(given[0].shape[0]))
    net.lte_classifer.register_forward_hook(lambda _, given, out: calls.append(given[0].shape[0]))
    net(torch.randn(3, 1, 8, 8), torch.ones(3), every_layer=True)
    groups = [min(4, depth + 1 - first) for first in range(0, depth + 1, 4)]
    assert calls == [size for group in groups for size in (group, group)]


def test_a_step_of_the_layerwise_loss_takes_little_more_memory():
    """Deep and narrow, so that it shows where the backward pass keeps what is batched: that would be 1.11."""
    config = config_with_flags()
    with config.unlocked():
        config.backbone.update(embed_dim=64, depth=12, num_heads=2, patch_size=1)
    found = early_exit_speed.measure(config, batch_size=32, repeats=1, device=torch.device("cpu"))
    assert 1 < found["memory_ratio"] < 1.06


@pytest.mark.parametrize("power", [0.0, 0.5, 1.0])
def test_errors_at_high_noise_count_more(power):
    """An error of eps is one of alpha / sigma times the size in x_0: p = 1 counts the larger of the two."""
    batch = a_batch()

    class OneLayer:
        """Errs by 0.1 everywhere, and is certain of all."""

        def __call__(self, x, timesteps, y, every_layer):
            return (batch.noise() + 0.1)[None], torch.ones(1, len(x), 1, 8, 8)

    denoiser = make_denoiser(OneLayer(), {"schedule": {"name": "vp_linear"},
                                          "denoiser": {"prediction": "eps", "time_input": "999t"}})
    loss = LayerwiseLoss(lambda_u=0.0, beta_ual=0.0, noise_power=power)(denoiser, batch)
    t = batch.uniform()
    alpha, sigma = denoiser.schedule.alpha(t), denoiser.schedule.sigma(t)
    larger = torch.maximum(torch.ones_like(t), sigma / alpha)
    assert set((larger > 1).tolist()) == {True, False}
    torch.testing.assert_close(loss.double(), 0.01 * larger ** (2 * power), rtol=1e-4, atol=0)


def test_distillation_leaves_the_heads_out(tmp_path, trained):
    argv = [f"{DIGITS}:progressive", *FLAGS, "--config.sampler.steps=8", "--config.distill.pair_images=0",
            f"--checkpoint={trained}", f"--workdir={tmp_path}"]
    assert distillate.main(argv) == 0
    net, description = load_described(Checkpoints(tmp_path / "steps_0004/ckpts").path(5) / "backbone_ema.safetensors")
    assert (net.lte_classifer, description["backbone"]["uem"]) == (None, "")

"""What a training of early exit learns from: data, its start, or another checkpoint; and in which terms it predicts."""

import copy
import json
import math

import pytest
import torch
from early_exit_runs import a_batch, config_with_flags, fit

from libs.build import make_denoiser
from libs.checkpoint import load_described, save_backbone
from libs.denoiser import Denoiser
from libs.distillation.progressive import student_sampler
from libs.errors import UserError
from libs.schedule import make_schedule
from libs.training import setup
from libs.training.state import Checkpoints


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """A run without heads."""
    workdir = tmp_path_factory.mktemp("plain")
    fit(workdir, method="")
    return workdir


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


def test_a_student_is_asked_more_often_where_its_steps_go_far(student):
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.learn_from = "start"
    net, description = setup.start_network(config, str(student))

    def lesson(power):
        with config.unlocked():
            config.early_exit.angle_power = power
        return setup.make_objective(config, net, description, "fp32", torch.device("cpu")).lesson

    schedule = make_schedule(**description["schedule"])
    angles = [math.acos(float(schedule.alpha(torch.tensor(t)))) for t in (1.0, 0.75, 0.5, 0.25, 0.0)]
    steps = [t - s for t, s in zip(angles, angles[1:], strict=False)]
    assert lesson(0.0).shares().tolist() == pytest.approx([0.25] * 4)
    assert lesson(1.0).shares().tolist() == pytest.approx([step / angles[0] for step in steps], abs=1e-6)
    roots = [math.sqrt(step) for step in steps]
    assert lesson(0.5).shares().tolist() == pytest.approx([root / sum(roots) for root in roots], abs=1e-6)
    drawn = lesson(1.0)(make_denoiser(net, description), a_batch(2000)).t
    for time, step in zip((1.0, 0.75, 0.5, 0.25), steps, strict=True):
        assert float((drawn == time).double().mean()) == pytest.approx(step / angles[0], abs=0.04)
    with pytest.raises(UserError, match="--config.early_exit.angle_power=-1.0 must be a number of at least 0"):
        lesson(-1.0)


def test_all_times_have_no_angles(plain):
    config = config_with_flags()
    with config.unlocked():
        config.early_exit.angle_power = 0.5
    with pytest.raises(UserError, match="angle_power=0.5: for a student of few steps, which learns from what it said"):
        setup.make_objective(config)
    with config.unlocked():
        config.early_exit.learn_from = "start"
    net, description = setup.start_network(config, str(plain))
    with pytest.raises(UserError, match="angle_power=0.5: the checkpoint is no student of few steps, and learns"):
        setup.make_objective(config, net, description, "fp32", torch.device("cpu"))


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

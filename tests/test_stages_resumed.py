"""Progressive distillation that was stopped goes on, and is not mixed with another plan, teacher or setting."""

import json
import shutil

import pytest
import torch
from staged_runs import DIGITS, DISTIL, ENDS, EPS, ONE, SHORT, TINY, distil, train_teacher, weights

import distillate
import sample
import train
from libs.distillation import student as student_module
from libs.distillation.progressive import Halving
from libs.distillation.stage_report import StageReport
from libs.training import diffusion_loss
from libs.training.state import Checkpoints


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def students(teacher, tmp_path_factory):
    return distil(teacher, tmp_path_factory.mktemp("students"), *ENDS)


@pytest.fixture(scope="module")
def eps_teacher(tmp_path_factory):
    """U-ViT's own kind of model."""
    return train_teacher(tmp_path_factory.mktemp("eps_teacher"), *EPS)


@pytest.fixture(scope="module")
def eps_students(eps_teacher, tmp_path_factory):
    return distil(eps_teacher, tmp_path_factory.mktemp("eps_students"), *ONE)


def test_killed_while_it_reports_a_student_is_finished(teacher, tmp_path, run_main, monkeypatch):
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}")

    def add(self, name, taught, student):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(StageReport, "add", add)
        assert run_main(distillate.main, *argv).status == 130
    told = [(each["done"], each["finished"]) for each in json.loads((tmp_path / "stages.json").read_text())["stages"]]
    assert told == [(4, True), (0, False)]
    ran = run_main(sample.main, DIGITS, *TINY, f"--checkpoint={tmp_path}", "--seeds=0-1", f"--out={tmp_path}/images")
    assert ran.status == 0, ran.stderr
    assert json.loads((tmp_path / "images/summary.json").read_text())["nfe"] == 8


def test_killed_stage_0_goes_on_bit_for_bit(eps_teacher, eps_students, tmp_path, run_main, monkeypatch):
    argv = (DISTIL, *TINY, *SHORT, *ONE, f"--checkpoint={eps_teacher}", f"--workdir={tmp_path}")

    def loss(learner, batch):
        if batch.step == 3:
            raise KeyboardInterrupt
        return diffusion_loss(learner, batch)

    with monkeypatch.context() as patch:
        patch.setattr(student_module, "diffusion_loss", loss)
        assert run_main(distillate.main, *argv).status == 130
    assert Checkpoints(tmp_path / "convert/ckpts").steps() == [2]
    ran = run_main(distillate.main, *argv)
    assert ran.status == 0, ran.stderr
    assert "going on from step 2" in ran.stderr
    for name in ("convert", "steps_0008"):
        one, other = (weights(folder / name) for folder in (eps_students, tmp_path))
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_killed_run_goes_on_bit_for_bit(teacher, students, tmp_path, run_main, monkeypatch):
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}")
    with monkeypatch.context() as patch:
        def loss(self, learner, batch):
            if (self.steps, batch.step) == (4, 3):
                raise KeyboardInterrupt
            return plain(self, learner, batch)

        plain = Halving.__call__
        patch.setattr(Halving, "__call__", loss)
        assert run_main(distillate.main, *argv).status == 130
    half = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [(each["done"], each["finished"]) for each in half][0] == (4, True)
    ran = run_main(distillate.main, *argv)
    assert ran.status == 0
    assert "going on from step 2" in ran.stderr
    assert "steps_0008: 4 updates" not in ran.stderr  # that stage is not trained again
    for steps in (8, 4):
        one, other = (Checkpoints(folder / f"steps_{steps:04d}" / "ckpts").load(4) for folder in (students, tmp_path))
        assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
        for index, held in one.state["optimizer"].items():
            assert all(torch.equal(held[name], other.state["optimizer"][index][name]) for name in held)


def test_time_limit_counts_over_all_stages(teacher, tmp_path, run_main):
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}")
    ran = run_main(distillate.main, *argv, "--config.train.max_minutes=1e-9")
    assert ran.status == 0
    assert "the same command goes on" in ran.stderr
    assert not (tmp_path / "steps_0004").exists()
    ran = run_main(sample.main, DIGITS, *TINY, f"--checkpoint={tmp_path}", f"--out={tmp_path}/images")
    assert ran.status == 2
    assert f"no student there is finished yet; a stage that is under way can be named itself: {tmp_path}/steps_0008, " \
        in ran.stderr
    assert run_main(distillate.main, *argv).status == 0


def test_student_becomes_a_teacher(students, tmp_path, run_main):
    argv = (DISTIL, *TINY, *SHORT, f"--checkpoint={students}", f"--workdir={tmp_path}", "--config.distill.updates=1")
    ran = run_main(distillate.main, *argv, "--config.distill.start_steps=8")
    assert (ran.status, ran.stderr) == (2, "error: --config.distill.start_steps=8: the teacher was itself distilled, "
                                           "to 4 steps; start there\n")
    assert run_main(distillate.main, *argv).status == 0
    assert [each.name for each in tmp_path.glob("steps_*")] == ["steps_0002"]


def test_more_stages_go_on_from_the_last(teacher, students, tmp_path, run_main):
    for end, seen in ((8, ["steps_0008"]), (4, ["steps_0004"])):
        ran = run_main(distillate.main, DISTIL, *TINY, *SHORT, "--config.distill.start_steps=16",
                       f"--config.distill.end_steps={end}", f"--checkpoint={teacher}", f"--workdir={tmp_path}")
        assert ran.status == 0
        assert all(f"{name}: 4 updates" in ran.stderr for name in seen)
    one, other = (weights(folder / "steps_0004") for folder in (students, tmp_path))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_students_of_what_a_teacher_was_are_refused(teacher, students, tmp_path, run_main):
    """A stage that is trained on is no longer what the next one learned from."""
    run, last = tmp_path / "run", tmp_path / "run/steps_0004"
    shutil.copytree(students, run)
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={run}")
    longer = (*argv, "--config.distill.updates=6,4")
    ran = run_main(distillate.main, *longer)
    assert (ran.status, f"--config.distill.updates=6: {last} learned from steps_0008 after 4 updates; remove that" in
            ran.stderr) == (2, True), ran.stderr
    assert Checkpoints(run / "steps_0008/ckpts").steps() == [2, 4]  # nothing was trained
    shutil.rmtree(last)
    assert run_main(distillate.main, *longer).status == 0
    assert not torch.equal(weights(last)["pos_embed"], weights(students / "steps_0004")["pos_embed"])
    pair = (run / "pairs/steps_0004.png").read_bytes()
    assert pair != (students / "pairs/steps_0004.png").read_bytes()

    shutil.rmtree(last)
    shutil.copytree(students / "steps_0004", last)  # of the shorter stage
    ran = run_main(distillate.main, *longer)
    assert (ran.status, f"{last} learned from other weights than steps_0008 has now; remove that folder" in
            ran.stderr) == (2, True), ran.stderr
    held = json.loads((last / "config.json").read_text())
    assert held.pop("start_weights")
    (last / "config.json").write_text(json.dumps(held))  # as before digests were kept: it cannot tell
    assert run_main(distillate.main, *longer).status == 0


def test_other_settings_are_refused_in_a_run_that_began(students, teacher, run_main):
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={students}")
    ran = run_main(distillate.main, *argv, "--config.distill.weighting=snr")
    assert ran.status == 2
    assert "--config.distill.weighting='snr': the run in" in ran.stderr


@pytest.mark.parametrize(("flags", "message"), [
    (["start_steps=32"], "start_steps=32: {run}/steps_0008 learned from {teacher}, not from steps_0016"),
    (["start_steps=8", "end_steps=2"], "start_steps=8: {run}/steps_0004 learned from steps_0008, not from {teacher}"),
    (["start_steps=48", "end_steps=3"], "start_steps=48: {run}/steps_0004 is a stage of the run there, and none of"),
    (["start_steps=0", "stages=3"], "stages=3: {run}/steps_0008 learned from {teacher}, not from steps_0016"),
    (["prediction=x_0"], "prediction=x_0: {run}/steps_0008 learned from {teacher}, not from convert"),
])
def test_another_plan_is_refused_in_a_run_that_began(students, teacher, run_main, flags, message):
    ran = run_main(distillate.main, DISTIL, *TINY, *SHORT, *ENDS, *(f"--config.distill.{flag}" for flag in flags),
                   f"--checkpoint={teacher}", f"--workdir={students}")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.startswith(f"error: --config.distill.{message.format(run=students, teacher=teacher)}"), ran.stderr
    assert sorted(path.parent.name for path in students.glob("*/ckpts")) == ["steps_0004", "steps_0008"]


def test_another_teacher_is_refused_in_a_run_that_began(students, eps_teacher, eps_students, run_main):
    for argv, message in (
            ((*ENDS, f"--checkpoint={eps_teacher}", f"--workdir={students}"),
             f"--checkpoint={eps_teacher}: {students}/steps_0008 learned from"),
            ((*ONE, "--config.distill.prediction=eps", f"--checkpoint={eps_teacher}", f"--workdir={eps_students}"),
             f"--config.distill.prediction=eps: {eps_students}/convert is a stage of the run there")):
        ran = run_main(distillate.main, DISTIL, *TINY, *SHORT, *argv)
        assert (ran.status, ran.stderr.startswith(f"error: {message}")) == (2, True), ran.stderr


def test_a_training_and_its_students_do_not_share_a_folder(teacher, students, run_main):
    """--checkpoint=FOLDER would be either of them."""
    ran = run_main(distillate.main, DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={teacher}")
    assert (ran.status, ran.stderr) == (
        2, f"error: --workdir={teacher} is the folder of a training; choose another one for its students\n")
    ran = run_main(train.main, DIGITS, *TINY, *SHORT, f"--workdir={students}")
    assert (ran.status, ran.stderr) == (
        2, f"error: --workdir={students} holds the stages of a distillation (stages.json); choose another folder\n")
    assert not (teacher / "stages.json").exists()
    assert not (students / "ckpts").exists()


@pytest.mark.parametrize("field", ["lr=1e-3,2e-3", "ema=0.9"])
def test_the_flag_of_a_stage_is_named(students, teacher, run_main, field):
    ran = run_main(distillate.main, DISTIL, *TINY, *SHORT, *ENDS, f"--config.distill.{field}",
                   f"--checkpoint={teacher}", f"--workdir={students}")
    assert ran.status == 2
    assert ran.stderr.startswith(f"error: --config.distill.{field.partition('=')[0]}="), ran.stderr

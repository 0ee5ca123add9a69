"""Progressive distillation in stages, through distillate.py."""

import json

import pytest
import torch
from staged_runs import (
    BASE,
    DIGITS,
    DISTIL,
    ENDS,
    EPS,
    ONE,
    SHORT,
    TINY,
    averaged,
    description,
    distil,
    train_teacher,
    weights,
)
from torch._dynamo.utils import counters
from two_processes import run_in_two

import distillate
import sample
import train
from libs import config as config_files
from libs.build import load_model
from libs.distillation.student import hold, legacy_labels
from libs.errors import UserError
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


def test_one_command_for_all_stages(teacher, students, tmp_path, run_main):
    manifest = json.loads((students / "stages.json").read_text())
    assert manifest["start"] == str(teacher)
    assert [(each["name"], each["steps"], each["updates"], each["done"], each["finished"])
            for each in manifest["stages"]] == [("steps_0008", 8, 4, 4, True), ("steps_0004", 4, 4, 4, True)]
    taught = description(teacher)
    for steps in (8, 4):
        held = description(students / f"steps_{steps:04d}")
        assert held["sampler"] == {"name": "ddim", "steps": steps, "grid": "trailing", "eta": 0.0, "t_start": 1.0,
                                   "t_end": 0.0}
        assert all(held[name] == taught[name] for name in ("backbone", "schedule", "denoiser", "cond", "codec"))
    # sample.py needs no flag but the checkpoint: the last student, or the one that is named
    for folder, nfe in ((students, 4), (students / "steps_0008", 8)):
        out = tmp_path / str(nfe)
        ran = run_main(sample.main, DIGITS, *TINY, f"--checkpoint={folder}", "--seeds=0-1", f"--out={out}")
        assert ran.status == 0
        assert json.loads((out / "summary.json").read_text())["nfe"] == nfe
    assert "finished: students of 8, 4 steps" in run_main(
        distillate.main, DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={students}").stderr


@pytest.mark.parametrize(("methods", "sampler", "steps"), [
    ("", "ddim", 4), (":dpm_solver_pp", "dpm_solver_pp", 4), (":clipped", "clipped", 4)])
def test_a_sampler_that_the_user_names_wins_over_the_students(students, tmp_path, run_main, methods, sampler, steps):
    ran = run_main(sample.main, DIGITS + methods, *TINY, f"--checkpoint={students}", "--seeds=0-1", f"--out={tmp_path}")
    assert ran.status == 0, ran.stderr
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert (summary["sampler"], summary["nfe"]) == (sampler, steps)


@pytest.mark.parametrize(("flags", "warns"), [
    ([], False), (["--config.sampler.steps=2"], True), (["--config.sampler.steps=3"], True),
    (["--config.sampler.name=dpm_solver_pp", "--config.sampler.grid=logsnr", "--config.sampler.t_end=1e-3"], True)])
def test_a_student_is_not_quietly_asked_for_what_it_did_not_learn(students, tmp_path, run_main, flags, warns):
    ran = run_main(sample.main, DIGITS, *TINY, *flags, f"--checkpoint={students}", "--seeds=0", f"--out={tmp_path}")
    assert ran.status == 0, ran.stderr
    assert ("this checkpoint is a student of 4 steps of ddim; " in ran.stderr) == warns


def test_each_student_starts_from_its_teacher(teacher, tmp_path, run_main):
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}",
            "--config.distill.lr=1e-12", "--config.distill.updates=1")
    assert run_main(distillate.main, *argv).status == 0
    taught = Checkpoints(teacher / "ckpts").load(4).ema
    for steps in (8, 4):
        learnt = weights(tmp_path / f"steps_{steps:04d}", 1)
        assert all(torch.allclose(learnt[name], tensor, atol=1e-9, rtol=0) for name, tensor in taught.items())


def test_the_papers_schedule(tmp_path, run_main):
    """Continuous time and log SNR, on which a model is trained, distilled and sampled."""
    base, run, out = (tmp_path / name for name in ("base", "run", "out"))
    assert run_main(train.main, f"{DIGITS}:cosine", *TINY, *SHORT, f"--workdir={base}").status == 0
    ran = run_main(distillate.main, f"{DIGITS}:cosine,paper", *TINY, *SHORT, *ONE, f"--checkpoint={base}",
                   f"--workdir={run}")
    assert ran.status == 0, ran.stderr
    for folder in (base, run / "steps_0008"):
        assert description(folder)["schedule"] == {"name": "cosine"}
        assert description(folder)["denoiser"] == {"prediction": "v", "time_input": "logsnr"}
    assert description(run / "steps_0008")["sampler"]["grid"] == "uniform"
    ran = run_main(sample.main, f"{DIGITS}:cosine", *TINY, f"--checkpoint={run}", "--seeds=0-1", f"--out={out}")
    assert ran.status == 0, ran.stderr
    assert json.loads((out / "summary.json").read_text())["nfe"] == 8


def test_compiled_networks_learn_what_eager_ones_do(eps_teacher, eps_students, tmp_path, run_main, monkeypatch,
                                                    fresh_compiler):
    """In stage 0, and the teacher and the student of a halving."""
    compiled, nets = torch.compile, []
    monkeypatch.setattr(torch, "compile", lambda net, **options: nets.append(net) or compiled(net, backend="aot_eager"))
    ran = run_main(distillate.main, DISTIL, *TINY, *SHORT, *ONE, f"--checkpoint={eps_teacher}", f"--workdir={tmp_path}",
                   "--config.compute.compile=true", "--config.distill.pair_images=0")
    assert ran.status == 0, ran.stderr
    learning = [next(net.parameters()).requires_grad for net in nets]
    assert learning == [True, False, True]
    assert counters["stats"]["unique_graphs"] >= 2  # with and without gradients; the next stage takes them over
    assert not counters["graph_break"]
    for name in ("convert", "steps_0008"):
        one, other = ([json.loads(line)["loss"] for line in (folder / name / "stats.jsonl").read_text().splitlines()]
                      for folder in (eps_students, tmp_path))
        assert other == pytest.approx(one, rel=1e-4)


def test_guided_teacher_gives_an_unguided_student(teacher, tmp_path, run_main):
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}",
            "--config.distill.cfg_scale=2.5")
    assert run_main(distillate.main, *argv).status == 0
    for steps in (8, 4):
        held = description(tmp_path / f"steps_{steps:04d}")
        assert held["sampler"]["cfg_scale"] == 1.0
        assert (held["cond"]["null_label"], held["cond"]["drop"]) == (-1, 0.0)
        assert held["distilled"] == {"cfg_scale": 2.5}
    out = tmp_path / "images"
    sampled = (sample.main, DIGITS, *TINY, f"--checkpoint={tmp_path}", "--seeds=0-1")
    assert run_main(*sampled, f"--out={out}").status == 0
    assert json.loads((out / "summary.json").read_text())["cfg_scale"] == 1.0
    ran = run_main(*sampled, "--config.sampler.cfg_scale=3", f"--out={tmp_path}/other")
    assert (ran.status, "no null class to guide against; use 1.0" in ran.stderr) == (2, True)
    # twice guided is once too often
    more = (DISTIL, *TINY, *SHORT, f"--checkpoint={tmp_path}", f"--workdir={tmp_path}/more",
            "--config.distill.updates=1")
    ran = run_main(distillate.main, *more, "--config.distill.cfg_scale=3")
    assert (ran.status, "was distilled from one that was guided with 2.5" in ran.stderr) == (2, True)
    assert run_main(distillate.main, *more).status == 0
    assert description(tmp_path / "more/steps_0002", 1)["distilled"] == {"cfg_scale": 2.5}


def test_scale_of_the_guidance_as_an_input(teacher, tmp_path, run_main):
    argv = (DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}",
            "--config.distill.cfg_range=1,4", "--config.distill.lr=1e-2")
    assert run_main(distillate.main, *argv).status == 0
    held = description(tmp_path / "steps_0004")
    assert held["cond"]["guidance"] == [1, 4]
    assert held["backbone"]["guidance_embed"] is True
    images = {}
    for scale in (1.5, 3.5):
        out = tmp_path / str(scale)
        ran = run_main(sample.main, DIGITS, *TINY, f"--checkpoint={tmp_path}", "--seeds=0-3",
                       f"--config.sampler.cfg_scale={scale}", f"--out={out}")
        assert ran.status == 0, ran.stderr
        images[scale] = [path.read_bytes() for path in sorted(out.glob("0*.png"))]
    assert images[1.5] != images[3.5]
    ran = run_main(sample.main, DIGITS, *TINY, f"--checkpoint={tmp_path}", "--config.sampler.cfg_scale=5",
                   f"--out={tmp_path}/five")
    assert (ran.status, "5" in ran.stderr) == (2, True)


def test_model_of_eps(eps_teacher, eps_students):
    assert description(eps_teacher)["denoiser"]["prediction"] == "eps"
    assert [each["name"] for each in json.loads((eps_students / "stages.json").read_text())["stages"]] == [
        "convert", "steps_0008"]
    assert description(eps_students / "convert")["denoiser"]["prediction"] == "v"
    assert description(eps_students / "steps_0008")["denoiser"]["prediction"] == "v"
    assert "sampler" not in description(eps_students / "convert")


def test_a_model_of_eps_is_one_of_damped_eps_as_it_is(eps_teacher, tmp_path, run_main):
    run = (DISTIL, *TINY, *SHORT, *EPS, *ENDS, "--config.distill.prediction=eps_damped", "--config.train.lr=1e-12",
           f"--checkpoint={eps_teacher}", f"--workdir={tmp_path}")
    ran = run_main(distillate.main, *run)
    assert ran.status == 0, ran.stderr
    stages = json.loads((tmp_path / "stages.json").read_text())["stages"]
    assert [stage["name"] for stage in stages] == ["steps_0008", "steps_0004"], "there is no stage 0"
    assert [description(tmp_path / stage["name"])["denoiser"]["prediction"] for stage in stages] == ["eps_damped"] * 2
    base, student = averaged(eps_teacher)[0].state_dict(), weights(tmp_path / "steps_0004")
    assert all(torch.allclose(value, student[name], atol=1e-6) for name, value in base.items())
    again = run_main(distillate.main, *run)
    assert (again.status, again.stderr.count("error")) == (0, 0)
    nearest = run_main(distillate.main, DISTIL, *TINY, *SHORT, "--config.distill.stages=1", f"--checkpoint={tmp_path}",
                       f"--workdir={tmp_path}/next")
    assert nearest.status == 0, nearest.stderr
    assert description(tmp_path / "next/steps_0002", 8)["denoiser"]["prediction"] == "eps_damped"


def test_distillers_way(teacher, tmp_path, run_main):
    argv = (f"{DIGITS}:hramchenko", *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}")
    ran = run_main(distillate.main, *argv)
    assert ran.status == 0, ran.stderr
    for steps, scale in ((8, 128), (4, 256)):
        held = description(tmp_path / f"steps_{steps:04d}")
        assert (held["schedule"]["steps"], held["denoiser"]["time_scale"]) == (steps, scale)
        assert (held["sampler"]["name"], held["sampler"]["threshold"]) == ("ddpm", "static")
    out = tmp_path / "images"
    assert run_main(sample.main, DIGITS, *TINY, f"--checkpoint={tmp_path}", "--seeds=0-1", f"--out={out}").status == 0
    assert json.loads((out / "summary.json").read_text())["nfe"] == 4


def test_legacy_labels_need_their_schedule():
    held = BASE | {"denoiser": {"prediction": "v", "time_input": "index"}}
    taught, student = legacy_labels(json.loads(json.dumps(held)), 8)
    assert (taught["schedule"]["steps"], taught["denoiser"]["time_scale"]) == (16, 64)
    assert (student["schedule"]["steps"], student["denoiser"]["time_scale"]) == (8, 128)
    with pytest.raises(UserError, match="time_label=legacy: made for schedule squared_cosine and time_input index"):
        legacy_labels({"schedule": {"name": "cosine"}, "denoiser": {"time_input": "logsnr"}}, 8)
    with pytest.raises(UserError, match="time_label=legacy: 18 steps do not divide the schedule's 1024"):
        legacy_labels(json.loads(json.dumps(held)), 9)


@pytest.mark.parametrize("name", ["cifar10_unet", "digits_uvit"])
def test_teacher_in_half_precision_gives_the_same_numbers(name):
    config = config_files.load(f"configs/{name}.py")
    net, held = load_model(config)
    size, channels = held["image"]["size"], held["image"]["channels"]
    x, t, y = torch.randn(2, channels, size, size), torch.tensor([3.0, 900.0]), torch.tensor([1, 2])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        plain = net(x, t, y=y)
        bytes_before = sum(each.nbytes for each in net.parameters())
        assert torch.equal(hold(net, "bf16")(x, t, y=y), plain)
    assert sum(each.nbytes for each in net.parameters()) < 0.55 * bytes_before


def test_two_processes_learn_the_same(teacher, students, tmp_path):
    run_in_two(distillate.main, [DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={tmp_path}"])
    for steps in (8, 4):
        one, two = ([json.loads(line)["loss"] for line in (folder / f"steps_{steps:04d}/stats.jsonl").read_text()
                     .splitlines()] for folder in (students, tmp_path))
        torch.testing.assert_close(torch.tensor(two), torch.tensor(one), atol=0, rtol=1e-4)

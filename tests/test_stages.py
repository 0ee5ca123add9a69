"""Progressive distillation in stages, through distillate.py."""

import json
import shutil

import pytest
import torch
from torch._dynamo.utils import counters
from two_processes import run_in_two

import distillate
import sample
import train
from libs import config as config_files
from libs.build import load_model
from libs.checkpoint import load_described
from libs.distillation import student as student_module
from libs.distillation.progressive import Halving
from libs.distillation.stage_report import StageReport
from libs.distillation.stages import halvings, plan
from libs.distillation.student import hold, legacy_labels, make_guidance
from libs.errors import UserError
from libs.training import diffusion_loss
from libs.training.state import Checkpoints

TINY = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.patch_size=4",
        "--config.backbone.embed_dim=16", "--config.backbone.depth=2", "--config.backbone.num_heads=2")
SHORT = ("--config.train.steps=4", "--config.train.batch_size=8", "--config.train.log_every=1",
         "--config.train.save_every=2", "--config.train.preview_every=0")
DIGITS = "--config=configs/digits_uvit.py"
DISTIL = f"{DIGITS}:progressive"
ENDS = ("--config.distill.start_steps=16", "--config.distill.end_steps=4", "--config.distill.pair_images=2")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    assert train.main([DIGITS, *TINY, *SHORT, f"--workdir={workdir}"]) == 0
    return workdir


EPS = ("--config.denoiser.prediction=eps",)
ONE = ("--config.distill.start_steps=16", "--config.distill.end_steps=8", "--config.distill.convert_updates=4",
       "--config.distill.pair_images=2")


@pytest.fixture(scope="module")
def eps_teacher(tmp_path_factory):
    """U-ViT's own kind of model."""
    workdir = tmp_path_factory.mktemp("eps_teacher")
    assert train.main([DIGITS, *TINY, *SHORT, *EPS, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def eps_students(eps_teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("eps_students")
    assert distillate.main([DISTIL, *TINY, *SHORT, *ONE, f"--checkpoint={eps_teacher}", f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def students(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("students")
    assert distillate.main([DISTIL, *TINY, *SHORT, *ENDS, f"--checkpoint={teacher}", f"--workdir={workdir}"]) == 0
    return workdir


def weights(folder, step=4):
    return Checkpoints(folder / "ckpts").load(step).weights


def averaged(folder, step=4):
    return load_described(Checkpoints(folder / "ckpts").path(step) / "backbone_ema.safetensors")


def description(folder, step=4):
    return averaged(folder, step)[1]


# which stages there are


def section(start=0, end=0, stages=0):
    return {"start_steps": start, "end_steps": end, "stages": stages}


@pytest.mark.parametrize(("given", "teacher_steps", "expected"), [
    (section(1024, 2), None, [512, 256, 128, 64, 32, 16, 8, 4, 2]),
    (section(1024, 1), None, [512, 256, 128, 64, 32, 16, 8, 4, 2, 1]),
    (section(64, 0, 2), None, [32, 16]),
    (section(0, 8, 3), None, [32, 16, 8]),
    (section(48, 3, 4), None, [24, 12, 6, 3]),
    (section(0, 2), 8, [4, 2]),
    (section(), 8, [4]),
    (section(), None, [25]),
    (section(8), 8, [4]),
])
def test_halvings(given, teacher_steps, expected):
    assert halvings(given, teacher_steps, 50) == expected


@pytest.mark.parametrize(("given", "teacher_steps", "message"), [
    (section(64, 8, 2), None, "stages=2: from 64 to 8 steps are 3 halvings; leave one of start_steps, end_steps and"),
    (section(0, 5), None, "end_steps=5: 50 steps, halved again and again, are never 5; choose from 25"),
    (section(48, 5), None, "end_steps=5: 48 steps, halved again and again, are never 5; choose from 24, 12, 6, 3"),
    (section(8, 8), None, "end_steps=8: 8 steps, halved again and again, are never 8; choose from 4, 2, 1"),
    (section(8, 16), None, "end_steps=16: 8 steps, halved"),
    (section(48, 0, 5), None, "stages=5: 48 steps cannot be halved so often; at most 4 times"),
    (section(15), None, "start_steps=15: an odd number of steps cannot be halved; choose an even"),
    (section(64, 8), 32, "start_steps=64: the teacher was itself distilled, to 32 steps; start there"),
    (section(-1), None, "start_steps=-1 must be at least 1"),
])
def test_steps_that_do_not_halve_into_each_other(given, teacher_steps, message):
    with pytest.raises(UserError, match=f"--config.distill.{message}"):
        halvings(given, teacher_steps, 50)


def test_an_odd_number_of_steps_that_nobody_chose():
    with pytest.raises(UserError, match=r"^--config.sampler.steps=25: an odd number of steps cannot be halved; choose "
                                        r"an even --config.distill.start_steps$"):
        halvings(section(), None, 25)
    with pytest.raises(UserError, match="^--checkpoint: the teacher was itself distilled, to 3 steps, an odd number"):
        halvings(section(), 3, 50)


def config_of(methods="progressive", name="digits_uvit", **fields):
    config = config_files.load(f"configs/{name}.py:{methods}")
    for field, text in fields.items():
        config_files.override(config, f"distill.{field}", text)
    return config


BASE = {"denoiser": {"prediction": "v"}, "schedule": {"name": "squared_cosine", "steps": 1024}}


def test_plan_of_a_run():
    stages = plan(config_of(start_steps="16", end_steps="1", name="cifar10_unet"), BASE)
    assert [(each.steps, each.updates) for each in stages] == [(8, 50_000), (4, 50_000), (2, 100_000), (1, 100_000)]
    assert {(each.lr, each.ema) for each in stages} == {(5e-5, 0.0)}
    own = plan(config_of(start_steps="16", end_steps="4", updates="100,300", lr="1e-4", ema="0,0.9"), BASE)
    assert [(each.name, each.updates, each.lr, each.ema) for each in own] == [
        ("steps_0008", 100, 1e-4, 0.0), ("steps_0004", 300, 1e-4, 0.9)]
    with pytest.raises(UserError, match=r"distill.updates=\(1, 2, 3\): want one value, or one for each of 2 stages"):
        plan(config_of(start_steps="16", end_steps="4", updates="1,2,3"), BASE)


def test_a_model_of_eps_is_converted_first():
    eps = BASE | {"denoiser": {"prediction": "eps"}}
    fields = {"start_steps": "16", "end_steps": "4", "convert_updates": "7"}
    assert [(each.name, each.updates) for each in plan(config_of(**fields), eps)][:2] == [
        ("convert", 7), ("steps_0008", 100)]
    assert [each.name for each in plan(config_of(prediction="eps", **fields), eps)] == ["steps_0008", "steps_0004"]
    assert plan(config_of(prediction="x_0", **fields), BASE)[0].name == "convert"
    with pytest.raises(UserError, match="prediction=both: the teacher predicts v; a network for both has twice"):
        plan(config_of(prediction="both", **fields), BASE)


# a run


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


MISTAKES = [
    (["--config.distill.weighting=snr2"], "distill.weighting='snr2' is unknown; choose from const, snr"),
    (["--config.distill.start_steps=48", "--config.distill.end_steps=5"], "end_steps=5: 48 steps"),
    (["--config.distill.start_steps=4096", "--config.distill.end_steps=2048"],
     "distill.start_steps=4096: the teacher's schedule has 1024 steps"),
    (["--config.schedule.name=cosine"], "schedule.name=cosine: the teacher was trained on squared_cosine"),
    (["--config.distill.cfg_range=4,1"], "cfg_range=(4, 1): want two scales, such as 1,4, the lower one first"),
    (["--config.distill.cfg_range=1,4", "--config.distill.cfg_scale=2"], "give one of them"),
    (["--config.distill.prediction=w"], "distill.prediction='w' is unknown; choose from v, x_0, eps, eps_damped, both"),
    (["--config.distill.time_label=old"], "distill.time_label='old' is unknown; choose from exact, legacy"),
    (["--config.distill.time_label=legacy", "--config.distill.start_steps=48"], "48 steps do not divide"),
    (["--config.distill.target=x3"], "distill.target='x3' is unknown; choose from ddim2, x2"),
    (["--config.distill.sampler=euler"], "distill.sampler='euler' is unknown; choose from ddim, ddpm"),
    (["--config.distill.updates=0"], "--config.distill.updates=0 must be at least 1"),
    (["--config.distill.updates=many"], "--config.distill.updates=('many',): want whole numbers"),
    (["--config.distill.lr=0"], "--config.distill.lr=0 must be positive"),
    (["--config.distill.ema=1"], "--config.distill.ema=1 must lie from 0 to below 1"),
    (["--config.schedule.steps=512"], "--config.schedule.steps=512: the teacher was trained with 1024, and its"),
]
OF_STAGE_0 = [
    (["--config.distill.convert_updates=0"], "--config.distill.convert_updates=0 must be at least 1"),
    (["--config.distill.convert_ema=1"], "--config.distill.convert_ema=1.0 must lie from 0 to below 1"),
]


@pytest.mark.parametrize(("kind", "flags", "message"), [
    *(("teacher", *each) for each in MISTAKES), *(("eps_teacher", *each) for each in [*MISTAKES, *OF_STAGE_0])])
def test_mistakes(kind, tmp_path, run_main, flags, message, request):
    """All are told before the first update, those of a halving before stage 0 too."""
    teacher = request.getfixturevalue(kind)
    ran = run_main(distillate.main, DISTIL, *TINY, *SHORT, *flags, f"--checkpoint={teacher}", f"--workdir={tmp_path}")
    assert ran.status == 2
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not list(tmp_path.glob("*/ckpts"))


def test_guidance_of_an_unconditional_teacher(tmp_path, run_main):
    ran = run_main(distillate.main, "--config=configs/cifar10_uvit_tiny.py:progressive",
                   "--config.distill.cfg_scale=2", f"--workdir={tmp_path}")
    assert (ran.status, ran.stderr) == (2, "error: --config.distill.cfg_scale=2.0: this teacher has no null class to "
                                           "be guided against; use 1.0\n")
    with pytest.raises(UserError, match=r"cfg_range=\(1, 4\): this teacher has no null class .*; leave it out$"):
        make_guidance(config_of(cfg_range="1,4"), {"cond": {"kind": "none", "null_label": -1}})
    with pytest.raises(UserError, match=r"cfg_scale=2.0: guidance by class labels .* cond.kind=text; use 1.0$"):
        make_guidance(config_of(cfg_scale="2"), {"cond": {"kind": "text", "null_label": -1}})


def test_config_without_distillation(tmp_path, run_main):
    ran = run_main(distillate.main, DIGITS, f"--workdir={tmp_path}")
    assert (ran.status, ran.stderr) == (2, f"error: {DIGITS} names no distillation; write {DISTIL}\n")


# other teachers


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

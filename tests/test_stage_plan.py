"""Which stages a progressive distillation has, and what is refused before the first update."""

import pytest
from staged_runs import BASE, DIGITS, DISTIL, EPS, SHORT, TINY, config_of, train_teacher

import distillate
from libs.distillation.stages import halvings, plan
from libs.distillation.student import make_guidance
from libs.errors import UserError


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    return train_teacher(tmp_path_factory.mktemp("teacher"))


@pytest.fixture(scope="module")
def eps_teacher(tmp_path_factory):
    """U-ViT's own kind of model."""
    return train_teacher(tmp_path_factory.mktemp("eps_teacher"), *EPS)


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
    (["--config.distill.gamma=0.3"],
     "distill.gamma=0.3: want a number, which is read by distill.weighting=gamma alone, and that is 'snr_trunc'"),
    (["--config.distill.gamma=inf", "--config.distill.weighting=gamma"], "--config.distill.gamma=inf: want a number"),
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
    assert not list(tmp_path.iterdir())


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

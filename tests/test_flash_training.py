"""Flash Diffusion through distillate.py: whole students and LoRAs, resumed, shared among processes, and sampled."""

import json
import os
import subprocess
import sys

import pytest
import torch

import distillate
import sample
import train
from libs import config as config_files
from libs.build import load_chain, load_model
from libs.checkpoint import load_described, resolve
from libs.distillation.flash_training import rollout_policy
from libs.lora import AdaptersOff, add_lora, fingerprint, load_lora
from libs.training.state import Checkpoints

TINY = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.patch_size=2",
        "--config.backbone.embed_dim=16", "--config.backbone.depth=4", "--config.backbone.num_heads=2")
SHORT = ("--config.train.steps=4", "--config.train.batch_size=8", "--config.train.log_every=1",
         "--config.train.save_every=2", "--config.train.preview_every=0")
STAGES = ("--config.distill.stage_updates=1,1,1,1", "--config.distill.teacher_steps=4")
DIGITS = "--config=configs/digits_uvit.py"
FLASH = (f"{DIGITS}:flash", *TINY, *SHORT, *STAGES)
LORA = "--config.distill.lora_rank=2"
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    assert train.main([DIGITS, *TINY, *SHORT, f"--workdir={workdir}"]) == 0
    return workdir


def distil(teacher, workdir, *fields):
    return distillate.main([*FLASH, *fields, f"--checkpoint={teacher}", f"--workdir={workdir}"])


@pytest.fixture(scope="module")
def whole(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    assert distil(teacher, workdir) == 0
    return workdir


@pytest.fixture(scope="module")
def lora(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("lora")
    assert distil(teacher, workdir, LORA) == 0
    return workdir


def tiny(methods):
    config = config_files.load(f"configs/digits_uvit.py{methods}")
    for field in TINY:
        config_files.override(config, *field.removeprefix("--config.").split("=", 1))
    return config


def saved(workdir, step=4):
    return Checkpoints(workdir / "ckpts").load(step)


def assert_equal_states(one, other):
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_equal_states(value, other[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, other[name]), name


def rows(workdir):
    return [json.loads(line) for line in (workdir / "stats.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("fields", [(), (LORA,)])
def test_a_run_that_was_stopped_goes_on_bit_for_bit(fields, teacher, whole, lora, tmp_path):
    assert distil(teacher, tmp_path, *fields, "--config.train.steps=2") == 0
    assert distil(teacher, tmp_path, *fields) == 0
    one, other = saved(lora if fields else whole), saved(tmp_path)
    assert_equal_states(one.weights, other.weights)
    assert_equal_states(one.state["beside"], other.state["beside"])
    assert one.state["beside"], "the discriminator is in the checkpoint"
    assert_equal_states(one.state["optimizer"], other.state["optimizer"])


def test_the_stages_follow_the_updates_and_their_losses_are_told(whole):
    first, *others = rows(whole)
    assert "distil" in first
    assert "discriminator" not in first, "the first stage has the distillation loss alone"
    assert all({"distil", "dmd", "adversarial", "discriminator"} <= row.keys() for row in others)


def test_a_whole_student_samples_by_itself_at_the_times_of_its_modes(whole, tmp_path):
    config = tiny("")
    chain, _ = load_chain(config, str(whole), CPU)
    steps = (chain.ts * 1024).tolist()
    assert steps == [1024, 768, 512, 256, 0]
    assert config.sampler.name == "lcm"
    assert chain.cfg_scale == 1
    assert sample.main([DIGITS, *TINY, f"--checkpoint={whole}", "--seeds=0-4", f"--out={tmp_path}"]) == 0
    assert len(list(tmp_path.glob("*.png"))) >= 5


def test_a_loras_checkpoint_holds_nothing_else(lora, whole):
    names = saved(lora).weights
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert any(bool(each.any()) for name, each in names.items() if ".lora_B." in name), "it has learnt"
    described = load_described(resolve(str(lora)))[1]
    assert "lora" not in described, "what loads is one whole network"


def test_a_lora_loads_as_the_network_that_was_trained(teacher, lora):
    config = tiny(":flash")
    base, _ = load_model(config, str(teacher))
    merged, _ = load_model(config, str(lora))
    assert not any("lora" in name for name in merged.state_dict())
    assert fingerprint(merged) != fingerprint(base)
    add_lora(base, 2, 2)
    load_lora(base, saved(lora).ema, "here")
    x, t, y = torch.randn(3, 1, 8, 8), torch.tensor([900.0, 500.0, 20.0]), torch.tensor([1, 2, 3])
    torch.testing.assert_close(merged(x, t, y), base.eval()(x, t, y), rtol=1e-4, atol=1e-5)
    untouched, _ = load_model(config, str(teacher))
    assert torch.equal(AdaptersOff(base)(x, t, y), untouched(x, t, y)), "with its LoRA off it is the teacher"


def test_a_lora_of_other_weights_is_refused(teacher, lora, tmp_path, run_main):
    other = tmp_path / "other"
    assert train.main([DIGITS, *TINY, *SHORT, "--config.seed=1", f"--workdir={other}"]) == 0
    ckpts = teacher / "ckpts"
    aside = teacher / "aside"
    ckpts.rename(aside)
    try:
        (other / "ckpts").rename(ckpts)
        ran = run_main(sample.main, DIGITS, *TINY, f"--checkpoint={lora}", "--seeds=0", f"--out={tmp_path / 'out'}")
    finally:
        ckpts.rename(other / "ckpts")
        aside.rename(ckpts)
    assert ran.status == 2
    assert "is a LoRA of other weights than" in ran.stderr.splitlines()[-1]


def test_two_processes_learn_what_one_does(teacher, whole, tmp_path):
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")
    command = [sys.executable, *launch, "distillate.py", *FLASH, f"--checkpoint={teacher}", f"--workdir={tmp_path}"]
    ran = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"},
                         timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr
    one, two = saved(whole), saved(tmp_path)
    for name, value in one.weights.items():
        torch.testing.assert_close(two.weights[name], value, rtol=1e-3, atol=1e-5)
    for name, value in one.state["beside"].items():
        torch.testing.assert_close(two.state["beside"][name], value, rtol=1e-3, atol=1e-5)
    for mine, theirs in zip(rows(whole), rows(tmp_path), strict=True):
        for term in ("distil", "dmd", "adversarial", "discriminator"):
            assert theirs.get(term, 0) == pytest.approx(mine.get(term, 0), rel=1e-3)


def test_parts_of_a_batch_add_up(teacher, whole, tmp_path):
    assert distil(teacher, tmp_path, "--config.train.accumulate=2") == 0
    for name, value in saved(whole).weights.items():
        torch.testing.assert_close(saved(tmp_path).weights[name], value, rtol=1e-3, atol=1e-5)


def test_pictures_show_the_teacher_and_three_numbers_of_steps(teacher, tmp_path):
    from PIL import Image

    assert distil(teacher, tmp_path, "--config.train.preview_every=4", "--config.train.preview_images=3") == 0
    with Image.open(tmp_path / "previews" / "00000004.png") as picture:
        width, height = picture.size
    assert height == 4 * (64 + 4) + 4
    assert width > 3 * (64 + 4)


@pytest.mark.parametrize("policy", ["clockwork:2", "encoder_propagation:every:2"])
def test_the_teachers_roll_outs_can_be_cached(policy, teacher, whole, tmp_path):
    """The student learns something else then."""
    assert distil(teacher, tmp_path, f"--config.distill.teacher_policy={policy}") == 0
    assert any(not torch.equal(saved(tmp_path).weights[name], value) for name, value in saved(whole).weights.items())


def test_policies_of_roll_outs():
    assert rollout_policy("full") is None
    assert rollout_policy("clockwork:3")["clock"] == 3
    assert rollout_policy("encoder_propagation:every:4")["key_steps"] == "every:4"


@pytest.mark.parametrize(("fields", "message"), [
    (["--config.distill.dmd_scale=0,.1"], "distill.dmd_scale=0,.1: 2 values for 4 stages"),
    (["--config.distill.teacher_steps=6"], "a grid of 6 steps does not hold the 4 modes"),
    (["--config.distill.guidance=3,1"], "want the lowest and the highest scale"),
    (["--config.distill.lora_rank=-1"], "--config.distill.lora_rank=-1 must be at least 0"),
    ([LORA, "--config.distill.lora_targets=nowhere"], "lora_targets='nowhere'"),
    (["--config.distill.teacher_policy=half"], "distill.teacher_policy='half' is unknown"),
    (["--config.distill.discriminator_lr=0"], "--config.distill.discriminator_lr=0.0 must be positive"),
    (["--config.distill.gan=best"], "--config.distill.gan='best' is unknown"),
    (["--config.policy.name=early_exit"], "policy"),
])
def test_what_makes_no_training_is_refused(fields, message, teacher, tmp_path, run_main):
    ran = run_main(distillate.main, *FLASH, *fields, f"--checkpoint={teacher}", f"--workdir={tmp_path / 'run'}")
    assert ran.status == 2
    assert message in ran.stderr.splitlines()[-1]
    assert not (tmp_path / "run" / "ckpts").exists()

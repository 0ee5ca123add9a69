"""The commands that compare an update of a distillation with the network passes that it cannot do without."""

import importlib
import json
import shlex

import pytest
import torch

from libs.denoiser import Denoiser
from libs.distillation import adaptor_speed, flash_sampling_speed, flash_speed, speed
from libs.distillation.flash import draw_starts
from libs.distillation.flash_stages import read_stages
from libs.distillation.speed import random_batch
from libs.errors import UserError

TINY = ("--config=configs/digits_uvit.py:flash", "--config.compute.device=cpu", "--config.distill.teacher_steps=4")


@pytest.mark.parametrize("fields", [(), ("--config.distill.lora_rank=2",), ("--config.distill.adversarial_scale=0",)])
def test_flash_measures_and_counts_the_rows(fields, tmp_path, run_main):
    out = tmp_path / "speed.json"
    ran = run_main(flash_speed.main, *TINY, *fields, "--batch_size=2", "--repeats=1", f"--out={out}")
    assert ran.status == 0, ran.stderr
    told = json.loads(out.read_text())
    assert told["ratio"] == pytest.approx(told["update"] / told["passes"])
    assert f"{told['ratio']:.3f} x its passes" in ran.stdout

    section = {"stage_updates": "50,50,50,50", "teacher_steps": "4", "guidance": "2.5", "start": "modes", "spread": 0.5,
               "mode_weights": "0,0,.5,.5; .1,.3,.3,.3; .25,.25,.25,.25; .4,.2,.2,.2", "distil_scale": "1",
               "dmd_scale": "0,.3,.5,.7", "adversarial_scale": "0,.1,.2,.3"}
    description = {"image": {"size": 8, "channels": 1}, "cond": {"num_classes": 10}}
    starts = draw_starts(read_stages(section)[-1], random_batch(description, 2, 0, 200, torch.device("cpu")))
    assert told["rollout_rows"] == 2 * int((4 - starts).sum()), "guided: two rows a call"


def test_an_update_of_a_pipelines_network(tmp_path, run_main):
    """Stable Diffusion 1.5's architecture, narrow: nothing is fetched."""
    out = tmp_path / "speed.json"
    ran = run_main(flash_speed.main, "--config=configs/sd15.py:flash", "--config.compute.device=cpu", "--width=tiny",
                   "--latent=8", "--batch_size=2", "--repeats=1", "--config.distill.lora_rank=2",
                   "--config.compute.precision=bf16", "--config.distill.teacher_steps=4",
                   "--config.train.grad_checkpoint=true", f"--out={out}")
    assert ran.status == 0, ran.stderr
    told = json.loads(out.read_text())
    assert (told["model"], told["x"], told["precision"]) == ("sd15, tiny width, random weights", [2, 4, 8, 8], "bf16")
    assert 0 < told["learned_parameters"] < told["parameters"] / 10
    assert told["peak_memory_mib"] > 4 * told["parameters"] / 2**20 / 2, "its weights in bf16, at least"
    assert f"peak memory {told['peak_memory_mib']:,.0f} MiB" in ran.stdout


def student_and_teacher(tmp_path, run_main):
    train, distillate = (importlib.import_module(name) for name in ("train", "distillate"))
    digits = "--config=configs/digits_uvit.py"
    small = ("--config.compute.device=cpu", "--config.backbone.embed_dim=16", "--config.backbone.depth=2",
             "--config.backbone.num_heads=2")
    short = ("--config.train.steps=1", "--config.train.batch_size=4", "--config.train.preview_every=0")
    for module, *words in ((train, digits, f"--workdir={tmp_path}/teacher"),
                           (distillate, f"{digits}:flash", f"--checkpoint={tmp_path}/teacher",
                            f"--workdir={tmp_path}/student", "--config.distill.lora_rank=2",
                            "--config.distill.teacher_steps=4", "--config.distill.stage_updates=1,1,1,1")):
        ran = run_main(module.main, *words, *small, *short)
        assert ran.status == 0, ran.stderr
    return digits, *small, f"--checkpoint={tmp_path}/student", f"--teacher={tmp_path}/teacher"


def test_images_a_second_beside_guided_ddim(tmp_path, run_main):
    """25 times the rows go through the network: two in each of 50 steps, to one in each of 4."""
    command = student_and_teacher(tmp_path, run_main)
    out = tmp_path / "speed.json"
    ran = run_main(flash_sampling_speed.main, *command, "--rows=3", "--repeats=1", f"--out={out}")
    assert ran.status == 0, ran.stderr
    told = json.loads(out.read_text())
    student, teacher = told["student"], told["teacher"]
    assert (student["nfe"], student["cfg_scale"], teacher["nfe"], teacher["cfg_scale"]) == (4, 1.0, 50, 2.0)
    macs = [each["gmacs_per_image"]["with_attention_products"] for each in (teacher, student)]
    assert macs[0] == pytest.approx(25 * macs[1])
    assert told["ratio"] == pytest.approx(teacher["seconds"] / student["seconds"])
    assert student["images_per_second"] == pytest.approx(3 / student["seconds"])
    assert f": {told['ratio']:.1f} x" in ran.stdout

    for words, message in ((("--guidance=1",), "--guidance=1 is none"),
                           (("--out=speed.txt",), "must end in .json")):
        ran = run_main(flash_sampling_speed.main, *command, *words)
        assert ran.status == 2
        assert message in ran.stderr.splitlines()[-1]


def test_other_configs_and_files_are_refused(run_main, tmp_path):
    for arguments, message in (
        (("--config=configs/digits_uvit.py",), "--config names no Flash Diffusion"),
        ((TINY[0], f"--out={tmp_path}/speed.txt"), "must end in .json"),
        (("--config=configs/sdxl.py:flash",), "of pipelines only sd15 has a network with random weights"),
        (("--config=configs/sd15.py:flash", "--latent=12"), "--latent=12 must be a multiple of 8"),
        (("--config=configs/sd15.py:flash", "--checkpoint=a"), "belongs to a config without a pipeline"),
    ):
        ran = run_main(flash_speed.main, *arguments)
        assert ran.status == 2
        assert message in ran.stderr.splitlines()[-1]


PROGRESSIVE = ("--config=configs/digits_uvit.py:progressive", "--config.compute.device=cpu", "--batch_size=2",
               "--repeats=1")


def test_progressive_distillation_measures(tmp_path, run_main):
    out = tmp_path / "speed.json"
    ran = run_main(speed.main, "--config=configs/digits_uvit.py", *PROGRESSIVE[1:], f"--out={out}")
    assert ran.status == 0, ran.stderr
    told = json.loads(out.read_text())
    both = 2 * told["teacher_forward"] + told["student_forward_backward"]
    assert told["ratio"] == pytest.approx(told["update"] / both)


def test_an_epoch_of_the_adaptor_measures(tmp_path, run_main):
    """By the code of the training itself; the command that it notes makes the run again."""
    out = tmp_path / "speed.json"
    ran = run_main(adaptor_speed.main, "--width=tiny", "--latent=8", "--trajectories=2", "--steps=4", "--clock=3",
                   "--updates=3", "--batch_size=2", "--dtype=bf16", "--device=cpu", f"--out={out}")
    assert ran.status == 0, ran.stderr
    told = json.loads(out.read_text())
    least = 2 * 4 * told["seconds_per_trajectory_step"] + 2 * told["seconds_per_update"]
    assert told["seconds"] > least > 0
    assert told["processor_seconds"] > 2 * 4 * told["processor_seconds_per_trajectory_step"] > 0
    assert 0 < told["ratio"] < 10
    assert told["parameters"]["network"] < 20e6
    assert told["machine"]
    assert told["peak_memory_mib"] is None or told["peak_memory_mib"] > 2 * told["parameters"]["network"] / 2**20
    table = adaptor_speed.read_table([out])
    assert ran.stdout.strip() == table
    assert "| 8 x 8 | bf16 | resnet, " in table
    assert "| 3 | 2 x 4 | " in table

    words = shlex.split(told["command"])
    assert words[:3] == ["python", "-m", "libs.distillation.adaptor_speed"]
    other = tmp_path / "again.json"
    ran = run_main(adaptor_speed.main, *words[3:], f"--out={other}")
    assert ran.status == 0, ran.stderr
    again = json.loads(other.read_text())
    assert (again["ratio"], again["settings"]) == (told["ratio"], told["settings"])


@pytest.mark.parametrize(("flag", "line"), [
    ("--latent=12", "--latent=12 must be a multiple of 8"),
    ("--width=huge", "--width=huge: want one of full, small, tiny"),
    ("--out=speed.txt", "--out=speed.txt must end in .json"),
    ("--steps=2 --clock=2 --adaptor=linear", "--adaptor=linear: want one of resnet, unet, unet_light"),
])
def test_bad_flags_of_the_adaptor_in_one_line(flag, line, run_main):
    ran = run_main(adaptor_speed.main, "--width=tiny", *flag.split())
    assert ran.status == 2
    assert ran.stderr.startswith(f"error: {line}")
    assert ran.stderr.count("\n") == 1


def test_what_is_no_result_of_the_adaptor(tmp_path):
    (tmp_path / "none.json").write_text('{"settings": {}}')
    with pytest.raises(UserError, match=r"none.json is no result of libs.distillation.adaptor_speed"):
        adaptor_speed.read_table([tmp_path / "none.json"])


@pytest.mark.parametrize(("flag", "rows", "takes_scale"), [("cfg_scale=2.5", 4, False), ("cfg_range=1,4", 4, True)])
def test_guided_teachers_are_measured_as_they_teach(flag, rows, takes_scale, run_main, monkeypatch):
    """A pass of the teacher has as many rows alone as in the update, and the student its scale in both."""
    seen, call = [], Denoiser.call

    def note(self, x_t, t, cond=None):
        seen.append((torch.is_grad_enabled(), len(x_t), "guidance" in cond))
        return call(self, x_t, t, cond)

    monkeypatch.setattr(Denoiser, "call", note)
    monkeypatch.setattr(speed, "WARM_UP", 0)
    ran = run_main(speed.main, *PROGRESSIVE, f"--config.distill.{flag}")
    assert ran.status == 0, ran.stderr
    teacher, student = (False, rows, False), (True, 2, takes_scale)
    training = [(True, 2, False)] * 2
    update = [teacher, teacher, student]
    assert seen == [*training, teacher, student, *update, *update, *update]  # one of each in turns, two for the memory


@pytest.mark.parametrize(("precision", "size"), [("fp32", 16), ("bf16", 2)])
def test_memory_is_that_of_training_and_of_one_copy(precision, size, run_main, tmp_path, monkeypatch):
    def measured(name):
        out = tmp_path / name
        ran = run_main(speed.main, *PROGRESSIVE, f"--batch_size={size}", f"--config.compute.precision={precision}",
                       f"--out={out}")
        assert ran.status == 0, ran.stderr
        told = json.loads(out.read_text())["memory_mib"]
        return told["update"], told["training"] + told["copy_of_the_weights"]

    update, bound = measured("as_it_is.json")
    assert 0.5 * bound < update <= 1.001 * bound
    if precision == "bf16":  # a teacher that is held in full costs more
        monkeypatch.setattr("libs.distillation.student.hold", lambda net, precision: net)
        update, bound = measured("in_full.json")
        assert update > 1.1 * bound

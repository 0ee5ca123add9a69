"""The commands that compare an update of a distillation with the network passes that it cannot do without."""

import json

import pytest
import torch

from libs.denoiser import Denoiser
from libs.distillation import flash_speed, speed
from libs.distillation.flash import draw_starts
from libs.distillation.flash_stages import read_stages
from libs.distillation.speed import random_batch

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


def test_other_configs_and_files_are_refused(run_main, tmp_path):
    for arguments, message in (
        (("--config=configs/digits_uvit.py",), "--config names no Flash Diffusion"),
        ((TINY[0], f"--out={tmp_path}/speed.txt"), "must end in .json"),
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

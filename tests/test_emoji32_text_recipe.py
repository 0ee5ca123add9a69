"""scripts/emoji32_text.sh from captioned shards to the pictures of a LoRA of a few steps: tiny networks."""

import importlib
from functools import partial

import numpy as np
import pytest
from PIL import Image
from shell_scripts import noting
from small_shards import sample, write_tar

from libs.checkpoint import load_described, resolve
from libs.training.state import Checkpoints

FLAGS = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.embed_dim=16",
         "--config.backbone.depth=2", "--config.backbone.num_heads=2", "--config.backbone.patch_size=8",
         "--config.train.batch_size=4", "--config.train.preview_every=0")
FLASH = ("--config.distill.teacher_steps=4", "--config.distill.lora_rank=2")


@pytest.fixture
def run_script(tmp_path):
    return partial(noting(tmp_path), "emoji32_text.sh", cwd=tmp_path)


def test_from_shards_to_the_students_pictures(run_script, run_main, tmp_path):
    shard = write_tar(tmp_path / "a.tar", {f"{i:05d}": sample(i) for i in range(6)})
    out = tmp_path / "out"
    ran, calls = run_script(shard.name, out, *FLAGS, UPDATES="2", FLASH_UPDATES="1,1", SEEDS="0-1")
    assert (ran.returncode, ran.stderr) == (0, "")
    for call in calls:
        name, argv = (call[1], call[2:]) if call[0] == "-m" else (call[0].removesuffix(".py"), call[1:])
        more = (*FLASH, "--config.distill.mode_weights=.25,.25,.25,.25", "--config.distill.dmd_scale=.3",
                "--config.distill.adversarial_scale=.1") if name == "distillate" else ()
        done = run_main(importlib.import_module(name).main, *argv, *more)
        assert done.status == 0, (call, done.stderr)
    assert [Checkpoints(out / name / "ckpts").steps()[-1] for name in ("teacher", "student")] == [2, 2]
    net, described = load_described(resolve(str(out / "student")))
    assert described["distilled"] == {"method": "flash"}
    assert described["cond"]["task"] == "text"
    pictures = {name: np.array(Image.open(out / name / "000000.png"))
                for name in ("teacher_25", "teacher_4", "student_4", "student_2")}
    assert all(each.shape == (32, 32, 3) for each in pictures.values())
    assert not np.array_equal(pictures["teacher_4"], pictures["student_4"])
    with Image.open(out / "pictures.png") as picture:
        assert picture.height > 5 * 32, "a row of the teacher's at each number of steps, and two of the student's"


def test_the_users_prompts_seeds_and_addresses(run_script, tmp_path):
    (tmp_path / "mine.txt").write_text("red heart\n")
    pattern = "data/{00..01}.tar"
    ran, calls = run_script(pattern, PROMPTS="mine.txt", SEEDS="3")
    assert ran.returncode == 0, ran.stderr
    assert f"--shards={pattern}" in calls[0]
    drawn = [call for call in calls if call[0] == "sample.py"]
    assert len(drawn) == 5
    assert all(f"--prompts={tmp_path}/mine.txt" in call and "--seeds=3" in call for call in drawn)


def test_wants_shards(run_script):
    ran, calls = run_script()
    assert (ran.returncode, ran.stderr, calls) == (
        2, "error: no shards given; usage: bash scripts/emoji32_text.sh SHARDS [OUT] [FLAGS]\n", [])

"""train.py as its users call it."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import train
from libs.checkpoint import load_described
from libs.training.state import Checkpoints

ROOT = Path(train.__file__).parent
TINY = ("--config=configs/digits_uvit.py", "--config.compute.device=cpu", "--config.compute.rows=4",
        "--config.backbone.patch_size=4", "--config.backbone.embed_dim=16", "--config.backbone.depth=2",
        "--config.backbone.num_heads=2", "--config.sampler.steps=2", "--config.train.steps=5",
        "--config.train.batch_size=8", "--config.train.warmup=2", "--config.train.log_every=1",
        "--config.train.save_every=2", "--config.train.preview_every=0")


def losses_of(workdir):
    return [json.loads(line)["loss"] for line in (workdir / "stats.jsonl").read_text().splitlines()]


def told(ran):
    """The log lines, without their times and without the progress bar."""
    return [line.split(" ", 2)[2] for line in ran.stderr.replace("\r", "\n").splitlines() if line.startswith("I ")]


def error_of(ran):
    assert (ran.status, ran.stdout) == (2, "")
    [line] = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert "Traceback" not in ran.stderr
    return line


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("trained")
    assert train.main([*TINY, f"--workdir={workdir}"]) == 0
    return workdir


def test_trains_and_is_finished(run_main, trained, tmp_path):
    assert len(losses_of(trained)) == 5
    before = (trained / "stats.jsonl").read_text()
    ran = run_main(train.main, *TINY, f"--workdir={trained}")
    assert (ran.status, ran.stdout) == (0, "")
    assert told(ran) == [f"{trained} is finished: 5 steps; a larger --config.train.steps goes on"]
    assert (trained / "stats.jsonl").read_text() == before

    net, description = load_described(Checkpoints(trained / "ckpts").path(5) / "backbone_ema.safetensors")
    assert description["trained"] == {"steps": 5, "batch_size": 8}
    assert description["denoiser"] == {"prediction": "v", "time_input": "index"}
    assert net(torch.zeros(1, 1, 8, 8), torch.zeros(1), y=torch.zeros(1, dtype=torch.int64)).shape == (1, 1, 8, 8)


def test_stops_at_the_time_limit_and_goes_on(run_main, trained, tmp_path):
    ran = run_main(train.main, *TINY, f"--workdir={tmp_path}", "--config.train.max_minutes=0.0000001")
    assert ran.status == 0
    assert told(ran)[-1] == ("train.max_minutes=1e-07 are over at step 1 of 5, checkpoint in "
                             f"{tmp_path}/ckpts/00000001; the same command goes on from there")
    ran = run_main(train.main, *TINY, f"--workdir={tmp_path}")
    assert told(ran)[0] == "going on from step 1"
    assert losses_of(tmp_path) == losses_of(trained)


def test_starts_from_a_checkpoint(run_main, trained, tmp_path):
    argv = [*TINY, f"--workdir={tmp_path / 'new'}", "--config.train.lr=1e-9", "--config.train.steps=1"]
    assert run_main(train.main, *argv, f"--checkpoint={trained}").status == 0
    old, new = (Checkpoints(folder / "ckpts").load(step) for folder, step in ((trained, 5), (tmp_path / "new", 1)))
    torch.testing.assert_close(new.weights["pos_embed"], old.ema["pos_embed"], atol=1e-6, rtol=0)
    assert "the run in --workdir" in error_of(run_main(train.main, *argv))  # without --checkpoint: another run


@pytest.mark.parametrize(("argv", "text"), [
    (["--workdir="], "error: --workdir= "),
    ([], "error: --workdir is missing"),
    (["--config.train.batch_size=7", "--config.train.accumulate=2"],
     "error: --config.train.batch_size=7 cannot be divided among 1 process x 2 (train.accumulate)"),
    (["--config.data.name=cifar10", "--config.data.path=nowhere", "--config.data.image_size=8"],
     "error: data.image_size=8: cifar10 has images of 32x32"),
    (["--config.compute.device=gpu"], "error: compute.device='gpu' is not available here; choose from"),
    (["--config.train.eval_every=2", "--config.eval.metrics=frechet_cifar10"], "error: metrics.features="),
    (["--checkpoint=nowhere"], "error: checkpoint='nowhere' is not there"),
    (["--checkpoint=cifar10_uvit_tiny"], "another architecture"),
])
def test_mistakes(run_main, tmp_path, argv, text):
    if text.startswith("error: --workdir= "):
        argv = ["--workdir=/proc/x"]
        text = "error: --workdir=/proc/x: cannot write there"
    elif argv:
        argv = [*argv, f"--workdir={tmp_path / 'w'}"]
    assert text in error_of(run_main(train.main, *TINY, *argv))
    assert not (tmp_path / "w" / "config.json").exists()


def test_another_run_is_refused(run_main, trained):
    ran = run_main(train.main, *TINY, f"--workdir={trained}", "--config.train.batch_size=16")
    assert error_of(ran) == (f"error: --config.train.batch_size=16: the run in --workdir={trained} has 8; go on with "
                             "that, or choose another folder")


def test_loss_that_is_not_finite(run_main, tmp_path):
    argv = [*TINY, f"--workdir={tmp_path}", "--config.train.lr=1e30", "--config.train.clip_norm=0"]
    assert "error: the loss is not finite at step" in error_of(run_main(train.main, *argv))


def test_full_disk(run_main, tmp_path, monkeypatch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    ran = run_main(train.main, *TINY, f"--workdir={tmp_path}")
    assert error_of(ran) == f"error: {tmp_path}: No space left on device"
    assert list((tmp_path / "ckpts").iterdir()) == []


def command(*argv):
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *argv], cwd=ROOT, env=environment, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_interrupted_as_a_command(run_main, tmp_path):
    argv = [*TINY, "--config.train.steps=100000", "--config.train.save_every=1000000", f"--workdir={tmp_path}"]
    process = command("train.py", *argv)
    try:
        while not (tmp_path / "stats.jsonl").exists() or not losses_of(tmp_path):
            assert process.poll() is None, process.stderr.read()
            signal.sigtimedwait([], 0.05)
        process.send_signal(signal.SIGINT)
        stderr = process.communicate(timeout=60)[1]
    finally:
        process.kill()
    assert process.returncode == 130
    last = stderr.replace("\r", "\n").splitlines()[-1]
    [step] = Checkpoints(tmp_path / "ckpts").steps()
    assert f"interrupted at step {step} of 100000" in last
    assert last.endswith("; the same command goes on from there")


def test_two_processes_equal_one(trained, tmp_path):
    # Not --cpu, with which accelerate starts one process, however many it is told.
    process = command("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--num_machines=1",
                      "--mixed_precision=no", "--main_process_port=0", "train.py", *TINY, "--config.train.accumulate=2",
                      f"--workdir={tmp_path}")
    output = process.communicate(timeout=300)
    assert process.returncode == 0, output
    assert losses_of(tmp_path) == pytest.approx(losses_of(trained), abs=1e-4)
    one, two = (Checkpoints(folder / "ckpts").load(5) for folder in (trained, tmp_path))
    for name, tensor in one.ema.items():
        torch.testing.assert_close(two.ema[name], tensor, atol=1e-4, rtol=0)
    assert output[1].count("2 processes share each update, 4 images each") == 1
    assert output[1].count("going on from") == 0
    assert output[1].count("finished: step 5 of 5") == 1  # the main process speaks alone

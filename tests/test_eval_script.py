"""eval.py as a user types it: seeds or a folder, going on, two processes, cost, and every bad input in one line."""

import errno
import json
import os
import shlex
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import eval as eval_script
from libs import build
from libs import config as config_files
from libs.checkpoint import build_backbone, save_backbone
from libs.data.images import save_png
from libs.image_folder import ImageFolder

CONFIG = '''
from libs.defaults import base_config, uvit_backbone

def get_config(methods=""):
    config = base_config()
    config.checkpoint = "{checkpoint}"
    config.backbone = uvit_backbone(32, 8, 32, 2, 2, num_classes=11)
    config.cond.update(kind="label", num_classes=10, null_label=10)
    config.compute.update(rows=4, device="cpu")
    config.sampler.steps = 2
    config.data.path = "nowhere"
    return config
'''


@pytest.fixture
def tiny(tmp_path):
    """The path of a config of a class-conditional 32 x 32 network with random weights, saved as its checkpoint."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(checkpoint=tmp_path / "tiny.safetensors"))
    config = config_files.load(str(path))
    torch.manual_seed(0)
    net = build_backbone(config.backbone)
    torch.nn.init.normal_(net.label_emb.weight)
    save_backbone(tmp_path / "tiny.safetensors", net.state_dict(), build.describe(config))
    return path


@pytest.fixture
def run(tiny, tmp_path, run_main):
    """Run eval.main with the tiny config; (what it left behind, its result or None)."""
    def call(*argv, config=f"--config={tiny}"):
        out = tmp_path / "new" / "result.json"
        out.unlink(missing_ok=True)
        ran = run_main(eval_script.main, *([config] if config else []), f"--out={out}", *argv)
        return ran, json.loads(out.read_text()) if out.exists() else None

    return call


def value(result, name="frechet_cifar10"):
    return result["metrics"][name]["value"]


def test_one_json_and_one_row(run):
    ran, result = run("--seeds=0-9", "--config.eval.metrics=frechet_cifar10,class_accuracy", "--labels=3,5",
                      "--config.sampler.cfg_scale=1.5", "--config.sampler.eta=0.5")
    assert ran.status == 0, ran.stderr
    assert "sampling" in ran.stderr  # the bar
    header, _, row = ran.stdout.splitlines()
    assert header.startswith("| model | method | sampler | NFE | cfg_scale | GMACs | attention | frechet_cifar10 |")
    assert f"| {value(result):.3f} (10 images) | {value(result, 'class_accuracy'):.3f} (10 images) |" in row
    assert (result["nfe"], result["rows"], result["samples"]) == (2, 4, 10)
    assert (result["seeds"], result["labels"]) == ("0-9", "3,5")
    assert (result["method"], result["sampler"]["eta"]) == ({"name": "full"}, 0.5)
    assert result["metrics"]["frechet_cifar10"]["samples"] == 10
    assert result["metrics"]["frechet_cifar10"]["reference"]["images"] == 50_000
    assert len(result["checkpoint_sha256"]) == len(result["metrics"]["frechet_cifar10"]["reference"]["sha256"]) == 64
    gmacs = result["gmacs_per_image"]
    assert gmacs["with_attention_products"] > gmacs["without_attention_products"] > 0
    assert gmacs["counted_images"] == 4
    assert (result["sampling"]["images"], result["sampling"]["processes"]) == (10, 1)
    assert {"python", "torch"} <= result["versions"].keys()
    assert "benchmark" not in result


def test_the_command_inside_makes_the_result_again(run, run_main, tmp_path):
    _, first = run("--seeds=0-5", "--config.sampler.eta=1.0", "--config.eval.metrics=class_accuracy,frechet_cifar10",
                   "--labels=1")
    python, script, *argv = shlex.split(first["command"])
    assert (python, script) == ("python", "eval.py")
    assert run_main(eval_script.main, *argv).status == 0
    again = json.loads((tmp_path / "new" / "result.json").read_text())
    assert again["metrics"] == first["metrics"]
    assert again["command"] == first["command"]


def test_a_folder_scores_like_its_seeds(run, tmp_path):
    images = tmp_path / "images"
    _, from_seeds = run("--seeds=0-9", f"--keep_images={images}")
    assert len(list(images.glob("*.png"))) == 10
    save_png(images / "grid.png", torch.zeros(100, 100, 3, dtype=torch.uint8))  # not one of the images
    for config in f"--config={tmp_path / 'tiny.py'}", None:
        ran, from_folder = run(f"--images={images}", config=config)
        assert ran.status == 0, ran.stderr
        assert value(from_folder) == pytest.approx(value(from_seeds), rel=1e-6)
        assert from_folder["samples"] == 10
        assert from_folder["chain"]["checkpoint_sha256"] == from_seeds["checkpoint_sha256"]


def test_interrupted_and_gone_on(run, tmp_path, monkeypatch):
    _, whole = run("--seeds=0-9")
    images, save = tmp_path / "images", ImageFolder.save

    def interrupted(folder, seeds, batch):
        if 4 in seeds:
            raise KeyboardInterrupt
        save(folder, seeds, batch)

    monkeypatch.setattr(ImageFolder, "save", interrupted)
    ran, result = run("--seeds=0-9", f"--keep_images={images}")
    assert (ran.status, result) == (130, None)
    assert ran.stderr.endswith("error: interrupted\n")
    assert sorted(path.stem for path in images.glob("*.png")) == ["000000", "000001", "000002", "000003"]
    monkeypatch.setattr(ImageFolder, "save", save)
    for made in (6, 0):
        ran, result = run("--seeds=0-9", f"--keep_images={images}")
        assert ran.status == 0, ran.stderr
        assert result["sampling"]["images"] == made
        assert value(result) == pytest.approx(value(whole), rel=1e-6)
    ran, _ = run("--seeds=0-9", f"--keep_images={images}", "--config.sampler.steps=3")
    assert ran.status == 2
    assert ran.stderr == (f"error: --keep_images={images} holds images of another chain (sampler.steps is 2 there and "
                          "3 here); choose another folder\n")


def test_benchmark_stands_in_the_result(run):
    ran, result = run("--seeds=0-1", "--benchmark", "--config.eval.benchmark_rows=2", "--config.eval.benchmark_steps=1",
                      "--config.eval.benchmark_repeats=2")
    assert ran.status == 0, ran.stderr
    benchmark = result["benchmark"]
    assert (benchmark["nfe"], benchmark["nfe_timed"], benchmark["repeats"]) == (2, 1, 2)
    assert [batch["rows"] for batch in benchmark["batches"]] == [1, 2]
    for batch in benchmark["batches"]:
        assert batch["loop_over_network"] > 1
        low, middle, high = (batch["latency_ms"][key] for key in ("lower_quartile", "median", "upper_quartile"))
        assert 0 < low <= middle <= high
    assert "threads" in result["machine"]


def test_fid_with_random_weights(run, tmp_path, inception_file):
    """The way of a FID, end to end, on a network whose weights mean nothing."""
    for i, image in enumerate(torch.randint(0, 256, (6, 32, 32, 3), dtype=torch.uint8)):
        save_png(tmp_path / "real" / f"{i}.png", image)
    ran, result = run("--seeds=0-3", "--config.eval.metrics=fid", f"--inception_weights={inception_file}",
                      f"--config.eval.reference={tmp_path / 'real'}")
    assert ran.status == 0, ran.stderr
    assert result["metrics"]["fid"]["samples"] == 4
    assert result["metrics"]["fid"]["reference"]["images"] == 6
    assert value(result, "fid") > 0
    assert "fid" in ran.stdout


def test_two_processes(tiny, tmp_path):
    """Plain python as a command, then two processes of accelerate: images within one level of 255."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    launch = ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0"]
    results = []
    for name, launcher in ("one", []), ("two", launch):
        # 11 seeds in groups of 4 leave the processes with unequal parts
        command = [sys.executable, *launcher, "eval.py", f"--config={tiny}", "--seeds=0-10",
                   "--config.eval.metrics=frechet_cifar10,class_accuracy", f"--out={tmp_path}/{name}.json",
                   f"--keep_images={tmp_path}/{name}"]
        subprocess.run(command, check=True, cwd=config_files.ROOT, env=environment, capture_output=True)
        results.append(json.loads((tmp_path / f"{name}.json").read_text()))
    one, two = results
    assert (one["sampling"]["processes"], two["sampling"]["processes"]) == (1, 2)
    assert one["sampling"]["images"] == two["sampling"]["images"] == two["metrics"]["class_accuracy"]["samples"] == 11
    assert value(two) == pytest.approx(value(one), rel=1e-3)
    for seed in range(11):
        a, b = (np.asarray(Image.open(tmp_path / name / f"{seed:06d}.png")).astype(int) for name in ("one", "two"))
        assert abs(a - b).max() <= 1


BAD = [
    (["--seeds=5-3"], "--seeds=5-3: the range 5-3 is reversed"),
    (["--seeds=0-3", "--labels=10"], "--labels=10: label 10 is out of range; this model's classes are 0 to 9"),
    (["--seeds=0"], "eval.metrics: a Frechet distance needs at least 2 images, not 1"),
    ([], "--seeds=None, --images=None: give one of them"),
    (["--seeds=0-3", "--images=somewhere"], "--seeds=0-3, --images=somewhere: give one of them"),
    (["--images=nowhere"], "--images='nowhere' is not a folder"),
    (["--images=nowhere", "--labels=1"], "--labels=1 belongs to --seeds, not to --images"),
    (["--images=nowhere", "--benchmark"], "--benchmark belongs to --seeds, not to --images"),
    (["--seeds=0-3", "--out=result.txt"], "--out=result.txt must end in .json"),
    (["--seeds=0-3", "--out=/proc/nothing/a.json"], "--out=/proc/nothing: cannot write there"),
    (["--seeds=0-3", "--keep_images=/proc/nothing"], "--keep_images=/proc/nothing: cannot write there"),
    (["--seeds=0-3", "--checkpoint=nowhere"], "checkpoint='nowhere' is not there; give a path, or one of"),
    (["--seeds=0-3", "--checkpoint=cifar10_uvit_tiny"], "is of another architecture"),
    (["--seeds=0-3", "--config.compute.device=tpu"], "compute.device='tpu' is not available here"),
    (["--seeds=0-3", "--config.eval.metrics=fdi"], "eval.metrics='fdi' is unknown; choose from frechet_cifar10, fid"),
    (["--seeds=0-3", "--config.eval.metric=fid"], "no such field in config.eval; choose from"),
    (["--seeds=0-3", "--config.eval.reference=nowhere.npz"], "eval.reference='nowhere.npz' is neither a folder"),
    (["--seeds=0-3", "--config.eval.metrics=fid", "--inception_weights=nowhere.pth"],
     "--inception_weights=nowhere.pth does not exist; download it from"),
    (["--seeds=0-2", "--config.eval.metrics=precision_recall"], "precision_recall needs more than 3 images, not"),
    (["--images=nowhere", "--config.eval.metrics=class_accuracy"], "--images='nowhere' is not a folder"),
    (["--seeds=0-3", "--config.eval.cost_images=0"], "eval.cost_images=0 must be at least 1"),
    (["--seeds=0-3", "--config.eval.benchmark_rows=0"], "eval.benchmark_rows=(0,): want numbers of at least 1"),
    (["--seeds=0-3", "--config.eval.benchmark_repeats=1"], "eval.benchmark_repeats=1 must be at least 2"),
]


@pytest.mark.parametrize(("flags", "line"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input(run, flags, line, monkeypatch):
    monkeypatch.setattr("libs.generate.Chain.sample", lambda *args: pytest.fail("sampling began"))
    ran, result = run(*flags)
    assert (ran.status, ran.stdout, result) == (2, "", None)
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert line in ran.stderr


def test_images_that_cannot_be_scored(run, tmp_path):
    (tmp_path / "empty").mkdir()
    ran, _ = run(f"--images={tmp_path / 'empty'}")
    assert (ran.status, ran.stderr) == (2, f"error: --images='{tmp_path / 'empty'}' holds no images "
                                        "(.jpg, .jpeg, .png, .webp, .bmp)\n")
    for name, size in ("a", 32), ("b", 16):
        save_png(tmp_path / "sizes" / f"{name}.png", torch.zeros(size, size, 3, dtype=torch.uint8))
    ran, result = run(f"--images={tmp_path / 'sizes'}")
    assert (ran.status, result) == (2, None)
    assert "b.png is 16x16 but the first image is 32x32; sizes must be equal" in ran.stderr.splitlines()[-1]
    (tmp_path / "sizes" / "a.png").write_bytes(b"no image")
    ran, result = run(f"--images={tmp_path / 'sizes'}")
    assert "a.png cannot be read as an image" in ran.stderr


def test_config_is_needed_for_seeds(run):
    ran, _ = run("--seeds=0-3", config=None)
    assert (ran.status, ran.stderr) == (2, "error: --config is missing: --seeds needs a model\n")


def test_full_disk_leaves_no_result(run, tmp_path, monkeypatch):
    replace = os.replace

    def full(source, target):
        if str(target).endswith("result.json"):
            raise OSError(errno.ENOSPC, "No space left on device")
        replace(source, target)

    monkeypatch.setattr(os, "replace", full)
    ran, result = run("--seeds=0-3")
    assert (ran.status, result) == (2, None)
    assert ran.stderr.splitlines()[-1].endswith("result.json: No space left on device")
    assert not (tmp_path / "new").exists()


def test_bad_input_as_a_command(tmp_path):
    command = [sys.executable, "eval.py", "--config=configs/cifar10_unet.py", "--seeds=3-1", f"--out={tmp_path}/a.json"]
    ran = subprocess.run(command, cwd=config_files.ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: --seeds=3-1: the range 3-1 is reversed; write 1-3\n"

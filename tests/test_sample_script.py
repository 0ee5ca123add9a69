"""sample.py as a user types it: files, resuming, npz, processes, and every bad input in one line."""

import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

import sample
from libs import build
from libs import config as config_files
from libs.checkpoint import build_backbone, save_backbone

CONFIG = '''
from libs.defaults import base_config, uvit_backbone

def get_config():
    config = base_config()
    config.checkpoint = "{checkpoint}"
    config.backbone = uvit_backbone(8, 2, 32, 2, 2, num_classes=4)
    config.cond.update(kind="label", num_classes=3, null_label=3)
    config.data.image_size = 8
    config.compute.update(rows=4, device="cpu")
    config.sampler.steps = 3
    return config
'''


@pytest.fixture
def config(tmp_path):
    """The path of a config whose tiny network has random weights, saved as its checkpoint."""
    path = tmp_path / "tiny.py"
    path.write_text(CONFIG.format(checkpoint=tmp_path / "tiny.safetensors"))
    loaded = config_files.load(str(path))
    torch.manual_seed(0)
    net = build_backbone(loaded.backbone)
    torch.nn.init.normal_(net.label_emb.weight)  # classes that differ visibly
    save_backbone(tmp_path / "tiny.safetensors", net.state_dict(), build.describe(loaded))
    return path


def png(folder, seed):
    return np.asarray(Image.open(folder / f"{seed:06d}.png"))


def test_one_png_a_seed_and_a_grid(config, tmp_path, run_main):
    out = tmp_path / "out"
    ran = run_main(sample.main, f"--config={config}", "--seeds=0-5,9", f"--out={out}", "--batch_size=2", "--cost")
    assert ran.status == 0, ran.stderr
    assert sorted(path.name for path in out.glob("0*.png")) == [f"{seed:06d}.png" for seed in (*range(6), 9)]
    assert Image.open(out / "grid.png").size[0] > 8
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["nfe"], summary["images"], summary["sampler"]) == (3, 7, "ddim")
    assert summary["gmacs_per_image"]["with_attention_products"] > 0
    # another batch size, other company, labels spelled out, as npz: the same images
    npz = tmp_path / "few.npz"
    ran = run_main(sample.main, f"--config={config}", "--seeds=9,4", "--labels=0-2", f"--out={npz}")
    assert ran.status == 0, ran.stderr
    few = np.load(npz)
    assert few["seeds"].tolist() == [9, 4]
    assert few["labels"].tolist() == [0, 1]
    for image, seed in zip(few["images"], (9, 4), strict=True):
        assert np.array_equal(image, png(out, seed))
    assert not list(tmp_path.glob("few.npz.parts*"))


def test_again_makes_only_what_is_missing(config, tmp_path, run_main):
    out = tmp_path / "out"
    run_main(sample.main, f"--config={config}", "--seeds=0-3", f"--out={out}")
    first = png(out, 2)
    stamp = os.stat(out / "000002.png").st_mtime_ns
    (out / "000001.png").unlink()
    assert run_main(sample.main, f"--config={config}", "--seeds=0-4", f"--out={out}").status == 0
    assert os.stat(out / "000002.png").st_mtime_ns == stamp
    assert np.array_equal(png(out, 2), first)
    assert (out / "000001.png").exists()
    assert (out / "000004.png").exists()
    ran = run_main(sample.main, f"--config={config}", "--seeds=0-4", f"--out={out}", "--config.sampler.steps=2")
    assert ran.status == 2
    assert "sampler.steps is 3 there and 2 here" in ran.stderr


def test_labels_change_the_image_and_guidance_acts(config, tmp_path, run_main):
    images = []
    for name, *extra in (("a", "--labels=0"), ("b", "--labels=1"), ("c", "--labels=1", "--config.sampler.cfg_scale=3")):
        assert run_main(sample.main, f"--config={config}", "--seeds=7", f"--out={tmp_path / name}", *extra).status == 0
        images.append(png(tmp_path / name, 7))
    assert not np.array_equal(images[0], images[1])
    assert not np.array_equal(images[1], images[2])


def test_captures(config, tmp_path, run_main):
    """montage.png beside the grid, even where no image is missing; its last row is the images themselves."""
    command = [f"--config={config}", "--seeds=0-17", "--labels=2,0", f"--out={tmp_path / 'out'}",
               "--config.sampler.threshold=static"]
    assert run_main(sample.main, *command).status == 0
    assert not (tmp_path / "out" / "montage.png").exists()
    ran = run_main(sample.main, *command, "--captures=3")
    assert ran.status == 0, ran.stderr
    picture = np.asarray(Image.open(tmp_path / "out" / "montage.png"))
    cells, cell = picture[:, -(4 + 16 * 68):], np.ones((8, 8, 1), np.uint8)
    assert len(picture) == 4 + 3 * 68
    for seed in range(16):
        shown = [cells[4 + row * 68:68 + row * 68, 4 + seed * 68:68 + seed * 68] for row in range(3)]
        assert np.array_equal(shown[2], np.kron(png(tmp_path / "out", seed), cell))
        assert not np.array_equal(shown[1], shown[2])
        assert shown[0].std() > 40  # noise


def test_two_processes(config, tmp_path):
    """Plain python as a command; two processes of accelerate: within one level of 255."""
    one, two = tmp_path / "one", tmp_path / "two"
    command = ["sample.py", f"--config={config}", "--seeds=0-8"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    subprocess.run([sys.executable, *command, f"--out={one}"], check=True, cwd=config_files.ROOT, env=environment)
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2",
              "--main_process_port=0"]
    subprocess.run([*launch, *command, f"--out={two}"], check=True, cwd=config_files.ROOT, env=environment)
    summaries = [json.loads((out / "summary.json").read_text()) for out in (one, two)]
    assert [summary["processes"] for summary in summaries] == [1, 2]
    assert [summary["stats"] for summary in summaries] == [{"calls": 9, "rows": 36}] * 2  # three groups of three steps
    for seed in range(9):
        assert np.abs(png(one, seed).astype(int) - png(two, seed)).max() <= 1


BAD = [
    (["--seeds=5-3"], "--seeds=5-3: the range 5-3 is reversed"),
    (["--seeds=a"], "--seeds=a: 'a' is no number or range"),
    (["--labels=3"], "--labels=3: label 3 is out of range; this model's classes are 0 to 2"),
    (["--batch_size=-1"], "--batch_size=-1 must be at least 1"),
    (["--checkpoint=nowhere"], "checkpoint='nowhere' is not there; give a path, or one of"),
    (["--checkpoint=cifar10_uvit_tiny"], "is of another architecture: its backbone.depth is 12, the config's 2"),
    (["--config.sampler.stepz=5"], "no such field in config.sampler; choose from cfg_scale"),
    (["--config.sampler.steps=many"], "--config.sampler.steps=many: want an int"),
    (["--config.sampler.name=plms"], "sampler.name='plms' is unknown; choose from ddim"),
    (["--config.compute.attention=flash"], "attention='flash' is unknown; choose from sdpa, xformers, plain"),
    (["--config.compute.precision=fp8"], "compute.precision='fp8' is unknown; choose from fp32, bf16, fp16"),
    (["--config.compute.device=tpu"], "compute.device='tpu' is not available here"),
    (["--config.policy.name=clock"], "policy.name='clock' is unknown; choose from full"),
    (["--captures=1"], "--captures=1 must be 2 (noise and image) to 4 (all states of this sampler)"),
    (["--captures=5"], "--captures=5 must be 2"),
    (["--captures=2", "--out=few.npz"], "--captures=2 writes a picture into a folder, --out=few.npz is none"),
    (["--out=/proc/nothing"], "--out=/proc/nothing: cannot write there"),
]


@pytest.mark.parametrize(("flags", "message"), BAD, ids=[" ".join(flags) for flags, _ in BAD])
def test_bad_input(config, tmp_path, run_main, flags, message):
    out = tmp_path / "out"
    ran = run_main(sample.main, f"--config={config}", "--seeds=0-1", f"--out={out}", *flags)
    assert ran.status == 2
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert ran.stderr.startswith("error: ")
    assert message in ran.stderr
    assert not list(tmp_path.glob("out/*.png"))


def test_config_is_required(run_main):
    ran = run_main(sample.main)
    assert ran.status == 2
    assert "--config is missing; choose from configs/" in ran.stderr


def test_a_truncated_checkpoint(config, tmp_path, run_main):
    path = tmp_path / "tiny.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    ran = run_main(sample.main, f"--config={config}", f"--out={tmp_path / 'out'}")
    assert ran.status == 2
    assert "cannot be read (truncated or another format)" in ran.stderr


def test_a_full_disk(config, run_main, tmp_path, monkeypatch):
    """The system's refusal while writing is one line, and leaves no part of a file."""
    def refuse(*args, **kwargs):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", refuse)
    ran = run_main(sample.main, f"--config={config}", "--seeds=0-1", f"--out={tmp_path / 'out'}")
    assert ran.status == 2
    assert "No space left on device" in ran.stderr.splitlines()[-1]
    assert not list((tmp_path / "out").glob("*.png")) + list((tmp_path / "out").glob(".*tmp"))

"""scripts/emoji32_uvit.sh from captioned pictures to samples of latent U-ViTs: its commands, with tiny networks."""

import importlib
import shlex
import shutil
import subprocess
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from libs.training.state import Checkpoints

SCRIPT = Path(__file__).parents[1] / "scripts/emoji32_uvit.sh"
BASH = shutil.which("bash")
STUB = """#!{bash}
[ "$1" = -c ] && echo 0.5 && exit 0
printf '%q ' "$@" >> {calls}
echo >> {calls}
"""
NETWORK = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.embed_dim=16",
           "--config.backbone.depth=2", "--config.backbone.num_heads=2", "--config.sampler.steps=2")
TRAINING = ("--config.train.steps=2", "--config.train.batch_size=4", "--config.train.preview_every=0")
AUTOENCODER = ("--config.compute.device=cpu", "--config.backbone.block_out_channels=8,8",
               "--config.autoencoder.hold_out=3", *TRAINING)


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i, caption in enumerate(("red heart", "cat face", "a dog", "the sea", "red cat", "sea dog")):
        Image.fromarray(generator.integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(folder / f"{i:05d}.png")
        (folder / f"{i:05d}.txt").write_text(caption)
    return folder


@pytest.fixture
def run_script(tmp_path):
    """What bash says, and the commands that the script called, each a list of words."""
    venv, calls = tmp_path / "noting", tmp_path / "calls"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin/python").write_text(STUB.format(bash=BASH, calls=calls))
    (venv / "bin/python").chmod(0o755)
    (venv / "bin/activate").write_text(f"PATH={venv}/bin:$PATH\n")

    def run(*argv):
        ran = subprocess.run([BASH, SCRIPT, *map(str, argv)], env={"PATH": "/usr/bin:/bin", "VENV": str(venv)},
                             capture_output=True, text=True)
        noted = [shlex.split(line) for line in calls.read_text().splitlines()] if calls.exists() else []
        return ran, [words for words in noted if words[:2] != ["-m", "pip"]]

    return run


def test_from_pictures_to_samples(pictures, run_script, run_main, tmp_path):
    out = tmp_path / "out"
    ran, calls = run_script(pictures, out)
    assert (ran.returncode, ran.stderr) == (0, "")
    for call in calls:
        name, argv = (call[1], call[2:]) if call[0] == "-m" else (call[0].removesuffix(".py"), call[1:])
        config = next((word for word in argv if word.startswith("--config=")), "")
        more = AUTOENCODER if "autoencoder.py" in config else NETWORK if name == "sample" else ()
        more += (*NETWORK, *TRAINING) if name == "train" and not more else ()
        more += ("--seeds=0-1",) if name == "sample" else ()
        done = run_main(importlib.import_module(name).main, *argv, *more)
        assert done.status == 0, (call, done.stderr)
    for regime in ("continuous", "discrete", "text"):
        assert Checkpoints(out / regime / "ckpts").steps() == [2]
        images = [np.array(Image.open(out / f"samples_{regime}" / f"{seed:06d}.png")) for seed in (0, 1)]
        assert images[0].shape == (32, 32, 3)
        assert not np.array_equal(*images)


def test_a_tar_is_unpacked_once(pictures, run_script, tmp_path):
    with tarfile.open(tmp_path / "pictures.tar", "w") as tar:
        for path in sorted(pictures.iterdir()):
            tar.add(path, path.name)
    out = tmp_path / "out"
    ran, calls = run_script(tmp_path / "pictures.tar", out)
    assert ran.returncode == 0, ran.stderr
    assert sorted(path.name for path in (out / "pictures").iterdir()) == sorted(p.name for p in pictures.iterdir())
    assert f"--images={out}/pictures" in calls[0]
    (out / "pictures/00000.png").unlink()
    run_script(tmp_path / "pictures.tar", out)
    assert not (out / "pictures/00000.png").exists()


def test_wants_pictures(run_script, tmp_path):
    ran, calls = run_script()
    assert (ran.returncode, ran.stderr, calls) == (
        2, "error: no pictures given; usage: bash scripts/emoji32_uvit.sh PICTURES [OUT]\n", [])
    ran, calls = run_script(tmp_path / "none")
    assert (ran.returncode, calls) == (2, [])
    assert ran.stderr.endswith("is not there; want a folder or a .tar of captioned pictures\n")

"""scripts/emoji32_uvit.sh from captioned pictures to samples of latent U-ViTs: its commands, with tiny networks."""

import importlib
import tarfile
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from shell_scripts import noting

from libs.training.state import Checkpoints

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
    factor = '[ "$1" = -c ] && echo 0.5 && exit 0'  # the scale of the latents, which the script asks for
    return partial(noting(tmp_path, factor), "emoji32_uvit.sh")


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


def calls_of(calls, script):
    """Those of a script, as {flag: value}, in the order of the calls."""
    return [dict(word.removeprefix("--").partition("=")[::2] for word in words[1:])
            for words in calls if words[0] == script]


def test_every_regime_is_trained_and_sampled_with_its_own_config(pictures, run_script, tmp_path):
    out = tmp_path / "out"
    ran, calls = run_script(pictures, out)
    assert ran.returncode == 0, ran.stderr
    configs = {"continuous": "configs/emoji32_uvit.py", "discrete": "configs/emoji32_uvit.py:discrete",
               "text": "configs/emoji32_uvit.py:text"}
    trained = {Path(flags["workdir"]).name: flags["config"] for flags in calls_of(calls, "train.py")}
    assert trained == {"autoencoder": "configs/emoji32_autoencoder.py", **configs}
    sampled = calls_of(calls, "sample.py")
    assert {Path(flags["checkpoint"]).name: flags["config"] for flags in sampled} == configs
    assert [flags.get("prompts") for flags in sampled] == [None, None, f"{out}/captions.json"]


def test_regimes_prompts_and_flags_of_the_user(pictures, run_script, tmp_path):
    (tmp_path / "my prompts.txt").write_text("a red heart\n")
    ran, calls = run_script(pictures, tmp_path / "out", "--", "--config.train.steps=7", REGIMES="text discrete",
                            PROMPTS=tmp_path / "my prompts.txt")
    assert (ran.returncode, ran.stderr) == (0, "")
    trained = calls_of(calls, "train.py")
    assert [flags.get("config.train.steps") for flags in trained] == [None, "7", "7"]
    assert [Path(flags["workdir"]).name for flags in trained] == ["autoencoder", "text", "discrete"]
    sampled = calls_of(calls, "sample.py")
    assert [Path(flags["checkpoint"]).name for flags in sampled] == ["text", "discrete"]
    assert [flags.get("prompts") for flags in sampled] == [str(tmp_path / "my prompts.txt"), None]


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


@pytest.mark.parametrize(("argv", "env", "message"), [
    ([], {}, "error: no pictures given; usage: bash scripts/emoji32_uvit.sh PICTURES [OUT] [-- FLAGS]\n"),
    (["--", "--config.train.steps=7"], {}, "no pictures given"),
    (["none"], {}, "none is not there; want a folder or a .tar of captioned pictures\n"),
    ([".", "out", "--config.train.steps=7"], {}, "'--config.train.steps=7' is one too many, flags of train.py stand "),
    (["."], {"REGIMES": "pixels"}, "error: REGIMES: 'pixels' is none; choose from continuous, discrete, text\n"),
    (["."], {"PROMPTS": "none.txt"}, "error: PROMPTS=none.txt is not there\n"),
])
def test_mistakes_are_told_in_one_line(run_script, argv, env, message):
    ran, calls = run_script(*argv, **env)
    assert (ran.returncode, calls, ran.stderr.count("\n")) == (2, [], 1)
    assert message in ran.stderr

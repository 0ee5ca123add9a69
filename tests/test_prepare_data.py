"""prepare_data.py as a user types it."""

import subprocess
import sys

import pytest
import torch

import prepare_data
from libs import config as config_files
from libs.data import load_data
from libs.data.images import save_png
from libs.data.pictures import Pictures
from libs.metrics import make_extractor
from libs.metrics.frechet import Statistics, frechet_distance
from libs.metrics.statistics import feature_statistics

CONFIG = "--config=configs/cifar10_uvit_tiny.py"


@pytest.fixture
def images(tmp_path):
    """8 images of 32 x 32 in tmp_path/images."""
    pictures = torch.randint(0, 256, (8, 32, 32, 3), dtype=torch.uint8)
    for i, picture in enumerate(pictures):
        save_png(tmp_path / "images" / f"{i}.png", picture)
    return pictures


def test_statistics_of_a_folder_and_of_a_data_set(run_main, tmp_path, images):
    expected = feature_statistics([images], make_extractor("cifar10_resnet"))
    of_folder = [f"--images={tmp_path / 'images'}", "--batch_size=3"]
    of_data = [CONFIG, "--config.data.name=folder", f"--config.data.path={tmp_path / 'images'}",
               "--config.compute.device=cpu"]
    for name, argv in ("folder", of_folder), ("data", of_data):
        out = tmp_path / "made" / f"{name}.npz"
        ran = run_main(prepare_data.main, "stats", *argv, f"--out={out}")
        assert ran.status == 0, ran.stderr
        assert ran.stdout == f"{out}: mu and sigma of 8 images, 512 features of cifar10_resnet\n"
        held = Statistics.load(out)
        assert (held.n, held.features) == (8, "cifar10_resnet")
        torch.testing.assert_close(torch.from_numpy(held.mu), torch.from_numpy(expected.mu), rtol=1e-4, atol=1e-5)
        assert frechet_distance(held, expected) < 1e-4
    assert not list((tmp_path / "images").rglob(".*"))  # no decoded images are kept


def test_statistics_take_the_decoded_images_that_a_training_has_kept(run_main, tmp_path, images, monkeypatch):
    load_data("folder", tmp_path / "images", image_size=32)
    [kept] = (tmp_path / "images").glob(".images_*.npy")
    monkeypatch.setattr(Pictures, "decode", None)
    ran = run_main(prepare_data.main, "stats", CONFIG, "--config.data.name=folder", "--config.compute.device=cpu",
                   f"--config.data.path={tmp_path / 'images'}", f"--out={tmp_path / 'a.npz'}")
    assert ran.status == 0, ran.stderr
    assert kept.is_file()


def test_inception_statistics(run_main, tmp_path, images, inception_file):
    out = tmp_path / "inception.npz"
    ran = run_main(prepare_data.main, "stats", "--features=inception", f"--images={tmp_path / 'images'}",
                   f"--inception_weights={inception_file}", f"--out={out}")
    assert ran.status == 0, ran.stderr
    held = Statistics.load(out)
    assert (held.n, held.features, held.dim) == (8, "inception_legacy_pytorch", 2048)


BAD = [
    ([], "no command given; choose from stats"),
    (["stat"], "'stat' is no command; choose from stats"),
    (["stats"], "--out is missing"),
    (["stats", "--out=stats.npy", CONFIG], "--out=stats.npy must end in .npz"),
    (["stats", "--out={}/a.npz"], "give --config, whose data set is read, or --images=DIR"),
    (["stats", "--out={}/a.npz", "--images=nowhere"], "--images='nowhere' is not a folder"),
    (["stats", "--out={}/a.npz", CONFIG, "--config.data.path=nowhere"], "data.path='nowhere' is not a folder"),
    (["stats", "--out={}/a.npz", CONFIG, "--config.data.name=svhn"], "data.name='svhn' is unknown; choose from digits"),
    (["stats", "--out={}/a.npz", "--images={}", "--features=vgg"], "--features=vgg: want one of cifar10_resnet, incep"),
    (["stats", "--out={}/a.npz", "--images={}", "--batch_size=0"], "--batch_size=0: want a positive integer"),
    (["stats", "--out={}/a.npz", "--images={}"], "holds no images"),
    (["stats", "--out=/proc/nothing/a.npz", "--images={}"], "--out=/proc/nothing: cannot write there"),
    (["stats", "--out={}/a.npz", CONFIG, "--config.data.name=digits", "--config.data.image_size=8",
      "--config.data.channels=1"], "needs images of 32x32x3, not 8x8x1"),
]


@pytest.mark.parametrize(("argv", "line"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input(run_main, tmp_path, argv, line):
    ran = run_main(prepare_data.main, *(arg.format(tmp_path) for arg in argv))
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert line in ran.stderr
    assert list(tmp_path.iterdir()) == []


def test_weights_that_are_missing(run_main, tmp_path, images):
    ran = run_main(prepare_data.main, "stats", f"--images={tmp_path / 'images'}", "--features=inception",
                   "--inception_weights=nowhere.pth", f"--out={tmp_path}/a.npz")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.startswith("error: --inception_weights=nowhere.pth does not exist; download it from")


def test_one_image_is_too_few(run_main, tmp_path):
    save_png(tmp_path / "one" / "a.png", torch.zeros(32, 32, 3, dtype=torch.uint8))
    ran = run_main(prepare_data.main, "stats", f"--images={tmp_path}/one", f"--out={tmp_path}/a.npz")
    last = ran.stderr.splitlines()[-1]  # on a slow machine a bar stands before it
    assert (ran.status, last) == (2, "error: feature statistics need at least 2 images, got 1")
    assert not (tmp_path / "a.npz").exists()


def test_as_a_command(tmp_path, images):
    command = [sys.executable, "prepare_data.py", "stats", f"--images={tmp_path}/images", f"--out={tmp_path}/a.npz"]
    ran = subprocess.run(command, cwd=config_files.ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")
    assert Statistics.load(tmp_path / "a.npz").n == 8
    ran = subprocess.run([*command, "--images=nowhere"], cwd=config_files.ROOT, capture_output=True, text=True)
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr == "error: --images='nowhere' is not a folder\n"

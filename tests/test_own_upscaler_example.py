"""docs/own_model.md's example of a super-resolution model of one's own, as it stands there."""

import json

import pytest
import torch
from documentation import code_and_commands, run_commands
from PIL import Image

from libs.data.images import save_png

FEW = {  # what makes minutes seconds
    "train": ["--config.train.steps=4", "--config.train.batch_size=8", "--config.train.preview_every=0"],
    "sample": ["--config.sampler.steps=2"],
    "eval": ["--config.sampler.steps=2"],
}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands of the example, run in a folder with its file and some photos."""
    code, commands = code_and_commands("Your own model of images")
    (tmp_path / "my_upscaler.py").write_text(code)
    for i, image in enumerate(torch.randint(0, 256, (3, 20, 16, 3), dtype=torch.uint8)):
        save_png(tmp_path / f"photos/{i}.png", image)
    monkeypatch.chdir(tmp_path)
    return commands


def test_the_example_trains_samples_and_is_scored(commands, tmp_path, run_main):
    assert run_commands(commands, FEW, run_main) == ["train", "sample", "eval"]
    summary = json.loads((tmp_path / "outputs/upscaler/summary.json").read_text())
    assert (summary["images"], summary["cfg_scale"]) == (16, 1.5)
    assert Image.open(tmp_path / "outputs/upscaler/grid.png").size == (2 + 4 * (3 * 32 + 2), 2 + 4 * (32 + 2))
    score = json.loads((tmp_path / "outputs/upscaler.json").read_text())["metrics"]["psnr"]
    assert score.keys() == {"value", "bicubic", "samples", "pixels"}

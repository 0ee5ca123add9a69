"""docs/own_model.md's example of a model of one's own that reads captions, as it stands, with a small text encoder."""

import json

import pytest
import torch
from documentation import code_and_commands, run_commands
from tiny_texts import TOKENS, write_text_encoders

from libs.data.images import save_png

FEW = {  # what makes minutes seconds
    "train": ["--config.train.steps=4", "--config.train.batch_size=8", "--config.train.preview_every=0"],
    "distillate": ["--config.train.steps=4", "--config.train.batch_size=8", "--config.train.preview_every=0",
                   "--config.distill.stage_updates=1,1,1,1", "--config.distill.teacher_steps=4"],
    "sample": [],
    "eval": ["--config.sampler.steps=2"],
}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands of the example, run in a folder with its file, captioned pictures and some photos."""
    code, commands = code_and_commands("Captions for your own model")
    write_text_encoders(tmp_path)
    small = {'"openai/clip-vit-large-patch14"': f'"{tmp_path / "projection"}"', "= 77, 768": f"= {TOKENS}, 32"}
    for theirs, ours in small.items():
        assert code.count(theirs) == 1
        code = code.replace(theirs, ours)
    (tmp_path / "my_captioned.py").write_text(code)
    for i, image in enumerate(torch.randint(0, 256, (3, 20, 16, 3), dtype=torch.uint8)):
        save_png(tmp_path / f"photos/{i}.png", image)
        save_png(tmp_path / f"pictures/{i}.png", image)
        (tmp_path / f"pictures/{i}.txt").write_text(("a cat", "a red dog", "the sea")[i])
    (tmp_path / "captions.txt").write_text("a cat\na dog\n")
    monkeypatch.chdir(tmp_path)
    return commands


def test_the_example_trains_distils_samples_and_is_scored(commands, tmp_path, run_main):
    assert run_commands(commands, FEW, run_main) == ["train", "distillate", "sample", "eval"]
    summary = json.loads((tmp_path / "outputs/captioned/summary.json").read_text())
    assert (summary["nfe"], summary["cfg_scale"], summary["prompts"]) == (4, 1.0, "a red bird")
    result = json.loads((tmp_path / "outputs/captioned.json").read_text())
    assert (result["prompts"], result["sampler"]["cfg_scale"]) == ("captions.txt", 2.0)
    assert result["metrics"]["psnr"].keys() == {"value", "bicubic", "samples", "pixels"}

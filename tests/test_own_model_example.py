"""docs/own_model.md's example of a model and a data set of one's own, as it stands there."""

import json

import pytest
from documentation import code_and_commands, run_commands

FEW = {  # what makes minutes seconds
    "train": ["--config.train.steps=4", "--config.train.batch_size=8", "--config.train.preview_every=0"],
    "distillate": ["--config.train.steps=2", "--config.train.batch_size=8", "--config.train.preview_every=0"],
    "sample": ["--config.compute.rows=4"],
}


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """The commands of the example, run in a folder with its file."""
    code, commands = code_and_commands("Your own model and images")
    (tmp_path / "my_model.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return commands


def test_the_example_trains_distils_and_samples(commands, tmp_path, run_main):
    assert run_commands(commands, FEW, run_main) == ["train", "distillate", "sample"]
    assert [each["finished"] for each in json.loads((tmp_path / "runs/own_students/stages.json").read_text())["stages"]
            ] == [True, True]
    summary = json.loads((tmp_path / "outputs/own/summary.json").read_text())
    assert (summary["nfe"], summary["images"]) == (4, 16)

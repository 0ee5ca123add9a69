"""What a training refuses before its first step, and the precision it runs in."""

import pytest
import torch
from tiny_training import CPU, tiny_config

from libs.errors import UserError
from libs.training import load_training_data, new_network, validate
from libs.training.setup import choose_precision, start_network


@pytest.mark.parametrize(("field", "value", "text"), [
    ("train.steps", 0, "train.steps=0 must be at least 1"),
    ("train.log_every", 0, "train.log_every=0 must be at least 1"),
    ("train.ema", 1.0, "train.ema=1.0 is too large"),
    ("train.decay_from", 1.5, "train.decay_from=1.5 is too large"),
    ("train.lr", 0.0, "train.lr=0.0 must be positive"),
    ("train.betas", (0.9, 1.0), "train.betas="),
    ("cond.drop", 1.5, "cond.drop=1.5 must lie between 0 and 1"),
    ("seed", -1, "seed=-1 must be from 0"),
    ("train.eval_every", 5, "train.eval_every=5: eval.metrics names nothing"),
    ("train.accumulate", 3, r"train.batch_size=8 cannot be divided among 1 process x 3 \(train.accumulate\)"),
])
def test_bad_numbers(field, value, text):
    config = tiny_config()
    validate(config)
    config.update_from_flattened_dict({field: value})
    with pytest.raises(UserError, match=text):
        validate(config)


def test_batch_that_processes_cannot_share():
    validate(tiny_config(), 4)
    with pytest.raises(UserError, match="train.batch_size=8 cannot be divided among 3 processes x 1"):
        validate(tiny_config(), 3)


@pytest.mark.parametrize(("changes", "text"), [
    ({"cond.num_classes": 9}, "cond.num_classes=9: the data set has labels up to 9"),
    ({"cond.null_label": -1}, "cond.drop=0.1: there is no cond.null_label"),
    ({"cond.kind": "text"}, r"cond.kind='text': this network takes no text tokens \(backbone.num_clip_token\)"),
    ({"cond.kind": "words"}, "cond.kind='words' is unknown; choose from none, label, text"),
])
def test_labels_that_do_not_fit(changes, text):
    config = tiny_config()
    config.update_from_flattened_dict(changes)
    _, description = new_network(config)
    with pytest.raises(UserError, match=text):
        load_training_data(config.data, description, CPU)


def test_network_that_does_not_fit():
    config = tiny_config()
    config.cond.kind = "none"
    with pytest.raises(UserError, match="cond.kind='none', but the network has classes"):
        start_network(config, None)
    _, description = new_network(tiny_config())
    with pytest.raises(UserError, match="data.image_size=16, data.channels=1: this network is for images of 8x8x1"):
        load_training_data(config.data.to_dict() | {"image_size": 16}, description, CPU)


def test_labels_that_are_missing(tmp_path):
    from libs.data.images import save_png

    save_png(tmp_path / "a.png", torch.zeros(8, 8, 1, dtype=torch.uint8))
    section = tiny_config().data.to_dict() | {"name": "folder", "path": str(tmp_path)}
    _, description = new_network(tiny_config())
    with pytest.raises(UserError, match="cond.kind='label': the data set 'folder' has no labels"):
        load_training_data(section, description, CPU)


def test_launcher_decides_the_precision(monkeypatch):
    config = tiny_config()
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)
    config.compute.precision = "bf16"
    assert choose_precision(config) == "bf16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    assert choose_precision(config) == "fp16"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    assert choose_precision(config) == "fp32"
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp8")
    with pytest.raises(UserError, match="--mixed_precision='fp8' is unknown; choose from no, bf16, fp16"):
        choose_precision(config)
    config.compute.precision = "fp8"
    with pytest.raises(UserError, match="compute.precision='fp8'"):
        choose_precision(config)

"""The four regimes of U-ViT through one set of scripts: each trains, goes on, samples, is scored. Training on texts."""

import json

import pytest
import torch
from text_regimes import CAPTIONS, CPU, REGIMES, SHOWN, TOKENS, load, make_root, png
from tiny_pipelines import CROSS

import eval as eval_script
import sample
import train
from libs.checkpoint import read
from libs.codecs import make_codec
from libs.errors import UserError
from libs.generate import Chain
from libs.text import TextEncoder
from libs.training import Batches, load_training_data, new_network


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("regimes"))


# The regimes


@pytest.mark.parametrize("name", REGIMES)
def test_a_regime_trains_goes_on_samples_and_is_scored(root, tmp_path, run_main, name):
    command = [f"--config={root / f'{name}.py'}"]
    prompts = [f"--prompts={root / 'prompts.txt'}"] if name == "text" else []
    for run, steps in (("parts", 2), ("parts", 4), ("whole", 4)):
        ran = run_main(train.main, *command, f"--config.train.steps={steps}", f"--workdir={tmp_path / run}")
        assert ran.status == 0, ran.stderr
    parts, whole = (read(tmp_path / run / "ckpts" / "00000004" / "backbone.safetensors")[0]
                    for run in ("parts", "whole"))
    first = read(tmp_path / "parts" / "ckpts" / "00000002" / "backbone.safetensors")[0]
    assert all(torch.equal(parts[field], whole[field]) for field in whole)
    learnt = {"text": "context_embed.weight", "pixels": "pos_embed"}.get(name, "label_emb.weight")
    assert not torch.equal(first[learnt], whole[learnt])

    command += [f"--checkpoint={tmp_path / 'parts'}", "--seeds=0-3", *prompts]
    ran = run_main(sample.main, *command, f"--out={tmp_path / 'images'}")
    assert ran.status == 0, ran.stderr
    assert png(tmp_path / "images", 3).shape == (32, 32, 3)
    ran = run_main(eval_script.main, *command, f"--keep_images={tmp_path / 'images'}", f"--out={tmp_path}/a.json")
    assert ran.status == 0, ran.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert result["sampling"]["images"] == 0  # all of them are sample.py's
    assert result["metrics"]["frechet_cifar10"]["samples"] == 4
    assert result["metrics"]["frechet_cifar10"]["value"] > 0


# Training on texts


def joined(batches, step=0):
    parts = list(batches.parts(step))
    return torch.cat([part.x_0 for part in parts]), torch.cat([part.cond["context"] for part in parts])


def batches(root, size, drop=0.3, **options):
    config = load(root)
    _, description = new_network(config)
    data = load_training_data(config.data, description, CPU)
    codec = make_codec(config.codec)
    return data, Batches(data, codec, {"kind": "text", "drop": drop}, True, 5, size, **options)


def test_captions_are_drawn_evenly_and_some_replaced_by_the_empty_one(root):
    data, source = batches(root, 2000)
    [batch] = source.parts(0)
    indices = source.order(batch.positions)
    context = batch.cond["context"]
    assert context.shape == (2000, TOKENS, CROSS)
    dropped = (context == data.empty_context).all(dim=(1, 2))
    assert abs(dropped.float().mean() - 0.3) < 0.04
    encoder = TextEncoder(str(root / "clip"), TOKENS)
    counts = [sum(int((context[(indices == i) & ~dropped] == each).all(dim=(1, 2)).sum())
                  for each in encoder(captions)) for i, captions in enumerate(CAPTIONS)]
    assert sum(counts) == int((~dropped).sum())  # every text is a caption of its own image
    own = context[(indices == 2) & ~dropped]
    shares = [float((own == each).all(dim=(1, 2)).float().mean()) for each in encoder(CAPTIONS[2])]
    assert all(abs(share - 1 / 3) < 0.09 for share in shares)
    # latents are drawn from their moments, scaled, and never mirrored
    mean, logvar = data.batch(indices)[0].chunk(2, dim=1)
    noise = (batch.x_0 / 0.23010 - mean) / torch.exp(0.5 * logvar)
    assert abs(noise.mean()) < 0.01
    assert abs(noise.std() - 1) < 0.01


def test_a_batch_of_texts_does_not_depend_on_how_it_is_cut(root):
    whole = joined(batches(root, 12)[1], step=4)
    for count, accumulate in ((1, 3), (2, 1), (2, 3)):
        parts = [joined(batches(root, 12, accumulate=accumulate, rank=rank, count=count)[1], step=4)
                 for rank in range(count)]
        assert all(torch.equal(torch.cat(one), other) for one, other in zip(zip(*parts, strict=True), whole,
                                                                            strict=True))
    others = joined(batches(root, 12)[1], step=5)
    assert not any(torch.equal(one, other) for one, other in zip(others, whole, strict=True))


def test_previews_and_measurements_show_the_data_sets_texts(root, tmp_path, run_main, monkeypatch):
    """First the prompts of run_vis, then the images' own first captions."""
    shown = []
    plain = Chain.sample
    monkeypatch.setattr(Chain, "sample", lambda chain, seeds, labels=None: (
        shown.append((seeds, chain.contexts(seeds))), plain(chain, seeds, labels))[1])
    ran = run_main(train.main, f"--config={root / 'text.py'}", "--config.train.steps=2", "--config.train.eval_every=2",
                   "--config.train.eval_images=7", "--config.train.preview_every=2", "--config.train.preview_images=4",
                   f"--workdir={tmp_path}")
    assert ran.status == 0, ran.stderr
    assert (tmp_path / "previews" / "00000002.png").is_file()
    encoder = TextEncoder(str(root / "clip"), TOKENS)
    expected = encoder([*SHOWN, CAPTIONS[2][0], CAPTIONS[3][0], CAPTIONS[0][0], CAPTIONS[1][0], CAPTIONS[2][0]])
    assert sorted(seed for seeds, _ in shown for seed in seeds) == sorted([*range(4), *range(7)])
    for seeds, contexts in shown:
        assert torch.equal(contexts, expected[seeds])


@pytest.mark.parametrize(("name", "changes", "line"), [
    ("text", {"data.name": "folder", "data.path": "images"}, "cond.kind='text': the data set 'folder' gives no texts'"),
    ("text", {"data.path": "imagenet"}, "has no captions"),
    ("text", {"backbone.clip_dim": 16}, "holds texts of 9x32 (tokens, width); this network takes 9x16"),
    ("text", {"backbone.num_clip_token": 7}, "holds texts of 9x32 (tokens, width); this network takes 7x32"),
    ("text", {"backbone.img_size": 16}, "holds latents of 4x8x8 (channels, height, width); this network takes 4x16x16"),
    ("text", {"cond.kind": "none"}, "cond.kind='none': this network takes 9 text tokens (backbone.num_clip_token)"),
    ("text", {"codec": {"name": "pixel"}}, "data.name='features': latents are decoded by codec.name='kl', not 'pixel'"),
    ("continuous", {"data.path": "coco"}, "cond.kind='label': the data set 'features' has no labels"),
    ("continuous", {"cond.num_classes": 2}, "cond.num_classes=2: the data set has labels up to 2"),
])
def test_features_that_do_not_fit(root, name, changes, line):
    config = load(root, name)
    with config.unlocked():
        for field, value in changes.items():
            section, _, field = field.partition(".")
            if field == "path":
                value = str(root / value)
            config.update({section: {**config[section], field: value} if field else value})
    _, description = new_network(config)
    with pytest.raises(UserError) as error:
        load_training_data(config.data, description, CPU)
    assert line in str(error.value)

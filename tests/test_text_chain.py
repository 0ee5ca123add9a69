"""The four regimes of U-ViT through one set of scripts: pixels, latents with continuous and with discrete time, text to
image. Each trains, goes on, samples and is scored; and what is particular to texts.
"""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import CROSS, autoencoder, clip_text_model, clip_tokenizer
from two_processes import run_in_two

import distillate
import eval as eval_script
import sample
import train
from libs import build
from libs import config as config_files
from libs.checkpoint import read
from libs.codecs import make_codec
from libs.cost import gmacs_per_image
from libs.data.feature_files import write_feature
from libs.data.images import save_png
from libs.denoiser import Prediction
from libs.errors import UserError
from libs.generate import Chain
from libs.text import TextEncoder
from libs.training import Batches, load_training_data, new_network

CPU = torch.device("cpu")
TOKENS = 9
CAPTIONS = [["a cat", "the cat"], ["a red dog"], ["the sea", "the red sea", "a photo of the sea"], ["a dog of the sea"]]
SHOWN = ["a photo of a cat", "the red sea"]

REGIMES = {
    "pixels": """
    config.backbone = uvit_backbone(32, 8, 16, 2, 2)
    config.schedule = {"name": "vp_linear"}
    config.data.update(name="folder", path="{root}/images")
    """,
    "continuous": """
    config.backbone = uvit_backbone(8, 2, 16, 2, 2, in_chans=4, num_classes=4)
    config.schedule = {"name": "vp_linear"}
    config.cond.update(kind="label", num_classes=3, null_label=3, drop=0.2)
    config.codec = {"name": "kl", "pretrained": "{root}/vae", "scale_factor": 0.18215}
    config.data.update(name="features", path="{root}/imagenet")
    config.sampler.cfg_scale = 1.4
    """,
    "discrete": """
    config.backbone = uvit_backbone(8, 2, 16, 2, 2, in_chans=4, num_classes=4, conv=False)
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.time_input = "step"
    config.cond.update(kind="label", num_classes=3, null_label=3, drop=0.1)
    config.codec = {"name": "kl", "pretrained": "{root}/vae", "scale_factor": 0.18215}
    config.data.update(name="features", path="{root}/imagenet")
    config.sampler.cfg_scale = 1.4
    """,
    "text": """
    config.backbone = uvit_backbone(8, 2, 16, 2, 2, in_chans=4, clip_dim=32, num_clip_token=9)
    config.schedule = {"name": "scaled_linear", "steps": 1000}
    config.denoiser.time_input = "step"
    config.cond.update(kind="text", drop=0.3, text_encoder="{root}/clip", tokens=9)
    config.codec = {"name": "kl", "pretrained": "{root}/vae", "scale_factor": 0.23010}
    config.data.update(name="features", path="{root}/coco", flip=False)
    config.sampler.update(name="dpm_solver_pp_singlestep", order=3, grid="uniform", t_end=1e-3, cfg_scale=2.0)
    """,
}
CONFIG = '''
from libs.defaults import base_config, uvit_backbone
from libs.methods import METHODS, apply_methods

def get_config(methods=""):
    config = base_config()
    config.compute.update(rows=3, device="cpu")
    config.data.update(image_size=32, channels=3)
    config.sampler.steps = 3
    config.train.update(batch_size=4, warmup=0, lr=1e-3, save_every=2, log_every=1, preview_every=0, keep=9)
    config.eval.update(reference="{root}/images", cost_images=2)
    {regime}
    apply_methods(config, methods, METHODS)
    return config
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Images, an autoencoder, a text encoder, features of both kinds, and a config for each regime."""
    root = tmp_path_factory.mktemp("regimes")
    generator = torch.Generator().manual_seed(0)
    for i in range(6):
        save_png(root / "images" / f"{i}.png", torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8,
                                                             generator=generator))
    autoencoder().save_pretrained(root / "vae")
    tokenizer = clip_tokenizer(root / "vocabulary")
    clip_text_model(tokenizer).save_pretrained(root / "clip")
    tokenizer.save_pretrained(root / "clip")
    encoder = TextEncoder(str(root / "clip"), TOKENS)
    for i in range(5):
        write_feature(root / "imagenet" / f"{i}.npy", moments(generator), i % 3)
    for i, captions in enumerate(CAPTIONS):
        write_feature(root / "coco" / "train" / f"{i}.npy", moments(generator))
        for k, context in enumerate(encoder(captions)):
            write_feature(root / "coco" / "train" / f"{i}_{k}.npy", context.numpy())
    write_feature(root / "coco" / "empty_context.npy", encoder.empty.numpy())
    for j, context in enumerate(encoder(SHOWN)):
        write_feature(root / "coco" / "run_vis" / f"{j}.npy", SHOWN[j], context.numpy())
    (root / "prompts.txt").write_text("\n".join(SHOWN))
    for name, regime in REGIMES.items():
        (root / f"{name}.py").write_text(CONFIG.replace("{regime}", regime.strip("\n ")).replace("{root}", str(root)))
    return root


def moments(generator):
    """(8, 8, 8): means of unit size, small variances."""
    return torch.cat([torch.randn(4, 8, 8, generator=generator), torch.full((4, 8, 8), -4.0)]).numpy()


@pytest.fixture(scope="module")
def text_model(root):
    """The folder of a training run of two steps, made visible: its network listens to its texts."""
    assert train.main([f"--config={root / 'text.py'}", "--config.train.steps=2", f"--workdir={root / 'text'}"]) == 0
    return root / "text"


def load(root, name="text", **fields):
    config = config_files.load(str(root / f"{name}.py"))
    with config.unlocked():
        config.update_from_flattened_dict(fields)
    return config


def text_chain(root, prompts=None, **fields):
    """A chain whose network is random and large enough that texts show."""
    config = load(root, **fields)
    net, description = new_network(config)
    torch.nn.init.normal_(net.context_embed.weight)
    contexts = build.make_contexts(prompts or str(root / "prompts.txt"), description, CPU)
    return build.make_chain(config, net.eval(), description, CPU, contexts)


def png(folder, seed):
    return np.asarray(Image.open(folder / f"{seed:06d}.png")).astype(int)


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


# Sampling from texts


def test_an_image_depends_on_its_seed_and_prompt_alone(root):
    chain = text_chain(root)
    seeds = [5, 0, 9, 3, 2**40 + 1, 8, 1]
    reference = torch.cat([chain.sample(seeds[i:i + 3]) for i in range(0, 7, 3)])
    order = [3, 6, 0, 4, 5, 1, 2]
    shuffled = torch.cat([chain.sample([seeds[i] for i in order[j:j + 2]]) for j in range(0, 7, 2)])
    assert torch.equal(shuffled, reference[order])
    # seeds 5 and 9 show prompt 1 of 2: alone, as the only prompt, and beside others
    assert torch.equal(text_chain(root, SHOWN[1]).sample([5, 9]), reference[[0, 2]])
    assert not torch.equal(text_chain(root, SHOWN[0]).sample([5, 9]), reference[[0, 2]])


def test_stored_features_are_as_good_as_the_text_encoder(root):
    stored = text_chain(root, str(root / "coco" / "run_vis"), **{"cond.text_encoder": "/nowhere"})
    assert torch.equal(stored.sample([0, 1, 2]), text_chain(root).sample([0, 1, 2]))


def test_guidance_is_against_the_empty_text_in_one_call(root):
    chain = text_chain(root)
    encoder = TextEncoder(str(root / "clip"), TOKENS)
    seen = []
    chain.policy.net.register_forward_pre_hook(lambda net, args, kwargs: seen.append(kwargs["context"]),
                                               with_kwargs=True)
    guided = chain.sample([0, 1, 2])
    assert len(seen) == chain.nfe
    texts = encoder([SHOWN[0], SHOWN[1], SHOWN[0]])
    assert all(torch.equal(each, torch.cat([texts, encoder([""] * 3)])) for each in seen)

    class ByHand:
        """cond + s (cond - uncond) with s = w - 1, U-ViT's way, in two calls."""

        def __init__(self, denoiser, contexts, empty):
            self.denoiser, self.schedule = denoiser, denoiser.schedule
            self.contexts, self.empty = contexts, empty

        def time_input(self, t):
            return self.denoiser.time_input(t)

        def __call__(self, x_t, t, cond):
            pair = [self.denoiser(x_t, t, {"context": each}) for each in (self.contexts, self.empty)]
            return Prediction(*(cond + 1.0 * (cond - uncond) for cond, uncond in zip(*pair, strict=True)))

    plain = text_chain(root, **{"sampler.cfg_scale": 1.0})
    plain.denoiser = ByHand(plain.denoiser, texts, encoder([""] * 3))
    torch.testing.assert_close(plain.sample([0, 1, 2]), guided, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(text_chain(root, **{"sampler.cfg_scale": 1.0}).sample([0, 1, 2]), guided, atol=1e-2)


def test_guidance_without_an_empty_text(root, tmp_path):
    for path in (root / "coco" / "run_vis").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    with pytest.raises(UserError, match="sampler.cfg_scale=2.0: there is no empty_context.npy beside the texts'"):
        text_chain(root, str(tmp_path))
    text_chain(root, str(tmp_path), **{"sampler.cfg_scale": 1.0}).sample([0])


def test_the_command_line(root, text_model, tmp_path, run_main):
    def run(main, *argv, prompts=root / "prompts.txt"):
        return run_main(main, f"--config={root / 'text.py'}", f"--checkpoint={text_model}",
                        *([f"--prompts={prompts}"] if prompts else []), *argv)

    out = tmp_path / "out"
    ran = run(sample.main, "--seeds=0-3", f"--out={out}", "--cost", "--captures=2")
    assert ran.status == 0, ran.stderr
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["prompts"], summary["cfg_scale"]) == (str(root / "prompts.txt"), 2.0)
    assert run(sample.main, "--seeds=0-4", f"--out={out}").status == 0
    for flags, prompts, line in (
        ([], "a cat", "prompts_sha256 is"), ([], None, "--prompts is missing: a text, a .txt file with one a line"),
        ([], "nowhere.txt", "--prompts=nowhere.txt cannot be read"), ([], root / "images", "there are no prompts (0."),
        (["--labels=1"], root / "prompts.txt", "--labels=1: this model has no classes"),
        (["--config.cond.text_encoder=/nowhere"], root / "prompts.txt", "cond.text_encoder='/nowhere' is no folder"),
        (["--config.codec.pretrained=/nowhere"], root / "prompts.txt", "codec.pretrained='/nowhere'"),
    ):
        ran = run(sample.main, "--seeds=0-1", f"--out={out}", *flags, prompts=prompts)
        assert (ran.status, ran.stderr.count("\n")) == (2, 1), ran.stderr
        assert line in ran.stderr

    ran = run(eval_script.main, "--seeds=0-5", f"--out={tmp_path / 'new.json'}", "--benchmark",
              "--config.eval.benchmark_rows=2", "--config.eval.benchmark_repeats=2")
    assert ran.status == 0, ran.stderr
    new = json.loads((tmp_path / "new.json").read_text())
    assert new["prompts"] == str(root / "prompts.txt")
    assert [batch["rows"] for batch in new["benchmark"]["batches"]] == [1, 2]
    assert "prompts are embedded before the timed loops" in new["benchmark"]["protocol"]
    assert new["gmacs_per_image"] == pytest.approx(summary["gmacs_per_image"] | {"counted_images": 2})
    ran = run(eval_script.main, f"--out={tmp_path / 'none.json'}", "--seeds=0-3", prompts=None)
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert "--prompts is missing" in ran.stderr


def test_the_text_encoder_is_no_cost_of_an_image(root):
    chain = text_chain(root)
    cold = gmacs_per_image(chain, [0, 1])
    assert cold == gmacs_per_image(chain, [0, 1])
    tokens, width = 1 + TOKENS + 16, 16
    attention = 3 * 2 * tokens**2 * width  # of three blocks: Q K^T, and the weights times V
    assert (cold["with_attention_products"] - cold["without_attention_products"]) * 1e9 == pytest.approx(
        2 * chain.nfe * attention)


def test_a_clip_score_of_seeds(root, text_model, tmp_path, monkeypatch, run_main):
    """Every image is scored against the prompt that it was made from."""
    seen = []

    class Fake:
        name = "clip"

        def __init__(self, model, device):
            assert model == "tiny"

        def __call__(self, images):
            return torch.nn.functional.one_hot(torch.zeros(len(images), dtype=torch.long), 2).float()

        def texts(self, prompts):
            seen.extend(prompts)
            return torch.tensor([[1.0, 0.0] if prompt == SHOWN[0] else [0.0, 1.0] for prompt in prompts])

    monkeypatch.setattr("libs.evaluation.CLIPFeatures", Fake)
    ran = run_main(eval_script.main, f"--config={root / 'text.py'}", f"--checkpoint={text_model}", "--seeds=0-4",
                   f"--prompts={root / 'prompts.txt'}", "--config.eval.metrics=clip_score",
                   "--config.eval.clip_model=tiny", f"--out={tmp_path}/a.json")
    assert ran.status == 0, ran.stderr
    score = json.loads((tmp_path / "a.json").read_text())["metrics"]["clip_score"]
    assert seen == [SHOWN[seed % 2] for seed in range(5)]
    assert (score["value"], score["samples"]) == (pytest.approx(60), 5)


def test_distillation_of_a_text_model(root, text_model, tmp_path, run_main):
    ran = run_main(distillate.main, f"--config={root}/text.py:progressive", f"--checkpoint={text_model}",
                   f"--workdir={tmp_path}", "--config.distill.start_steps=4", "--config.train.steps=2",
                   "--config.train.batch_size=4", "--config.train.preview_every=0", "--config.distill.pair_images=3",
                   "--config.distill.prediction=eps", "--config.compute.device=cpu")
    assert ran.status == 0, ran.stderr
    assert (tmp_path / "pairs" / "steps_0002.png").is_file()


def test_two_processes(root, text_model, tmp_path, run_main):
    """In this process, and by two of accelerate: within one level of 255, and the same score."""
    command = [f"--config={root / 'text.py'}", f"--checkpoint={text_model}", "--seeds=0-6",
               f"--prompts={root / 'prompts.txt'}"]
    one, two = ([f"--keep_images={tmp_path / name}", f"--out={tmp_path / name}.json"] for name in ("one", "two"))
    assert run_main(eval_script.main, *command, *one).status == 0
    run_in_two(eval_script.main, [*command, *two])
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert (one["sampling"]["processes"], two["sampling"]["processes"]) == (1, 2)
    one, two = (result["metrics"]["frechet_cifar10"]["value"] for result in (one, two))
    assert two == pytest.approx(one, rel=1e-3)
    assert all(abs(png(tmp_path / "one", seed) - png(tmp_path / "two", seed)).max() <= 1 for seed in range(7))


# The published configs


@pytest.mark.parametrize("name", ["mscoco_uvit_small", "mscoco_uvit_deep"])
def test_the_published_configs_scale_latents_alike_in_training_and_sampling(root, name, monkeypatch):
    config = config_files.load(f"configs/{name}.py")
    assert (config.cond.kind, config.cond.tokens, config.data.name) == ("text", 77, "features")
    assert config.sampler.cfg_scale == 1 + 1.0  # U-ViT's s = 1
    assert config.backbone.num_clip_token == config.cond.tokens
    with config.unlocked():
        config.compute.update(precision="fp32", rows=2)
        config.codec.pretrained = str(root / "vae")
        config.data.image_size = 32
        config.backbone.update(img_size=8, embed_dim=16, depth=2, num_heads=2, clip_dim=CROSS, num_clip_token=TOKENS)
        config.cond.update(text_encoder=str(root / "clip"), tokens=TOKENS)
        config.sampler.steps = 3
    net, description = new_network(config)
    chain = build.make_chain(config, net.eval(), description, CPU, build.make_contexts("a cat", description, CPU))
    decoded = []
    plain = chain.codec.vae.decode
    monkeypatch.setattr(chain.codec.vae, "decode", lambda z: decoded.append(z) or plain(z))
    next(chain.images([0]))
    torch.testing.assert_close(decoded[0], chain.sample([0]) / 0.23010)
    mean = torch.randn(1, 4, 8, 8)
    x_0 = chain.codec.encode_moments(torch.cat([mean, torch.full_like(mean, -30)], dim=1), torch.zeros_like(mean))
    torch.testing.assert_close(x_0, 0.23010 * mean)
    assert Path(config_files.ROOT, "configs", f"{name}.py").read_text().count("refuse") == 0

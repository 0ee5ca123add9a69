"""Text to image: sampling from texts, by the chain and from the command line."""

import json
from pathlib import Path

import pytest
import torch
from text_regimes import CPU, SHOWN, TOKENS, load, make_root, png
from tiny_pipelines import CROSS
from two_processes import run_in_two

import distillate
import eval as eval_script
import sample
import train
from libs import build
from libs import config as config_files
from libs.cost import gmacs_per_image
from libs.denoiser import Prediction
from libs.errors import UserError
from libs.text import TextEncoder
from libs.training import new_network


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return make_root(tmp_path_factory.mktemp("regimes"))


@pytest.fixture(scope="module")
def text_model(root):
    """The folder of a training run of two steps, made visible: its network listens to its texts."""
    assert train.main([f"--config={root / 'text.py'}", "--config.train.steps=2", f"--workdir={root / 'text'}"]) == 0
    return root / "text"


def text_chain(root, prompts=None, **fields):
    """A chain whose network is random and large enough that texts show."""
    config = load(root, **fields)
    net, description = new_network(config)
    torch.nn.init.normal_(net.context_embed.weight)
    contexts = build.make_contexts(prompts or str(root / "prompts.txt"), description, CPU)
    return build.make_chain(config, net.eval(), description, CPU, contexts)


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

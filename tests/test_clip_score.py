"""CLIP score: the definition by hand on a tiny random CLIP model, and eval.py on a folder of sample.py's kind."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import clip_model

import eval as eval_script
from libs.data.images import save_png
from libs.errors import UserError
from libs.image_folder import ImageFolder
from libs.metrics.clip_score import CLIPFeatures
from libs.prompts import prompts_id

PROMPTS = ["a cat", "a photo of the red sea", "a blurry dog, a dog, a dog, a dog, a dog and a dog"]  # the last is cut


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return clip_model(tmp_path_factory.mktemp("clip"))


def noise(count, size=28, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, size, size, 3), dtype=torch.uint8, generator=generator)


def by_hand(folder, images, prompts):
    """The cosine of every pair, one at a time, for images that need no resizing."""
    from transformers import CLIPModel, CLIPTokenizer

    net, tokenizer = CLIPModel.from_pretrained(folder).eval(), CLIPTokenizer.from_pretrained(folder)
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073])  # of CLIP's own preprocessing
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711])
    cosines = []
    for image, prompt in zip(images, prompts, strict=True):
        pixels = ((image / 255 - mean) / std).permute(2, 0, 1)[None]
        tokens = tokenizer(prompt).input_ids
        tokens = torch.tensor([tokens if len(tokens) <= 16 else [*tokens[:15], tokenizer.eos_token_id]])
        with torch.no_grad():
            out = net(input_ids=tokens, pixel_values=pixels, attention_mask=torch.ones_like(tokens))
        one, other = out.image_embeds[0], out.text_embeds[0]
        cosines.append(float(one @ other / one.norm() / other.norm()))
    return cosines


def test_embeddings_agree_with_the_definition(model):
    images = noise(3)
    features = CLIPFeatures(str(model))
    got = (features(images) * features.texts(PROMPTS)).sum(dim=1)
    expected = by_hand(model, images, PROMPTS)
    assert got.tolist() == pytest.approx(expected, abs=1e-5)
    assert max(expected) - min(expected) > 0.01
    assert features(images).shape == (3, features.dim) == (3, 24)
    # a prompt's embedding does not depend on how far its neighbours make the tokenizer pad it
    torch.testing.assert_close(features.texts(PROMPTS)[:1], features.texts(PROMPTS[:1]))


def test_only_the_centre_square_counts(model):
    features = CLIPFeatures(str(model))
    images = noise(2)
    wide = noise(2, size=56, seed=1)[:, :28]
    wide[:, :, 14:42] = images
    torch.testing.assert_close(features(wide), features(images))
    large = images.repeat_interleave(2, 1).repeat_interleave(2, 2)  # resized before
    assert (features(large) * features(images)).sum(dim=1).min() > 0.8 > features(images).prod(dim=0).sum()


def write_images(path, images, prompts):
    folder = ImageFolder(path, {"prompts_sha256": prompts_id(prompts)})
    folder.save(range(len(images)), images)
    save_png(path / "grid.png", images[0])  # not one of the images


def run_eval(run_main, model, images, prompts, out, *flags):
    return run_main(eval_script.main, "--config=configs/sd15.py", "--config.compute.device=cpu", f"--images={images}",
                    f"--config.eval.clip_model={model}", "--config.eval.metrics=clip_score", f"--prompts={prompts}",
                    f"--out={out}", *flags)


def test_every_image_is_scored_with_the_prompt_of_its_seed(model, run_main, tmp_path):
    images, out = noise(5), tmp_path / "result.json"
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    write_images(tmp_path / "images", images, PROMPTS)
    (tmp_path / "images" / "000001.png").unlink()
    ran = run_eval(run_main, model, tmp_path / "images", tmp_path / "prompts.txt", out)
    assert ran.status == 0, ran.stderr
    cosines = by_hand(model, images[[0, 2, 3, 4]], [PROMPTS[i] for i in (0, 2, 0, 1)])
    metric = json.loads(out.read_text())["metrics"]["clip_score"]
    assert metric["value"] == pytest.approx(100 * sum(cosines) / 4, abs=1e-3)
    assert metric["cosine"] == pytest.approx(sum(cosines) / 4, abs=1e-5)
    assert metric["clipscore"] == pytest.approx(2.5 * sum(max(0, each) for each in cosines) / 4, abs=1e-5)
    assert (metric["samples"], metric["scale"], metric["model"]) == (4, "100 cos", str(model))
    assert f"| {metric['value']:.3f} (4 images) |" in ran.stdout


def test_images_are_cropped_to_the_size_asked_for(model, run_main, tmp_path):
    """A 28 x 56 image cropped and resized to 14 pixels is what Pillow makes of it."""
    wide, out = noise(2, size=56)[:, :28], tmp_path / "result.json"
    write_images(tmp_path / "wide", wide, ["a cat"])
    small = [Image.fromarray(each.numpy()).crop((14, 0, 42, 28)).resize((14, 14), Image.Resampling.LANCZOS)
             for each in wide]
    features = CLIPFeatures(str(model))
    pixels = torch.stack([torch.tensor(np.array(each)) for each in small])
    expected = 100 * (features(pixels) * features.texts(["a cat"] * 2)).sum(dim=1).mean().item()
    ran = run_eval(run_main, model, tmp_path / "wide", "a cat", out, "--image_size=14")
    assert ran.status == 0, ran.stderr
    assert json.loads(out.read_text())["metrics"]["clip_score"]["value"] == pytest.approx(expected, abs=1e-3)


def test_two_processes_add_up(model):
    """What `Processes.gather` brings from a second process is counted."""
    from libs.defaults import base_config
    from libs.evaluation import Metrics, Request

    class Both:
        is_main = True

        def __init__(self, other):
            self.other = other

        def gather(self, value):
            return [value, self.other.metrics[0].sums]

    section = dict(base_config().eval) | {"metrics": ["clip_score"], "clip_model": str(model)}
    images = noise(3)
    first, second = (Metrics(Request(section, 3, (28, 28, 3), torch.device("cpu"), prompts=True)) for _ in range(2))
    first.update(images[:2], prompts=PROMPTS[:2])
    second.update(images[2:], prompts=PROMPTS[2:])
    result = first.compute(Both(second))["clip_score"]
    assert result["samples"] == 3
    assert result["cosine"] == pytest.approx(sum(by_hand(model, images, PROMPTS)) / 3, abs=1e-5)
    assert not math.isclose(result["cosine"], by_hand(model, images[:2], PROMPTS[:2])[0], abs_tol=1e-3)


BAD = [
    (["--prompts=a dog"], "--prompts=a dog: the images of {images} were made from other prompts"),
    (["--prompts=nowhere.txt"], "--prompts=nowhere.txt cannot be read (No such file or directory)"),
    (["--config.eval.clip_model=/nowhere"], "eval.clip_model='/nowhere' is no folder, and cannot be had from the Hug"),
    (["--config.eval.clip_model=libs"], "eval.clip_model='libs' holds no CLIP model with its tokenizer"),
    (["--image_size=0"], "--image_size=0 must be at least 1"),
    (["--config.eval.metrics=fid,clip_score", "--inception_weights=nowhere"], "--inception_weights=nowhere does not"),
    (["--labels=3"], "--labels=3 belongs to --seeds, not to --images"),
]


@pytest.mark.parametrize(("flags", "line"), BAD, ids=[flags[0] for flags, _ in BAD])
def test_bad_input(model, run_main, tmp_path, flags, line):
    write_images(tmp_path / "images", noise(2), ["a cat"])
    ran = run_eval(run_main, model, tmp_path / "images", "a cat", tmp_path / "a.json", *flags)
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert line.format(images=tmp_path / "images") in ran.stderr
    assert not (tmp_path / "a.json").exists()


def test_images_without_seeds_or_prompts_are_refused(model, run_main, tmp_path):
    save_png(tmp_path / "images" / "cat.png", noise(1)[0])
    ran = run_eval(run_main, model, tmp_path / "images", "a cat", tmp_path / "a.json")
    assert ran.stderr.startswith("error: --prompts=a cat: the image cat.png of")
    argv = ["--config=configs/sd15.py", f"--out={tmp_path / 'a.json'}", "--config.eval.metrics=clip_score"]
    ran = run_main(eval_script.main, *argv, f"--images={tmp_path / 'images'}")
    assert ran.stderr.startswith("error: eval.metrics: clip_score needs the prompts of the images; give --prompts")
    ran = run_main(eval_script.main, *argv, "--seeds=0-3")
    assert ran.stderr.startswith("error: --prompts is missing: a text, a .txt file with one a line")
    ran = run_main(eval_script.main, "--config=configs/digits_uvit.py", "--seeds=0-3", "--prompts=a cat", argv[1])
    assert ran.stderr.startswith("error: --prompts=a cat: this model takes no text (cond.kind='label')")


def test_a_folder_of_another_model_is_refused(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "clip"}')
    with pytest.raises(UserError, match="holds no CLIP model"):
        CLIPFeatures(str(tmp_path))

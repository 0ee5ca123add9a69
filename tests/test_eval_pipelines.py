"""eval.py on the seeds of diffusers pipelines and of their students: sample.py's images, scored, and their cost."""

import json

import numpy as np
import pytest
import torch
from network_pipelines import PIPELINES
from PIL import Image
from tiny_pipelines import clip_model
from two_processes import run_in_two

import eval as eval_script
import sample
from libs.cost import MacCounter
from libs.lora import add_lora, lora_state
from libs.pipelines import save_student

PROMPTS = ["a cat", "a photo of the red sea", "a blurry dog"]


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """pipeline/ of Stable Diffusion 1.5's kind, run/student/ of it, four steps, clip/model/ and prompts.txt."""
    root = tmp_path_factory.mktemp("models")
    pipe = PIPELINES["sd15"](root)
    pipe.save_pretrained(root / "pipeline")
    add_lora(pipe.unet, 4)
    for name, tensor in lora_state(pipe.unet).items():
        if ".lora_B." in name:
            tensor.normal_(std=0.1)
    save_student(root / "run/student", pipe.unet, [999, 749, 499, 249])
    clip_model(root / "clip")
    (root / "prompts.txt").write_text("\n".join(PROMPTS))
    return root


@pytest.fixture
def flags(root):
    return ["--config.compute.device=cpu", f"--config.pipeline.path={root / 'pipeline'}", "--config.compute.rows=2",
            f"--prompts={root / 'prompts.txt'}"]


@pytest.fixture
def run(root, flags, tmp_path, run_main):
    """Run eval.main; (what it left behind, its result or None)."""
    def call(*argv, config="configs/sd15.py"):
        out = tmp_path / "result.json"
        out.unlink(missing_ok=True)
        ran = run_main(eval_script.main, f"--config={config}", *flags, "--config.eval.metrics=frechet_cifar10",
                       f"--out={out}", *argv)
        return ran, json.loads(out.read_text()) if out.exists() else None

    return call


def test_the_seeds_of_a_student_are_scored_like_the_images_of_sample(run, root, flags, tmp_path, run_main):
    student, kept, drawn = f"--checkpoint={root / 'run'}", tmp_path / "kept", tmp_path / "drawn"
    metrics = ["--config.eval.metrics=frechet_cifar10,clip_score", f"--config.eval.clip_model={root / 'clip/model'}"]
    ran, result = run("--seeds=0-4", student, f"--keep_images={kept}", *metrics)
    assert ran.status == 0, ran.stderr
    assert run_main(sample.main, "--config=configs/sd15.py", *flags, student, "--seeds=0-4",
                    f"--out={drawn}").status == 0
    for seed in range(5):
        one, other = (np.asarray(Image.open(folder / f"{seed:06d}.png")) for folder in (kept, drawn))
        assert np.array_equal(one, other)
    assert (result["model"], result["nfe"], result["rows"], result["samples"]) == (str(root / "run"), 4, 2, 5)
    assert result["sampler"] == {"name": "own", "steps": 4, "cfg_scale": 1.0}
    assert result["sampling"]["images"] == 5
    assert f"| {root / 'run'} | full | own | 4 |" in ran.stdout

    of_files = run_main(eval_script.main, f"--images={drawn}", f"--prompts={root / 'prompts.txt'}", *metrics,
                        "--config=configs/sd15.py", f"--out={tmp_path / 'files.json'}", "--config.compute.device=cpu")
    assert of_files.status == 0, of_files.stderr
    scored = json.loads((tmp_path / "files.json").read_text())
    for name in ("frechet_cifar10", "clip_score"):
        assert result["metrics"][name]["value"] == pytest.approx(scored["metrics"][name]["value"], rel=1e-5)
    assert result["chain"] == scored["chain"]

    ran, again = run("--seeds=0-4", student, f"--keep_images={kept}", *metrics)
    assert again["sampling"]["images"] == 0
    ran, _ = run("--seeds=0-4", f"--keep_images={kept}", "--config.pipeline.steps=2")
    assert ran.status == 2
    assert f"--keep_images={kept} holds images of another chain" in ran.stderr


def test_multiply_adds_are_those_of_the_calls_of_the_network(run, root):
    unet = PIPELINES["sd15"](root).unet
    with torch.no_grad(), MacCounter() as counter:
        unet(torch.randn(2, 4, 8, 8), 0, torch.randn(2, 16, unet.config.cross_attention_dim))
    steps = "--config.pipeline.steps=4"
    for name, argv, calls in (("plain", [steps], 8), ("no guidance", [steps, "--config.pipeline.guidance=1"], 4)):
        ran, result = run("--seeds=0-1", *argv)
        assert ran.status == 0, ran.stderr
        gmacs = result["gmacs_per_image"]
        assert gmacs["with_attention_products"] == pytest.approx(calls * counter.total / 2e9), name
        assert gmacs["without_attention_products"] == pytest.approx(
            calls * (counter.total - counter.attention) / 2e9), name
    _, reused = run("--seeds=0-1", steps, "--config.policy.clock=4", config="configs/sd15.py:clockwork")
    assert 0 < reused["gmacs_per_image"]["with_attention_products"] < 0.9 * 8 * counter.total / 2e9


def test_two_processes(run, root, flags, tmp_path):
    student = f"--checkpoint={root / 'run'}"
    _, one = run("--seeds=0-4", student)
    out = tmp_path / "two.json"
    run_in_two(eval_script.main, ["--config=configs/sd15.py", *flags, student, "--seeds=0-4", f"--out={out}",
                                  "--config.eval.metrics=frechet_cifar10"])
    two = json.loads(out.read_text())
    assert (two["sampling"]["processes"], two["sampling"]["images"]) == (2, 5)
    value = two["metrics"]["frechet_cifar10"]["value"]
    assert value == pytest.approx(one["metrics"]["frechet_cifar10"]["value"], rel=1e-3)


@pytest.mark.parametrize(("argv", "config", "line"), [
    (["--labels=3"], "configs/sd15.py", "--labels=3 belongs to a config without a pipeline"),
    (["--benchmark"], "configs/sd15.py", "--benchmark times a chain of a config without a pipeline"),
    (["--checkpoint=nowhere"], "configs/sd15.py", "nowhere' is no folder, and cannot be had"),
    (["--prompts="], "configs/sd15.py", "--prompts='' is empty"),
    ([], "configs/controlnet.py", "images that others steer are made by sample.py with --control_image"),
])
def test_bad_input(run, argv, config, line):
    ran, result = run("--seeds=0-3", *argv, config=config)
    assert (ran.status, result) == (2, None)
    assert ran.stderr.splitlines()[-1].startswith("error: ")
    assert line in ran.stderr.splitlines()[-1]


def test_prompts_are_needed(root, run_main, tmp_path):
    ran = run_main(eval_script.main, "--config=configs/sd15.py", f"--config.pipeline.path={root / 'pipeline'}",
                   "--seeds=0-3", f"--out={tmp_path / 'a.json'}")
    assert (ran.status, ran.stderr) == (2, "error: --prompts is missing: a text, a .txt file with one a line, or a "
                                        ".json file of COCO's captions\n")

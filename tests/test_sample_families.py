"""sample.py with pipelines whose network is a transformer, and with a T2I-Adapter."""

import json

import numpy as np
import pytest
import torch
from network_pipelines import PIPELINES
from PIL import Image

import sample
from libs.data.images import save_png


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of the pipelines, and adapter: that of a T2I-Adapter alone."""
    root = tmp_path_factory.mktemp("models")
    PIPELINES["pixart"](root, sample_size=32).save_pretrained(root / "pixart")  # for 256 pixels
    PIPELINES["sd3"](root).save_pretrained(root / "sd3")
    steered = PIPELINES["sdxl_adapter"](root)
    steered.adapter.save_pretrained(root / "adapter")
    steered.save_pretrained(root / "sdxl_adapter")
    return root


@pytest.fixture
def run(models, tmp_path, run_main):
    """Sample seed 0 at 3 steps into tmp_path/out, unless the arguments say otherwise."""
    return lambda config, *argv: run_main(
        sample.main, f"--config=configs/{config}", "--config.compute.device=cpu", "--config.pipeline.steps=3",
        f"--config.pipeline.path={models / config.partition('.')[0]}", "--prompts=a cat", "--seeds=0",
        f"--out={tmp_path / 'out'}", *argv)


def png(folder, seed=0):
    return np.asarray(Image.open(folder / f"{seed:06d}.png")).astype(int)


@pytest.mark.parametrize(("name", "pixels", "flags"), [
    ("pixart", 128, ["--config.pipeline.scheduler=ddim"]),
    ("sd3", 32, ["--config.pipeline.scheduler=flow_lcm"]),
])
def test_transformers(run, tmp_path, name, pixels, flags):
    ran = run(f"{name}.py", "--seeds=0-1")
    assert ran.status == 0, ran.stderr
    assert png(tmp_path / "out").shape == (pixels, pixels, 3)
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["model"], summary["sampler"], summary["nfe"], summary["images"]) == (name, "own", 3, 2)
    images = [png(tmp_path / "out", seed) for seed in range(2)]
    strong = "--config.pipeline.guidance=1000"  # so that a tiny network's text shows in 8 bits
    for i, more in enumerate((flags, [strong], [strong, "--config.pipeline.negative_prompt=blurry"])):
        ran = run(f"{name}.py", *more, f"--out={tmp_path / str(i)}")
        assert ran.status == 0, ran.stderr
        images.append(png(tmp_path / str(i)))
    assert [(i, j) for i in range(len(images)) for j in range(i) if np.array_equal(images[i], images[j])] == []


def test_an_adapter_is_steered_by_its_images(run, models, tmp_path):
    for i in range(2):
        save_png(tmp_path / "control" / f"{i}.png", 255 * torch.randint(0, 2, (32, 32, 3), dtype=torch.uint8))
    flags = [f"--config.pipeline.adapter={models / 'adapter'}", "--config.pipeline.guidance=3"]
    ran = run("sdxl_adapter.py", *flags, f"--control_image={tmp_path / 'control'}", "--seeds=0-1")
    assert ran.status == 0, ran.stderr
    one = [*flags, f"--control_image={tmp_path / 'control' / '0.png'}"]
    assert run("sdxl_adapter.py", *one, "--seeds=0-1", f"--out={tmp_path / 'one'}").status == 0
    assert [np.array_equal(png(tmp_path / "out", seed), png(tmp_path / "one", seed)) for seed in (0, 1)] == [True,
                                                                                                             False]
    assert run("sdxl_adapter.py", *one, "--config.pipeline.control_scale=0", f"--out={tmp_path / 'off'}").status == 0
    assert (png(tmp_path / "off") != png(tmp_path / "one")).any()


def test_few_steps_of_a_flow_draw_their_noise_from_the_seed(run, tmp_path):
    flags = ["--config.pipeline.scheduler=flow_lcm", "--config.compute.rows=2"]
    assert run("sd3.py", *flags, "--seeds=0-2").status == 0
    assert run("sd3.py", *flags, "--seeds=2,1", f"--out={tmp_path / 'again'}").status == 0
    for seed in (1, 2):
        assert np.array_equal(png(tmp_path / "out", seed), png(tmp_path / "again", seed))


@pytest.mark.parametrize(("config", "flags", "line"), [
    ("sd3.py", ["--config.pipeline.scheduler=ddim"],
     "pipeline.scheduler='ddim' does not fit the model's FlowMatchEulerDiscreteScheduler; choose from own, flow_lcm"),
    ("pixart.py", ["--config.pipeline.scheduler=flow_lcm"],
     "pipeline.scheduler='flow_lcm' does not fit the model's DPMSolverMultistepScheduler; choose from own, ddim"),
    ("sd3.py", ["--config.pipeline.height=24", "--config.pipeline.width=24"],
     "pipeline.height=24 must be a multiple of 16"),
    ("sd3.py", ["--config.pipeline.name=sdxl"],
     "holds a StableDiffusion3Pipeline, not a StableDiffusionXLPipeline; the field pipeline.name chooses from sd15 ("),
    ("sd3.py:clockwork", [], "method after the colon of --config='clockwork' is unknown; choose from full"),
    ("sdxl_adapter.py", ["--config.pipeline.adapter=configs"], "--control_image=None: a ControlNet needs an image"),
    ("sdxl_adapter.py", ["--config.pipeline.adapter=configs", "--control_image=README.md"],
     "pipeline.adapter='configs' holds no T2IAdapter"),
])
def test_bad_input(run, tmp_path, config, flags, line):
    ran = run(config, *flags)
    assert ran.status == 2
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert line in ran.stderr
    assert not list(tmp_path.rglob("*.png"))

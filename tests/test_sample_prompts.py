"""sample.py from prompts with a tiny diffusers pipeline in a folder: seeds, resuming, comparison, and refusals."""

import json
import os
import subprocess

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import prompted, prompted_controlnet, prompted_sdxl
from two_processes import run_in_two

import sample
from libs import config as config_files
from libs.adaptors import make_adaptor
from libs.adaptors.files import save_adaptor
from libs.data.images import save_png

PROMPTS = "a cat\na red dog\nthe sea\n"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of pipelines: plain, SDXL, with a ControlNet; of that ControlNet alone; and beside them prompts.txt."""
    root = tmp_path_factory.mktemp("models")
    prompted(root)[0].save_pretrained(root / "sd15")
    prompted_sdxl(root)[0].save_pretrained(root / "sdxl")
    steered = prompted_controlnet(root)[0]
    steered.save_pretrained(root / "controlnet")
    steered.controlnet.save_pretrained(root / "canny")
    (root / "prompts.txt").write_text(PROMPTS)
    return root


@pytest.fixture
def run(models, tmp_path, run_main):
    """Sample two seeds at 4 steps into tmp_path/out, unless the arguments say otherwise."""
    def call(*argv, config="sd15", prompts=models / "prompts.txt"):
        return run_main(sample.main, f"--config=configs/{config}", "--config.compute.device=cpu",
                        f"--config.pipeline.path={models / config.partition('.')[0]}", "--config.pipeline.steps=4",
                        f"--prompts={prompts}", "--seeds=0-1", f"--out={tmp_path / 'out'}", *argv)

    return lambda *argv, config="sd15.py", **options: call(*argv, config=config, **options)


def png(folder, seed):
    return np.asarray(Image.open(folder / f"{seed:06d}.png")).astype(int)


def test_images_depend_on_their_seed_and_prompt_alone(run, tmp_path):
    ran = run("--seeds=0-4", "--config.compute.rows=2", "--batch_size=3")
    assert ran.status == 0, ran.stderr
    out = tmp_path / "out"
    assert sorted(path.name for path in out.glob("0*.png")) == [f"{seed:06d}.png" for seed in range(5)]
    assert png(out, 0).shape == (32, 32, 3)
    assert (out / "grid.png").exists()
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["model"], summary["sampler"], summary["nfe"], summary["images"]) == ("sd15", "ddim", 4, 5)
    assert all((png(out, i) != png(out, j)).any() for i in range(5) for j in range(i))
    # other company, another order, another batch size: the same bits
    few = tmp_path / "few.npz"
    assert run("--seeds=4,1", "--config.compute.rows=2", f"--out={few}").status == 0
    for image, seed in zip(np.load(few)["images"], (4, 1), strict=True):
        assert np.array_equal(image, png(out, seed))
    # seed 4 shows prompt 4 mod 3
    assert run("--seeds=4", "--config.compute.rows=2", f"--out={tmp_path / 'one'}", prompts="a red dog").status == 0
    assert np.array_equal(png(tmp_path / "one", 4), png(out, 4))
    # one row a call differs in rounding only
    assert run("--seeds=4", f"--out={tmp_path / 'alone'}").status == 0
    assert abs(png(tmp_path / "alone", 4) - png(out, 4)).max() <= 1


def test_again_makes_only_what_is_missing(run, tmp_path, models):
    out = tmp_path / "out"
    assert run("--seeds=0-2").status == 0
    first, stamp = png(out, 1), os.stat(out / "000002.png").st_mtime_ns
    (out / "000001.png").unlink()
    assert run("--seeds=0-3").status == 0
    assert np.array_equal(png(out, 1), first)
    assert os.stat(out / "000002.png").st_mtime_ns == stamp
    assert json.loads((out / "summary.json").read_text())["images"] == 2
    for flags, prompts, line in ((["--config.pipeline.steps=3"], models / "prompts.txt", "pipeline.steps is 4 there"),
                                 ([], "a cat", "prompts_sha256 is")):
        ran = run(*flags, prompts=prompts)
        assert ran.status == 2
        assert line in ran.stderr


def test_an_adaptor_made_again_makes_another_chain(run, tmp_path):
    file, sizes = tmp_path / "adaptor.safetensors", {"c_in": 32, "c_out": 64, "temb_dim": 128}
    flags = ["--seeds=0", f"--config.policy.adaptor={file}", "--compare", "--repeats=1"]

    def train(value: float) -> None:
        adaptor = make_adaptor("ridge", **sizes)
        torch.nn.init.constant_(adaptor.map.bias, value)
        save_adaptor(file, adaptor, "ridge", {}, {"depth": 1, "cut": "before", **sizes})

    train(0.0)
    assert run(*flags, config="sd15.py:clockwork").status == 0
    train(0.1)
    ran = run(*flags, config="sd15.py:clockwork")
    assert ran.status == 2
    assert "holds images of another chain (adaptor_sha256 is " in ran.stderr
    # the plain images beside them are none of the adaptor's
    assert "adaptor" not in (tmp_path / "out" / "plain" / "chain.json").read_text()


def test_key_steps_beyond_the_loop_leave_no_folder(run, tmp_path):
    ran = run("--config.policy.key_steps=0,9", config="sd15.py:encoder_propagation")
    assert ran.status == 2
    assert "policy.key_steps='0,9': step 9 is out of range; the loop has steps 0 to 3" in ran.stderr
    assert not (tmp_path / "out" / "chain.json").exists()


def test_settings_act(run, tmp_path):
    images = []
    for i, flags in enumerate(([], ["--config.pipeline.guidance=1"], ["--config.pipeline.negative_prompt=blurry"],
                               ["--config.pipeline.scheduler=dpm_solver_pp"], ["--config.compute.precision=bf16"],
                               ["--config.pipeline.height=40", "--config.pipeline.width=48"])):
        ran = run("--seeds=0", *flags, f"--out={tmp_path / str(i)}")
        assert ran.status == 0, ran.stderr
        images.append(png(tmp_path / str(i), 0))
    assert [image.shape[:2] for image in images] == [(32, 32)] * 5 + [(40, 48)]
    assert all((image != images[0]).any() for image in images[1:5])


@pytest.mark.parametrize(("method", "setting"), [("clockwork", "clock=2"), ("encoder_propagation", "key_steps=0,2")])
def test_compare(run, tmp_path, method, setting):
    out = tmp_path / "out"
    ran = run("--seeds=0-2", "--compare", "--repeats=2", "--config.compute.rows=2", f"--config.policy.{setting}",
              config=f"sd15.py:{method}")
    assert ran.status == 0, ran.stderr
    result = json.loads((out / "compare.json").read_text())
    assert result["ratio"] == pytest.approx(result["plain_seconds"] / result["accelerated_seconds"])
    assert (len(result["seconds"]["plain"]), len(result["seconds"]["accelerated"])) == (2, 2)
    assert (result["images"], result["images_in_a_call"], result["method"]["name"]) == (3, 2, method)
    assert result["stats_of_a_call"]["reuse_calls"] > 0
    assert 5 < result["psnr_db"] < 100
    assert f"plain {result['plain_seconds']:.3f} s, {method} {result['accelerated_seconds']:.3f} s" in ran.stdout
    assert Image.open(out / "compare.png").size == (2 + 2 * 34, 2 + 3 * 34)
    # the plain pipeline's images, bit for bit, and the policy's, which differ
    assert run("--seeds=0-2", "--config.compute.rows=2", f"--out={tmp_path / 'plain'}").status == 0
    for seed in range(3):
        assert np.array_equal(png(out / "plain", seed), png(tmp_path / "plain", seed))
        assert (png(out, seed) != png(out / "plain", seed)).any()


def test_a_controlnet_is_steered_by_its_images(run, models, tmp_path):
    for i in range(2):
        save_png(tmp_path / "control" / f"{i}.png", torch.randint(0, 256, (32, 32, 3), dtype=torch.uint8))
    flags = [f"--config.pipeline.controlnet={models / 'canny'}", f"--control_image={tmp_path / 'control'}"]
    assert run("--seeds=0-2", *flags, config="controlnet.py", prompts="a cat").status == 0
    one = [*flags[:1], f"--control_image={tmp_path / 'control' / '0.png'}"]
    ran = run("--seeds=0-2", *one, f"--out={tmp_path / 'one'}", config="controlnet.py", prompts="a cat")
    assert ran.status == 0, ran.stderr
    same = [np.array_equal(png(tmp_path / "out", seed), png(tmp_path / "one", seed)) for seed in range(3)]
    assert same == [True, False, True]
    scaled = run("--seeds=0", *one, "--config.pipeline.control_scale=0.5", f"--out={tmp_path / 'scaled'}",
                 config="controlnet.py", prompts="a cat")
    assert scaled.status == 0, scaled.stderr
    assert (png(tmp_path / "scaled", 0) != png(tmp_path / "one", 0)).any()


@pytest.mark.parametrize("method", ["full", "clockwork", "encoder_propagation"])
def test_sdxl(run, tmp_path, method):
    ran = run("--config.policy.parallel=true" if method == "encoder_propagation" else "--batch_size=1",
              "--config.pipeline.steps=8", "--config.pipeline.negative_prompt=blurry", config=f"sdxl.py:{method}")
    assert ran.status == 0, ran.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert (summary["nfe"], summary["cfg_scale"], summary["method"]["name"]) == (8, 5.0, method)
    assert (summary["stats"].get("reuse_calls", 0) > 0) == (method != "full")
    assert (png(tmp_path / "out", 0) != png(tmp_path / "out", 1)).any()


def test_two_processes(run, models, tmp_path):
    """The processes share the seeds, and the images are those of one."""
    run_in_two(sample.main, ["--config=configs/sd15.py", "--config.compute.device=cpu", "--config.pipeline.steps=4",
                             f"--config.pipeline.path={models / 'sd15'}", f"--prompts={models / 'prompts.txt'}",
                             "--seeds=0-2", f"--out={tmp_path / 'two'}"])
    assert run("--seeds=0-2").status == 0
    assert json.loads((tmp_path / "two" / "summary.json").read_text())["processes"] == 2
    for seed in range(3):
        assert abs(png(tmp_path / "two", seed) - png(tmp_path / "out", seed)).max() <= 1


BAD = [
    (["--config.pipeline.path=/nowhere"], "sd15.py", "pipeline.path='/nowhere' is no folder, and cannot be had from"),
    (["--config.pipeline.path=configs"], "sd15.py", "pipeline.path='configs' holds no StableDiffusionPipeline"),
    (["--config.pipeline.scheduler=plms"], "sd15.py", "pipeline.scheduler='plms' is unknown; choose from own, ddim"),
    (["--config.pipeline.name=sd4"], "sd15.py", "pipeline.name='sd4' is unknown; choose from sd15, sdxl, controlnet"),
    (["--config.pipeline.steps=0"], "sd15.py", "pipeline.steps=0 must be at least 1"),
    (["--config.pipeline.width=33"], "sd15.py", "pipeline.width=33 must be a multiple of 8, or 0"),
    (["--config.pipeline.width=64"], "sd15.py", "pipeline.height=0, pipeline.width=64: give both or none"),
    (["--config.compute.rows=0"], "sd15.py", "compute.rows=0 must be at least 1"),
    (["--config.compute.precision=fp8"], "sd15.py", "compute.precision='fp8' is unknown; choose from fp32, bf16, fp16"),
    (["--config.sampler.steps=5"], "sd15.py", "no such field in config; choose from compute, eval"),
    (["--prompts=nowhere.txt"], "sd15.py", "--prompts=nowhere.txt cannot be read (No such file or directory)"),
    (["--labels=3"], "sd15.py", "--labels=3 belongs to a config without a pipeline"),
    (["--checkpoint=/nowhere"], "sd15.py", "pipeline.student='/nowhere' is no folder, and cannot be had from"),
    (["--compare"], "sd15.py", "--compare: without a policy this is the plain pipeline"),
    (["--config.policy.clock=0"], "sd15.py:clockwork", "clock=0"),
    (["--compare", "--repeats=0"], "sd15.py:clockwork", "--repeats=0 must be at least 1"),
    (["--compare", "--out=a.npz"], "sd15.py:clockwork", "--compare writes into a folder, not into --out=a.npz"),
    (["--control_image=a.png"], "sd15.py", "--control_image=a.png: a ControlNet needs an image or a folder of them"),
    ([], "controlnet.py", "--control_image=None: a ControlNet needs an image"),
    (["--control_image=nowhere"], "controlnet.py", "--control_image='nowhere' is not a folder"),
    ([], "sd15.py:progressive", "method after the colon of --config='progressive' is unknown; choose from full"),
]


@pytest.mark.parametrize(("flags", "config", "line"), BAD, ids=[" ".join([*flags, config]) for flags, config, _ in BAD])
def test_bad_input(run, tmp_path, monkeypatch, flags, config, line):
    monkeypatch.chdir(tmp_path)  # for what --out=a.npz leaves
    (tmp_path / "configs").mkdir()
    ran = run(*flags, config=config)
    assert ran.status == 2
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert line in ran.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_prompts_and_pipelines_belong_together(run_main, tmp_path, models):
    ran = run_main(sample.main, "--config=configs/cifar10_unet.py", "--prompts=a cat", f"--out={tmp_path}")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert ran.stderr.startswith("error: --prompts=a cat: this model takes no text (cond.kind='label'); configs/mscoco")
    ran = run_main(sample.main, "--config=configs/sd15.py", f"--out={tmp_path}")
    assert ran.status == 2
    assert ran.stderr.startswith("error: --prompts is missing: a text, a .txt file")


def test_the_coco_recipe_fails_at_once_without_its_data(tmp_path):
    """And says in one line what is missing, step by step until the data are there."""
    def run(*argv):
        ran = subprocess.run(["bash", str(config_files.ROOT / "scripts/mscoco_sd15.sh"), *argv], capture_output=True,
                             text=True, cwd=tmp_path, env={"PATH": os.environ["PATH"]})
        assert (ran.returncode, ran.stdout, ran.stderr.count("\n")) == (2, "", 1)
        return ran.stderr

    assert run().startswith("error: no COCO folder given; usage:")
    assert run("coco", "2017").startswith("error: '2017' is no protocol; choose from 2017-5K, 2014-30K")
    assert run("coco").startswith(f"error: {tmp_path}/coco/annotations/captions_val2017.json is not there")
    (tmp_path / "coco/annotations").mkdir(parents=True)
    (tmp_path / "coco/annotations/captions_val2014.json").touch()
    assert run("coco", "2014-30K").startswith(f"error: {tmp_path}/coco/val2014 is not there")

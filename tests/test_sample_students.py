"""sample.py with students of pipelines, and eval.py of what they draw, on tiny pipelines in folders."""

import copy
import json

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from network_pipelines import PIPELINES
from PIL import Image
from tiny_pipelines import prompted_controlnet

import eval as eval_script
import sample
from libs import config as config_files
from libs.data.images import save_png
from libs.lora import add_lora, has_lora, lora_state, merge_lora
from libs.pipelines import load_student, save_student
from libs.pipelines.sampling import PipelineSampler

MODES = {"sd15": [999, 749, 499, 249], "pixart": [999, 749, 499, 249], "sd3": [1000, 900, 750, 500]}
PROMPT = "a cat"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Folders of pipelines, NAME, and of their students as distillate.py leaves them, NAME_run/student."""
    root = tmp_path_factory.mktemp("models")
    pipes = {"sd15": PIPELINES["sd15"](root), "pixart": PIPELINES["pixart"](root, sample_size=32),
             "sd3": PIPELINES["sd3"](root)}
    for name, pipe in pipes.items():
        pipe.save_pretrained(root / name)
        write_student(pipe, MODES[name], root / f"{name}_run/student")
    write_student(PIPELINES["sd15"](root), [999, 499], root / "sd15_of_2", seed=2)
    return root


def write_student(pipe, timesteps, folder, seed=1):
    """As if trained: a LoRA that does something."""
    net = pipe.unet if hasattr(pipe, "unet") else pipe.transformer
    torch.manual_seed(seed)
    add_lora(net, 4)
    for name, tensor in lora_state(net).items():
        if ".lora_B." in name:
            tensor.normal_(std=0.1)
    save_student(folder, net, timesteps, base="a/model")


@pytest.fixture
def run(models, tmp_path, run_main):
    """Sample two seeds into tmp_path/out, unless the arguments say otherwise."""
    return lambda config, *argv: run_main(
        sample.main, f"--config=configs/{config}", "--config.compute.device=cpu",
        f"--config.pipeline.path={models / config.partition('.')[0]}", f"--prompts={PROMPT}", "--seeds=0-1",
        f"--out={tmp_path / 'out'}", *argv)


def png(folder, seed=0):
    return np.asarray(Image.open(folder / f"{seed:06d}.png")).astype(int)


def summary(folder):
    return json.loads((folder / "summary.json").read_text())


def drawn(pipe, seed=0, **call):
    image = pipe([PROMPT], generator=[torch.Generator().manual_seed(seed)], output_type="np", **call).images[0]
    return np.rint(image * 255).astype(int)


@pytest.mark.parametrize("name", MODES)
def test_images_are_those_of_load_student(run, models, tmp_path, name):
    ran = run(f"{name}.py", f"--checkpoint={models / f'{name}_run'}")
    assert ran.status == 0, ran.stderr
    out = tmp_path / "out"
    told = summary(out)
    assert (told["student"], told["sampler"], told["nfe"], told["cfg_scale"]) == (str(models / f"{name}_run"), "own",
                                                                                 4, 0.0)
    pipe = DiffusionPipeline.from_pretrained(models / name)
    pipe.set_progress_bar_config(disable=True)
    options = {"clean_caption": False} if name == "pixart" else {}
    plain = drawn(pipe, num_inference_steps=4, guidance_scale=1.0, **options)
    student = load_student(pipe, models / f"{name}_run")
    assert abs(drawn(pipe, **options) - png(out)).max() <= 1  # a LoRA beside the weights rounds otherwise
    merge_lora(student.network)
    for seed in (0, 1):
        assert np.array_equal(drawn(pipe, seed, **options), png(out, seed))
    assert (png(out) != plain).any()


def test_the_network_is_a_plain_one_again(models):
    config = config_files.load("configs/sd15.py")
    config.pipeline.update(path=str(models / "sd15"), student=str(models / "sd15_of_2"))
    sampler = PipelineSampler(config, [PROMPT], torch.device("cpu"))
    assert not has_lora(sampler.pipe.unet)
    assert not any("lora" in type(module).__module__ for module in sampler.pipe.unet.modules())
    assert (config.pipeline.steps, config.pipeline.guidance, config.pipeline.scheduler) == (2, 0.0, "own")
    assert sampler.pipe.scheduler.timesteps.tolist() == [999, 499]


def test_the_field_the_folder_itself_and_a_run_name_the_same_student(run, models, tmp_path):
    assert run("sd15.py", f"--checkpoint={models / 'sd15_run'}").status == 0
    stamp = (tmp_path / "out/000000.png").stat().st_mtime_ns
    assert run("sd15.py", f"--config.pipeline.student={models / 'sd15_run/student'}").status == 0
    assert (tmp_path / "out/000000.png").stat().st_mtime_ns == stamp  # nothing was missing


def test_images_of_two_students_do_not_mix(run, models, tmp_path):
    one, other = (f"--checkpoint={models / name}" for name in ("sd15_run", "sd15_of_2"))
    two_steps = "--config.pipeline.steps=2"
    assert run("sd15.py", one, two_steps, "--seeds=0").status == 0
    for flags, line in (([other], "models.student is "), ([one], "pipeline.steps is 2 there"),
                        ([one, two_steps, "--config.pipeline.guidance=3"], "pipeline.guidance is 0.0 there"),
                        ([two_steps, "--config.pipeline.guidance=0", "--config.pipeline.scheduler=own"],
                         "models.student is ")):
        ran = run("sd15.py", *flags, "--seeds=1")
        assert (ran.status, ran.stderr.count("\n")) == (2, 1)
        assert line in ran.stderr, ran.stderr
    assert run("sd15.py", other, "--seeds=0", f"--out={tmp_path / 'other'}").status == 0
    assert summary(tmp_path / "other")["nfe"] == 2  # as many as it was trained at
    assert (png(tmp_path / "other") != png(tmp_path / "out")).any()


def test_steps_and_guidance_of_the_command_are_obeyed(run, models, tmp_path):
    student = f"--checkpoint={models / 'sd15_run'}"
    flags = ("--config.pipeline.steps=2", "--config.pipeline.guidance=3", "--seeds=0")
    assert run("sd15.py", student, *flags).status == 0
    told = summary(tmp_path / "out")
    assert (told["nfe"], told["cfg_scale"]) == (2, 3.0)
    pipe = DiffusionPipeline.from_pretrained(models / "sd15")
    pipe.set_progress_bar_config(disable=True)
    merge_lora(load_student(pipe, models / "sd15_run/student").network)
    image = drawn(pipe, num_inference_steps=2, guidance_scale=3)
    assert np.array_equal(image, png(tmp_path / "out"))
    assert (image != drawn(pipe)).any()


@pytest.mark.parametrize(("method", "setting", "calls"), [
    ("clockwork", "clock=2", {"full_calls": 2, "reuse_calls": 2}),
    ("encoder_propagation", "key_steps=0,2", {"full_calls": 2, "reuse_calls": 2}),
])
def test_policies_apply_on_top(run, models, tmp_path, method, setting, calls):
    student = f"--checkpoint={models / 'sd15_run'}"
    ran = run(f"sd15.py:{method}", student, f"--config.policy.{setting}", "--seeds=0", "--compare", "--repeats=1")
    assert ran.status == 0, ran.stderr
    result = json.loads((tmp_path / "out/compare.json").read_text())
    assert calls.items() <= result["stats_of_a_call"].items()
    assert run("sd15.py", student, "--seeds=0", f"--out={tmp_path / 'plain'}").status == 0
    assert np.array_equal(png(tmp_path / "out/plain"), png(tmp_path / "plain"))
    assert (png(tmp_path / "out") != png(tmp_path / "plain")).any()


@pytest.mark.parametrize("name", ["controlnet", "sdxl_adapter"])
def test_steered_by_images(run, tmp_path, name):
    """A student of the UNet alone, beside the network that is shown the images."""
    pipe = prompted_controlnet(tmp_path)[0] if name == "controlnet" else PIPELINES[name](tmp_path)
    pipe.save_pretrained(tmp_path / "model")
    part = name.removeprefix("sdxl_")
    getattr(pipe, part).save_pretrained(tmp_path / "steering")
    write_student(pipe, MODES["sd15"], tmp_path / "student")
    for i in range(2):
        save_png(tmp_path / f"images/{i}.png", 255 * torch.randint(0, 2, (32, 32, 3), dtype=torch.uint8))
    flags = (f"--config.pipeline.path={tmp_path / 'model'}", f"--config.pipeline.{part}={tmp_path / 'steering'}",
             f"--checkpoint={tmp_path / 'student'}", "--config.pipeline.control_scale=1")
    ran = run(f"{name}.py", *flags, f"--control_image={tmp_path / 'images'}")
    assert ran.status == 0, ran.stderr
    assert (summary(tmp_path / "out")["nfe"], summary(tmp_path / "out")["cfg_scale"]) == (4, 0.0)
    assert run(f"{name}.py", *flags, f"--control_image={tmp_path / 'images/0.png'}",
               f"--out={tmp_path / 'one'}").status == 0
    assert [np.array_equal(png(tmp_path / "out", seed), png(tmp_path / "one", seed)) for seed in (0, 1)] == [True,
                                                                                                             False]


def test_half_precision(run, models, tmp_path):
    assert run("sd15.py", f"--checkpoint={models / 'sd15_run'}", "--config.compute.precision=bf16").status == 0
    assert run("sd15.py", f"--checkpoint={models / 'sd15_run'}", f"--out={tmp_path / 'fp32'}").status == 0
    assert 0 < abs(png(tmp_path / "out") - png(tmp_path / "fp32")).mean() < 5


@pytest.fixture(scope="module")
def other_base(models):
    """sd15 with other weights, as a fine-tuned one."""
    pipe = PIPELINES["sd15"](models)
    pipe.unet = copy.deepcopy(pipe.unet)
    with torch.no_grad():
        for parameter in pipe.unet.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    pipe.save_pretrained(models / "other")
    return models / "other"


def test_another_base_is_refused_unless_asked_for(run, models, other_base):
    flags = (f"--checkpoint={models / 'sd15_run'}", f"--config.pipeline.path={other_base}", "--seeds=0")
    ran = run("sd15.py", *flags)
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert "is a LoRA of another base model (a/model)" in ran.stderr
    assert "other_base=True" in ran.stderr
    assert run("sd15.py", *flags, "--config.pipeline.other_base=true").status == 0


@pytest.mark.parametrize(("config", "flags", "line"), [
    ("sd15.py", ["--checkpoint={}/nowhere"], "nowhere' is no folder, and cannot be had from the Hugging Face hub"),
    ("sd15.py", ["--checkpoint={}/sd15"], "holds neither pytorch_lora_weights.safetensors nor adapter_model"),
    ("pixart.py", ["--checkpoint={}/sd15_run"], "is a LoRA of another base model (a/model): this PixArtAlphaPipeline"),
    ("pixart.py", ["--checkpoint={}/sd15_run", "--config.pipeline.other_base=true"], "is a LoRA of another network"),
    ("sd15.py", ["--checkpoint={}/sd15_run", "--config.pipeline.steps=5"],
     "num_inference_steps=5: this student was trained at the 4 timesteps 999, 749, 499, 249; choose from 1 to 4"),
    ("sd15.py", ["--checkpoint={}/sd15_run", "--config.pipeline.steps=0"], "pipeline.steps=0 must be at least 1"),
    ("sd15.py", ["--checkpoint={}/sd15_run", "--config.pipeline.scheduler=ddim"],
     "pipeline.scheduler='ddim': a student samples by its own"),
    ("sd15.py", ["--checkpoint={}/sd15_run", "--config.pipeline.student={}/sd15_of_2"], "give one of them"),
])
def test_bad_input(run, models, tmp_path, config, flags, line):
    ran = run(config, *(flag.format(models) for flag in flags))
    assert ran.status == 2
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert line in ran.stderr
    assert not list(tmp_path.rglob("*.png"))


def test_eval_tells_whose_images_it_scored(run, models, tmp_path, run_main):
    assert run("sd15.py", f"--checkpoint={models / 'sd15_run'}", "--seeds=0-3").status == 0
    out = tmp_path / "score.json"
    ran = run_main(eval_script.main, f"--images={tmp_path / 'out'}", f"--out={out}", "--config.compute.device=cpu",
                   "--config=configs/sd15.py", "--config.eval.metrics=frechet_cifar10")
    assert ran.status == 0, ran.stderr
    result = json.loads(out.read_text())
    assert result["samples"] == 4
    assert result["chain"] == json.loads((tmp_path / "out/chain.json").read_text())
    assert result["chain"]["models"].keys() == {"pipeline", "student"}

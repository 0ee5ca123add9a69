"""Flash Diffusion on diffusers pipelines: tiny ones learn from tiny shards, through distillate.py."""

import functools
import json
import re
import shutil

import pytest
import torch
from diffusers import DiffusionPipeline
from small_shards import write_shards

import distillate
from libs.errors import UserError
from libs.lora import add_lora
from libs.pipelines import load_student
from libs.training.state import Checkpoints

SHORT = ("--config.compute.device=cpu", "--config.train.steps=2", "--config.train.batch_size=2",
         "--config.train.log_every=1", "--config.train.save_every=1", "--config.train.preview_every=0",
         "--config.distill.stage_updates=1,1,1,1", "--config.distill.teacher_steps=4", "--config.distill.lora_rank=2",
         "--config.distill.lora_alpha=0", "--config.train.lr=1e-3")
FAMILIES = ("sd15", "sdxl", "pixart", "sd3", "sdxl_adapter")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 4])


@pytest.fixture(scope="module")
def trained(pipelines, shards, tmp_path_factory):
    """folder(name) of the training of its LoRA."""
    @functools.cache
    def workdir(name):
        made = tmp_path_factory.mktemp(f"{name}_student")
        assert distillate.main(command(name, pipelines(name), shards, made)) == 0
        return made

    return workdir


def command(name, folder, shards, workdir, *fields):
    """Images are as large as the tiny models' own."""
    adapter = (f"--config.pipeline.adapter={folder}/adapter",) if name == "sdxl_adapter" else ()
    size = ("--config.data.image_size=32",) if name == "pixart" else ()
    return [f"--config=configs/{name}.py:flash", f"--config.pipeline.path={folder}", *adapter, *SHORT, *size,
            f"--config.data.path={shards}", f"--workdir={workdir}", *fields]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_a_lora(name, trained):
    saved = Checkpoints(trained(name) / "ckpts").load(2)
    assert any(bool(each.any()) for each_name, each in saved.weights.items() if ".lora_B." in each_name)
    first, second = [json.loads(line) for line in (trained(name) / "stats.jsonl").read_text().splitlines()]
    assert first.keys() & {"distil", "dmd", "adversarial"} == {"distil"}
    assert {"distil", "dmd", "adversarial", "discriminator"} <= second.keys()


def test_the_student_is_what_a_pipeline_loads(pipelines, trained):
    pipe = DiffusionPipeline.from_pretrained(pipelines("sd15"))
    pipe.set_progress_bar_config(disable=True)

    def image():
        return torch.from_numpy(pipe("picture 3", generator=torch.Generator().manual_seed(0), output_type="np",
                                     num_inference_steps=4, guidance_scale=0).images[0])

    before = image()
    with load_student(pipe, trained("sd15") / "student") as student:
        assert student.timesteps == [999, 749, 499, 249]
        learned = image()
    assert not torch.allclose(before, learned, atol=1e-3)
    assert torch.equal(image(), before)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(pipelines, shards, trained, tmp_path):
    """And its pictures, made by the network that learns, change nothing."""
    command_of = functools.partial(command, "sd15", pipelines("sd15"), shards, tmp_path, "--config.compute.rows=2",
                                   "--config.train.preview_every=1", "--config.train.preview_images=2")
    assert distillate.main(command_of("--config.train.steps=1")) == 0
    assert (tmp_path / "previews" / "00000001.png").is_file()
    assert distillate.main(command_of()) == 0
    one, other = (Checkpoints(folder / "ckpts").load(2) for folder in (trained("sd15"), tmp_path))
    assert all(torch.equal(other.weights[name], value) for name, value in one.weights.items())
    assert all(torch.equal(other.state["beside"][name], value) for name, value in one.state["beside"].items())


def test_a_lora_does_not_go_on_upon_another_base(pipelines, shards, tmp_path, run_main):
    base = tmp_path / "base"
    shutil.copytree(pipelines("sd15"), base)
    words = command("sd15", base, shards, tmp_path / "run")
    assert distillate.main([*words, "--config.train.steps=1"]) == 0
    pipe = DiffusionPipeline.from_pretrained(base)
    for parameter in pipe.unet.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    pipe.unet.save_pretrained(base / "unet")
    ran = run_main(distillate.main, *words)
    assert ran.status == 2
    assert f"{tmp_path}/run learned from other weights than {base} has now; remove" in ran.stderr.splitlines()[-1]


def test_a_whole_network_takes_the_place_of_the_pipelines_own(pipelines, shards, tmp_path):
    fields = ("--config.distill.lora_rank=0", "--config.distill.guidance=1", "--config.train.steps=1")
    assert distillate.main(command("sd15", pipelines("sd15"), shards, tmp_path, *fields)) == 0
    assert (tmp_path / "student" / "unet" / "diffusion_pytorch_model.safetensors").is_file()
    pipe = DiffusionPipeline.from_pretrained(pipelines("sd15"))
    own = pipe.unet
    with load_student(pipe, tmp_path / "student") as student:
        learned = Checkpoints(tmp_path / "ckpts").newest().ema
        assert all(torch.equal(each, learned[f"unet.{name}"]) for name, each in pipe.unet.state_dict().items())
        assert student.timesteps == [999, 749, 499, 249]
        assert pipe("picture 3", output_type="latent").images.isfinite().all()
    assert pipe.unet is own
    add_lora(pipe.unet, 2)
    with pytest.raises(UserError, match="takes the place of the whole unet, which has a LoRA: unload that first"):
        load_student(pipe, tmp_path / "student")

    other = DiffusionPipeline.from_pretrained(pipelines("sdxl"))
    with pytest.raises(UserError, match="is a student of another model: .* is "):
        load_student(other, tmp_path / "student")


@pytest.mark.parametrize(("fields", "message"), [
    (("--config.data.name=cifar10",), "--config.data.name=cifar10: a pipeline learns from images with captions"),
    (("--prompts=a.txt",), "--prompts=a.txt belongs to the adaptor of a pipeline"),
    (("--config.distill.text_encoder_device=attic",), "distill.text_encoder_device='attic' is unknown; choose from"),
    (("--config.data.path=nowhere/{0..1}.tar",), "nowhere"),
])
def test_what_makes_no_training_is_refused(fields, message, pipelines, shards, tmp_path, run_main):
    ran = run_main(distillate.main, *command("sd15", pipelines("sd15"), shards, tmp_path, *fields))
    assert ran.status == 2
    assert message in ran.stderr.splitlines()[-1]


@pytest.mark.parametrize(("name", "fields", "message"), [
    ("sd15", ("--config.data.image_size=30",), "--config.data.image_size=30: .* multiples of 4$"),
    ("sd3", ("--config.data.image_size=20",), "--config.data.image_size=20: .* multiples of 8 of at most 64$"),
    ("sd3", ("--config.data.image_size=72",), "--config.data.image_size=72: .* multiples of 8 of at most 64$"),
    ("sd3", ("--config.pipeline.height=20", "--config.pipeline.width=20"), "--config.pipeline.height=20: this Stab"),
    ("pixart", ("--config.data.image_size=36",), "--config.data.image_size=36: .* multiples of 8$"),
    ("sdxl_adapter", ("--config.data.image_size=36",), "--config.data.image_size=36: .* multiples of 8$"),
])
def test_images_that_a_network_cannot_take_are_refused(name, fields, message, pipelines, shards, tmp_path, run_main):
    ran = run_main(distillate.main, *command(name, pipelines(name), shards, tmp_path, *fields))
    assert ran.status == 2
    assert re.search(message, ran.stderr.splitlines()[-1]), ran.stderr
    assert not (tmp_path / "config.json").exists()

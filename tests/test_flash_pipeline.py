"""Flash Diffusion on diffusers pipelines: tiny ones learn from tiny shards, through distillate.py."""

import json

import pytest
import torch
from diffusers import DiffusionPipeline
from network_pipelines import PIPELINES
from small_shards import write_shards

import distillate
from libs.pipelines import load_student
from libs.training.state import Checkpoints

SHORT = ("--config.compute.device=cpu", "--config.train.steps=4", "--config.train.batch_size=2",
         "--config.train.log_every=1", "--config.train.save_every=2", "--config.train.preview_every=0",
         "--config.distill.stage_updates=1,1,1,1", "--config.distill.teacher_steps=4", "--config.distill.lora_rank=2",
         "--config.distill.lora_alpha=0", "--config.train.lr=1e-3")
FAMILIES = ("sd15", "sdxl", "pixart", "sd3", "sdxl_adapter")


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    return write_shards(tmp_path_factory.mktemp("shards"), [5, 4])


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory):
    """folder(name) of a saved tiny pipeline."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tmp_path_factory.mktemp(name)
            PIPELINES[name](tmp_path_factory.mktemp("words")).save_pretrained(folders[name])
        return folders[name]

    return folder


def command(name, folder, shards, workdir, *fields):
    adapter = (f"--config.pipeline.adapter={folder}/adapter",) if name == "sdxl_adapter" else ()
    return [f"--config=configs/{name}.py:flash", f"--config.pipeline.path={folder}", *adapter, *SHORT,
            f"--config.data.path={shards}", "--config.data.image_size=32", f"--workdir={workdir}", *fields]


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_learns_a_lora(name, pipelines, shards, tmp_path):
    assert distillate.main(command(name, pipelines(name), shards, tmp_path)) == 0
    saved = Checkpoints(tmp_path / "ckpts").load(4)
    assert any(bool(each.any()) for each_name, each in saved.weights.items() if ".lora_B." in each_name)
    rows = [json.loads(line) for line in (tmp_path / "stats.jsonl").read_text().splitlines()]
    assert rows[0].keys() & {"distil", "dmd", "adversarial"} == {"distil"}
    assert all({"distil", "dmd", "adversarial", "discriminator"} <= row.keys() for row in rows[1:])


def test_the_student_is_what_a_pipeline_loads(pipelines, shards, tmp_path):
    assert distillate.main(command("sd15", pipelines("sd15"), shards, tmp_path)) == 0
    pipe = DiffusionPipeline.from_pretrained(pipelines("sd15"))
    pipe.set_progress_bar_config(disable=True)

    def image():
        return torch.from_numpy(pipe("picture 3", generator=torch.Generator().manual_seed(0), output_type="np",
                                     num_inference_steps=4, guidance_scale=0).images[0])

    before = image()
    with load_student(pipe, tmp_path / "student") as student:
        assert student.timesteps == [999, 749, 499, 249]
        learned = image()
    assert not torch.allclose(before, learned, atol=1e-3)
    assert torch.equal(image(), before)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(pipelines, shards, tmp_path):
    folder = pipelines("sd15")
    assert distillate.main(command("sd15", folder, shards, tmp_path / "whole")) == 0
    assert distillate.main(command("sd15", folder, shards, tmp_path / "parts", "--config.train.steps=2")) == 0
    assert distillate.main(command("sd15", folder, shards, tmp_path / "parts")) == 0
    one, other = (Checkpoints(tmp_path / name / "ckpts").load(4) for name in ("whole", "parts"))
    assert all(torch.equal(other.weights[name], value) for name, value in one.weights.items())
    assert all(torch.equal(other.state["beside"][name], value) for name, value in one.state["beside"].items())


def test_pictures_show_the_teacher_and_the_student(pipelines, shards, tmp_path):
    fields = ("--config.train.preview_every=4", "--config.train.preview_images=2", "--config.compute.rows=2")
    assert distillate.main(command("sd15", pipelines("sd15"), shards, tmp_path, *fields)) == 0
    assert (tmp_path / "previews" / "00000004.png").is_file()


def test_a_whole_network_is_saved_as_its_folder(pipelines, shards, tmp_path):
    fields = ("--config.distill.lora_rank=0", "--config.distill.guidance=1")
    assert distillate.main(command("sd15", pipelines("sd15"), shards, tmp_path, *fields)) == 0
    assert (tmp_path / "student" / "unet" / "diffusion_pytorch_model.safetensors").is_file()


@pytest.mark.parametrize(("fields", "message"), [
    (("--config.data.name=cifar10",), "--config.data.name=cifar10: a pipeline learns from images with captions"),
    (("--prompts=a.txt",), "--prompts=a.txt belongs to the adaptor of a pipeline"),
    (("--config.data.path=nowhere/{0..1}.tar",), "nowhere"),
])
def test_what_makes_no_training_is_refused(fields, message, pipelines, shards, tmp_path, run_main):
    ran = run_main(distillate.main, *command("sd15", pipelines("sd15"), shards, tmp_path, *fields))
    assert ran.status == 2
    assert message in ran.stderr.splitlines()[-1]

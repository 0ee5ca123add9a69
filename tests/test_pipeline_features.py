"""Latents and texts of pipelines that prepare_data.py writes, and students that learn from them."""

import functools
import json

import pytest
import torch
from network_pipelines import PIPELINES
from small_shards import png, write_shards, write_tar

import distillate
import prepare_data
from libs.data import load_data
from libs.data.feature_data import read_context
from libs.distillation.flash_pipeline import Captions, StoredCaptions
from libs.errors import UserError
from libs.pipelines.model import PipelineModel
from libs.training.state import Checkpoints

FAMILIES = ("sd15", "sdxl", "pixart", "sd3")
FIRST = torch.full((9,), 0.25, dtype=torch.float64)  # draws of the first of two captions; 1 - FIRST of the second


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Nine pictures in two shards, of which one has two captions."""
    folder = tmp_path_factory.mktemp("shards")
    address = write_shards(folder, [5, 3])
    write_tar(folder / "02.tar", {"8": {"png": png(8), "json": json.dumps({"caption": ["a cat", "a dog"]}).encode()}})
    return address.replace("..01", "..02")


def flags(name, folder):
    adapter = [f"--config.pipeline.adapter={folder}/adapter"] if name == "sdxl_adapter" else []
    return [f"--config=configs/{name}.py:flash", f"--config.pipeline.path={folder}", "--config.compute.device=cpu",
            "--config.data.image_size=32", *adapter]


@pytest.fixture(scope="module")
def features(pipelines, shards, tmp_path_factory):
    """folder(name) of the latents and texts of the shards."""
    @functools.cache
    def folder(name):
        made = tmp_path_factory.mktemp(f"{name}_features")
        for command in ("latents", "text"):
            assert prepare_data.main([command, *flags(name, pipelines(name)), f"--images={shards}",
                                      f"--out={made}"]) == 0
        return made

    return folder


def learn(name, pipelines, features, workdir, *fields):
    return ["--config.data.name=features", f"--config.data.path={features}", f"--workdir={workdir}",
            *flags(name, pipelines(name)), "--config.train.steps=2", "--config.train.batch_size=2",
            "--config.train.save_every=1", "--config.train.preview_every=0", "--config.train.preview_images=2",
            "--config.compute.rows=2", "--config.distill.stage_updates=1,1,1,1", "--config.distill.teacher_steps=4",
            "--config.distill.lora_rank=2", "--config.distill.lora_alpha=0", *fields]


@pytest.mark.parametrize("name", FAMILIES)
def test_they_are_what_the_model_makes_of_the_images_and_captions(name, pipelines, shards, features, tmp_path):
    model = PipelineModel(PIPELINES[name](tmp_path), image_size=32)
    raw, stored = load_data("webdataset", shards, image_size=32), load_data("features", features(name))
    captions, taken, numbers = Captions(model, raw), StoredCaptions(model, stored), torch.arange(9)
    images = raw.batch(numbers)[0]
    torch.testing.assert_close(stored.batch(numbers)[0], model.codec.moments(images), rtol=1e-4, atol=1e-4)
    for draws in (FIRST, 1 - FIRST):
        wanted, held = (each.of_data(numbers, draws, images) for each in (captions, taken))
        assert held.keys() == wanted.keys()
        for each, value in wanted.items():
            torch.testing.assert_close(held[each], value.float(), rtol=1e-4, atol=1e-4)
    assert raw.texts(numbers, 1 - FIRST)[-1] == "a dog"
    cat, dog = (taken.of_data(numbers, draws, images)["context"] for draws in (FIRST, 1 - FIRST))
    assert [torch.equal(*pair) for pair in zip(cat, dog, strict=True)] == [True] * 8 + [False]
    for each, value in captions.unconditional(captions.conditions([0, 10])).items():
        torch.testing.assert_close(taken.unconditional(taken.conditions([0, 10]))[each], value.float(), rtol=1e-4,
                                   atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_student_learns_from_them_and_encodes_no_text(name, pipelines, features, tmp_path, monkeypatch):
    encode, encoded = PipelineModel.encode, []
    monkeypatch.setattr(PipelineModel, "encode",
                        lambda model, texts, **sizes: encoded.append(texts) or encode(model, texts, **sizes))
    preview = ["--config.train.preview_every=2"] if name == "sd15" else []
    assert distillate.main(learn(name, pipelines, features(name), tmp_path, *preview)) == 0
    assert all(len(texts) == 1 and not texts[0].startswith("picture") for texts in encoded)  # what is unconditional
    saved = Checkpoints(tmp_path / "ckpts").load(2)
    assert any(bool(each.any()) for each_name, each in saved.weights.items() if ".lora_B." in each_name)


def test_a_run_that_was_stopped_goes_on_bit_for_bit(pipelines, features, tmp_path):
    for steps in ((2,), (1, 2)):
        for step in steps:
            argv = learn("sdxl", pipelines, features("sdxl"), tmp_path / str(len(steps)))
            assert distillate.main([*argv, f"--config.train.steps={step}"]) == 0
    one, other = (Checkpoints(tmp_path / name / "ckpts").load(2) for name in ("1", "2"))
    assert all(torch.equal(other.weights[name], value) for name, value in one.weights.items())


def test_the_same_command_goes_on(pipelines, shards, features, tmp_path, run_main):
    argv = [*flags("sd15", pipelines("sd15")), f"--images={shards}", f"--out={tmp_path}", "--limit=7"]
    for command, name in (("latents", "6.npy"), ("text", "6_0.npy"), ("text", "empty_context.npy")):
        assert run_main(prepare_data.main, command, *argv).status == 0
        first = (tmp_path / name).read_bytes()
        assert first == (features("sd15") / name).read_bytes() or name == "6.npy"  # one of another batch of four
        (tmp_path / name).unlink()
        assert run_main(prepare_data.main, command, *argv).status == 0
        assert (tmp_path / name).read_bytes() == first
        assert not (tmp_path / "7.npy").exists()
    for command in ("text", "latents"):  # image 3 of some is not image 3 of others
        (tmp_path / {"text": ".texts.json", "latents": ".latents.json"}[command]).unlink()
        ran = run_main(prepare_data.main, command, *argv[:-1], "--limit=6")
        assert (ran.status, "wrote there is of other images; give the same --images" in ran.stderr) == (2, True)
        assert run_main(prepare_data.main, command, *argv).status == 0


def test_half_precision_is_stored_so(pipelines, shards, features, tmp_path, run_main):
    argv = [*flags("sdxl", pipelines("sdxl")), f"--images={shards}", f"--out={tmp_path}", "--limit=2"]
    assert run_main(prepare_data.main, "text", *argv, "--config.compute.precision=fp16").status == 0
    half, whole = ((folder / "1_0.npy").stat().st_size for folder in (tmp_path, features("sdxl")))
    assert half < 0.6 * whole


def test_mscoco(pipelines, tmp_path, run_main):
    listed = {"images": [{"id": i, "file_name": f"{i}.png"} for i in range(3)],
              "annotations": [{"id": i, "image_id": i, "caption": "a cat"} for i in range(3)]}
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    (tmp_path / "images").mkdir()
    for i in range(3):
        (tmp_path / f"images/{i}.png").write_bytes(png(i))
    argv = [*flags("sd15", pipelines("sd15")), f"--captions={tmp_path}/captions.json", f"--out={tmp_path}/out"]
    assert run_main(prepare_data.main, "latents", *argv, f"--images={tmp_path}/images").status == 0
    assert run_main(prepare_data.main, "text", *argv).status == 0
    data = load_data("features", tmp_path / "out")
    assert (len(data), data.has_text) == (3, True)


def test_what_does_not_fit_is_refused(pipelines, shards, features, tmp_path, run_main):
    def error(main, *argv):
        ran = run_main(main, *argv)
        assert ran.status == 2, ran.stderr
        return ran.stderr.splitlines()[-1]

    def of(name, features, *fields):
        return error(distillate.main, *learn(name, pipelines, features, tmp_path / "run", *fields))

    assert "holds texts of 16x64 (tokens, width); this network takes 16x32" in of("sd15", features("sdxl"))
    assert "holds latents of 4x8x8 (channels, height, width); this network takes 4x16x16" in of(
        "sd15", features("sd15"), "--config.data.image_size=64")
    assert "a T2I-Adapter is steered by edges of images; choose data.name=webdataset" in of(
        "sdxl_adapter", features("sdxl"))
    empty = tmp_path / "other"
    empty.mkdir()
    for file in features("sd15").glob("[0-9]*.npy"):
        (empty / file.name).write_bytes(file.read_bytes())
    (empty / "empty_context.npy").write_bytes((features("sd15") / "0_0.npy").read_bytes())
    assert "its empty text is that of another text encoder than the pipeline's" in of("sd15", empty)
    with pytest.raises(UserError, match="of a text alone: a pipeline wrote it"):
        read_context(features("sdxl") / "0_0.npy")

    argv = [*flags("sd15", pipelines("sd15")), f"--out={tmp_path / 'out'}"]
    assert "--flips: mirrored images would have no captions" in error(
        prepare_data.main, "latents", *argv, f"--images={shards}", "--flips")
    assert "--images: the shard nowhere is not there" in error(prepare_data.main, "latents", *argv, "--images=nowhere")
    assert "--prompts=a: the previews of a pipeline's student show its captions" in error(
        prepare_data.main, "text", *argv, "--prompts=a")
    assert "give --captions=FILE or --images=SHARDS, one of them" in error(prepare_data.main, "text", *argv)
    assert "a pipeline has no data set of its own" in error(prepare_data.main, "held_out", *argv)

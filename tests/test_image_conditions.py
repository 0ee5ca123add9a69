"""Super-resolution and inpainting as a user types them: train, sample, evaluate, go on, and bad input in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from image_condition_runs import TASKS, refused, save_digits, write_config
from PIL import Image
from tiny_training import assert_equal_runs

import distillate
import eval as eval_script
import sample
import train
from libs import build
from libs import config as config_files
from libs.checkpoint import read
from libs.conditioners import SuperResolution, read_images
from libs.data.images import save_png
from libs.denoiser import guided
from libs.metrics.psnr import psnr
from libs.policies import make_policy
from libs.processes import Processes
from libs.random import Stream, normal
from libs.training import load_training_data
from libs.training.batches import Batches
from libs.training.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("digits"))


@pytest.fixture(scope="module", params=TASKS)
def trained(request, tmp_path_factory):
    """(config file, training folder) of each task after the command has run."""
    folder = tmp_path_factory.mktemp(request.param)
    network, channels = TASKS[request.param]
    path = write_config(folder / "config.py", request.param, network, channels)
    assert train.main([f"--config={path}", f"--workdir={folder / 'run'}"]) == 0
    return request.param, path, folder / "run"


def read_picture(path):
    pixels = np.array(Image.open(path))
    return torch.from_numpy(pixels)[..., None]


def chain_of(path, run, digits, *overrides):
    config = config_files.load(str(path))
    for field, text in overrides:
        config_files.override(config, field, text)
    return build.load_chain(config, str(run), CPU, [field for field, _ in overrides], images=str(digits))[0]


def test_train_sample_evaluate(trained, digits, tmp_path, run_main):
    task, path, run = trained
    command = [f"--config={path}", f"--checkpoint={run}", f"--images={digits}"]
    out, result = tmp_path / "images", tmp_path / "result.json"
    ran = run_main(sample.main, *command, "--seeds=0-6", f"--out={out}")
    assert ran.status == 0, ran.stderr
    made = torch.stack([read_picture(out / f"{seed:06d}.png") for seed in range(7)])
    originals = read_images(str(digits), 8, 1).images[[0, 1, 2, 3, 4, 0, 1]]
    assert json.loads((out / "summary.json").read_text())["images_folder"] == str(digits)

    ran = run_main(eval_script.main, *command, "--seeds=0-6", f"--out={result}", f"--keep_images={tmp_path / 'kept'}")
    assert ran.status == 0, ran.stderr
    held = json.loads(result.read_text())
    score = held["metrics"]["psnr"]
    assert (score["samples"], held["images"]) == (7, str(digits))
    shown = chain_of(path, run, digits).shown
    hole = shown.hole(range(7))
    assert score["value"] == pytest.approx(psnr(made, originals, hole).mean().item())
    if task == "super_resolution":
        assert hole is None
        assert score["pixels"] == "all"
        name, bicubic = shown.picture(range(7))
        assert name == "bicubic"
        assert score["bicubic"] == pytest.approx(psnr(bicubic, originals).mean().item())
        assert score["bicubic"] > score["value"]  # four updates teach nothing
        known, kept = (F.avg_pool2d(each.permute(0, 3, 1, 2).double(), 2) for each in (originals, made))
        clipped = ((made == 0) | (made == 255)).permute(0, 3, 1, 2)
        assert ((known - kept).abs() <= 1)[~F.max_pool2d(clipped.double(), 2).bool()].all()  # means of 2 x 2 are kept
    else:
        assert score.keys() == {"value", "samples", "pixels"}
        assert score["pixels"] == "hole"
        assert torch.equal(torch.where(hole, 0, made), torch.where(hole, 0, originals))  # known pixels are kept
        assert not torch.equal(made, originals)
    again = run_main(eval_script.main, *command, "--seeds=0-6", f"--out={result}", f"--keep_images={tmp_path / 'kept'}")
    assert again.status == 0, again.stderr
    assert json.loads(result.read_text())["sampling"]["images"] == 0
    assert json.loads(result.read_text())["metrics"] == held["metrics"]


def test_the_picture_has_condition_sample_and_original(trained, digits, tmp_path, run_main):
    _, path, run = trained
    ran = run_main(sample.main, f"--config={path}", f"--checkpoint={run}", f"--images={digits}", "--seeds=3,5",
                   f"--out={tmp_path}")
    assert ran.status == 0, ran.stderr
    shown = chain_of(path, run, digits).shown
    made = torch.stack([read_picture(tmp_path / f"{seed:06d}.png") for seed in (3, 5)])
    triples = shown.beside([3, 5], made)
    assert triples.shape == (2, 8, 24, 1)
    assert torch.equal(triples[:, :, :8], shown.picture([3, 5])[1])
    assert torch.equal(triples[:, :, 8:16], made)
    assert torch.equal(triples[:, :, 16:], shown.originals([3, 5]))
    grid = read_picture(tmp_path / "grid.png")
    for triple, left in zip(triples, (2, 100), strict=True):
        enlarged = triple.repeat_interleave(4, 0).repeat_interleave(4, 1)  # small images are shown larger
        assert torch.equal(grid[2:34, left:left + 96], enlarged)
    assert (run / "previews" / "00000004.png").exists()
    assert Image.open(run / "previews" / "00000004.png").width == 2 + 2 * 98


def test_an_image_depends_on_its_seed_and_its_original_alone(trained, digits):
    _, path, run = trained
    chain = chain_of(path, run, digits)
    assert chain.conditioners.parts[0].rate == 0.2
    seeds = [0, 3, 5, 8, 9, 2**40]
    whole = torch.cat([images for _, images in chain.images(seeds)])
    for i, seed in enumerate(seeds):
        [(_, one)] = chain.images([seed])
        assert torch.equal(one[0], whole[i])
    assert not torch.equal(whole[0], whole[2])  # seeds 0 and 5 show the same image
    cond = chain._cond([0, 5], None)["concat"]
    same = torch.equal(cond[0], cond[1])
    assert same == isinstance(chain.conditioners.parts[0], SuperResolution)  # masks are the seed's


def test_guidance_against_no_condition(trained, digits):
    _, path, run = trained
    chain = chain_of(path, run, digits, ("sampler.cfg_scale", "3.0"), ("sampler.steps", "1"),
                     ("sampler.threshold", "none"))
    seeds = torch.tensor([0, 1, 2, 3])
    concat = chain.shown(seeds.tolist())["concat"]
    x_T = normal(seeds, 0, chain.shape, Stream.START)
    t = chain.ts[0]
    with torch.inference_mode():
        cond, null = (chain.denoiser(x_T, t, {"concat": each}).x_0 for each in (concat, torch.zeros_like(concat)))
        assert not torch.allclose(cond, null)
        wanted = guided(chain.denoiser, 3.0, {"concat": torch.zeros_like(concat)})(x_T, t, {"concat": concat}).x_0
    assert torch.equal(chain.sample(seeds.tolist()), wanted)
    torch.testing.assert_close(wanted, null + 3 * (cond - null), atol=1e-4, rtol=1e-3)


def test_a_checkpoint_describes_itself(trained):
    task, path, run = trained
    _, description = read(run / "ckpts/00000004/backbone_ema.safetensors")
    assert description["backbone"]["concat_channels"] == TASKS[task][1]
    assert description["cond"] == {"kind": "image", "num_classes": 0, "null_label": -1, "drop": 0.2, "task": task,
                                   "factor": 2, "masks": ["boxes", "halves", "strokes"]}
    other = build.describe(config_files.load("configs/digits_uvit.py"))
    assert other["cond"].keys() == {"kind", "num_classes", "null_label", "drop"}


@pytest.mark.parametrize("trained", ["inpainting"], indirect=True)
def test_going_on_is_the_same_as_not_stopping(trained, tmp_path, run_main):
    """Of the task whose conditions are drawn at random."""
    _, path, run = trained
    for steps in (2, 4):
        ran = run_main(train.main, f"--config={path}", f"--workdir={tmp_path / 'again'}",
                       f"--config.train.steps={steps}")
        assert ran.status == 0, ran.stderr
    config = config_files.load(str(path))
    whole, again = (Run(folder, config, None, Processes(CPU)) for folder in (run, tmp_path / "again"))
    assert_equal_runs(whole, again, step=4)
    other = run_main(train.main, f"--config={path}", f"--workdir={tmp_path / 'again'}", "--config.train.steps=5",
                     "--config.cond.masks=boxes")
    assert other.status == 2
    assert "the run in --workdir=" in other.stderr


def test_what_is_known_of_an_enlarged_image_is_kept():
    """The nearest image with the small one's means, which changes nothing where they are right already."""
    task = SuperResolution(2, (8, 8))
    image, made = 0.6 * torch.rand(2, 4, 3, 8, 8) - 0.3
    kept = task.keep(made, image, None)
    small = F.avg_pool2d(image, 2)
    assert (F.avg_pool2d(kept, 2) - small).abs().max() < 0.5 / 127.5 + 1e-5  # the small image's own rounding
    torch.testing.assert_close(task.keep(kept, image, None), kept)
    torch.testing.assert_close(kept - made, F.interpolate(F.avg_pool2d(kept - made, 2), scale_factor=2))
    assert task.keep(9 * made, image, None).abs().max() <= 1


@pytest.mark.parametrize("task", TASKS)
def test_training_conditions_belong_to_the_images_that_it_shows(task, tmp_path):
    config = config_files.load(str(write_config(tmp_path / "config.py", task, *TASKS[task])))
    description = build.describe(config)
    data = load_training_data(config.data, description, CPU)
    codec = build.make_codec(description["codec"])

    def batches(seed=0, drop=0.0, **share):
        return Batches(data, codec, description["cond"] | {"drop": drop}, True, seed, 8, **share)

    [batch] = batches().parts(3)
    [other] = batches(seed=1).parts(3)
    assert not torch.equal(batch.cond["concat"], other.cond["concat"])
    if task == "super_resolution":
        assert torch.equal(batch.cond["concat"], SuperResolution(2, (8, 8))(batch.x_0, None))  # flipped as x_0 is
    else:
        hole = batch.cond["concat"][:, :1].bool()
        assert torch.equal(batch.cond["concat"][:, 1:], torch.where(hole, 0.0, batch.x_0))
    parts = [part for rank in range(2) for part in batches(rank=rank, count=2, accumulate=2).parts(3)]
    assert len(parts) == 4
    assert torch.equal(torch.cat([part.cond["concat"] for part in parts]), batch.cond["concat"])
    [dropped] = batches(drop=0.5).parts(3)
    gone = dropped.uniform(Stream.TRAIN_DROP) < 0.5
    assert 0 < gone.sum() < 8
    assert (dropped.cond["concat"][gone] == 0).all()
    assert torch.equal(dropped.cond["concat"][~gone], batch.cond["concat"][~gone])


@pytest.mark.parametrize("policy", [{"name": "clockwork", "clock": 2},
                                    {"name": "encoder_propagation", "key_steps": "every:2", "parallel": True}])
def test_caching_policies_hand_the_condition_on(trained, digits, policy):
    _, path, run = trained
    chain = chain_of(path, run, digits, ("sampler.steps", "4"))
    plain = chain.sample([0, 1, 2, 3])
    cached = chain_of(path, run, digits, ("sampler.steps", "4"))
    settings = {"key_steps": "every:1"} if policy["name"] == "encoder_propagation" else {"clock": 1}
    cached.policy = make_policy(policy | settings, cached.policy.net)
    cached.denoiser.net = cached.policy
    assert torch.equal(cached.sample([0, 1, 2, 3]), plain)  # every step in full
    cached.policy.disable()
    cached.policy = make_policy(policy, cached.policy.net)
    cached.denoiser.net = cached.policy
    images = cached.sample([0, 1, 2, 3])
    assert not torch.equal(images, plain)
    cached.shown.data.images = 255 - cached.shown.data.images
    assert not torch.equal(cached.sample([0, 1, 2, 3]), images)


def test_psnr_is_ten_times_the_logarithm():
    a = torch.zeros(2, 4, 4, 1, dtype=torch.uint8)
    b = a.clone()
    b[1] = 5
    hole = torch.zeros(2, 4, 4, 1, dtype=torch.bool)
    hole[:, 0] = True
    b[1, 0] = 51
    assert psnr(a, b, hole).tolist() == pytest.approx([10 * np.log10(255**2 * 12), 10 * np.log10(25)])
    assert psnr(a, b)[1].item() == pytest.approx(10 * np.log10(255**2 / ((51**2 + 3 * 25) / 4)))


def test_labels_beside_images(tmp_path, digits, run_main):
    path = write_config(tmp_path / "config.py", "super_resolution,label", "UVIT", 1)
    path.write_text(path.read_text().replace('"num_heads": 2}', '"num_heads": 2, "num_classes": 11}').replace(
        "drop=0.2)", "drop=0.2, num_classes=10, null_label=10)"))
    ran = run_main(train.main, f"--config={path}", f"--workdir={tmp_path / 'run'}")
    assert ran.status == 0, ran.stderr
    chain = chain_of(path, tmp_path / "run", digits, ("sampler.cfg_scale", "2.0"))
    assert chain.num_classes == 10
    one, other = (chain.sample([0, 1], labels) for labels in ([1, 1], [1, 2]))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])
    null = chain._null(chain._cond([0, 1, 2, 3], [1, 2]))
    assert null["y"].tolist() == [10] * 4
    assert not null["concat"].any()


@pytest.mark.parametrize("trained", ["inpainting"], indirect=True)
def test_masks_can_be_chosen_when_sampling(trained, digits):
    _, path, run = trained
    chain = chain_of(path, run, digits, ("cond.masks", "halves"))
    assert (chain.shown.hole(range(4)).float().mean((1, 2, 3)) == 0.5).all()
    assert chain.shown.fingerprint["cond"]["masks"] == ["halves"]


@pytest.mark.parametrize("trained", ["super_resolution"], indirect=True)
def test_bad_input_gets_a_line(trained, digits, tmp_path, run_main):
    _, path, run = trained
    known = [f"--config={path}", f"--checkpoint={run}", "--seeds=0-1"]
    out, result = f"--out={tmp_path / 'out'}", f"--out={tmp_path / 'out.json'}"
    (tmp_path / "empty").mkdir()
    (tmp_path / "small").mkdir()
    save_png(tmp_path / "small/0.png", np.zeros((4, 4, 1), np.uint8))
    for argv, text in (
        ([], "--images is missing: a folder of images, of which this model's conditions are made"),
        ([f"--images={tmp_path / 'nowhere'}"], "--images"),
        ([f"--images={tmp_path / 'empty'}"], "--images"),
        ([f"--images={tmp_path / 'small'}"], "only 4x4"),
        ([f"--images={digits}", "--labels=1"], "--labels=1: this model has no classes"),
    ):
        line = refused(run_main, sample.main, *known, out, *argv)
        assert text in line, line
    assert "--images is missing" in refused(run_main, eval_script.main, *known, result)
    assert "this model takes no images (cond.kind='label')" in refused(
        run_main, sample.main, "--config=configs/digits_uvit.py", "--seeds=0", out, f"--images={digits}")
    assert "psnr needs a model of images" in refused(
        run_main, eval_script.main, f"--config={path}", f"--images={digits}", result)
    assert "psnr needs a model of images" in refused(
        run_main, eval_script.main, "--config=configs/digits_uvit.py", "--seeds=0-1", result,
        "--config.eval.metrics=psnr")
    learning = [f"--config={path}", f"--workdir={tmp_path / 'run'}"]
    for argv, text in (
        (["--config.cond.task=colour"], "cond.task='colour'"),
        (["--config.cond.task=inpainting"], "it gives 2 channels beside x, this network takes 1"),
        (["--config.cond.factor=3"], "cond.factor=3 does not divide images of 8x8"),
        (["--config.cond.task=nowhere.py:make"], "there is no file nowhere.py"),
        (["--config.cond.kind=pictures"], "cond.kind='pictures'"),
        (["--config.cond.kind=none"], "this network takes 1 channels beside x (backbone.concat_channels), so"),
        (["--config.cond.drop=0", "--config.sampler.cfg_scale=2"], "trained with every condition (cond.drop)"),
        (["--config.cond.task=super_resolution,label"], "Label reads 'label', which is not there"),
    ):
        line = refused(run_main, train.main, *learning, *argv)
        assert text in line, line
    ran = run_main(sample.main, *known, f"--images={digits}", out)
    assert ran.status == 0
    more = tmp_path / "more"
    shutil.copytree(digits, more)
    save_png(more / "9.png", np.zeros((8, 8, 1), np.uint8))
    assert "holds images of another chain (images_sha256" in refused(run_main, sample.main, *known, f"--images={more}",
                                                                     out)


def test_progressive_distillation_shows_the_training_sets_conditions(trained, tmp_path, run_main):
    _, path, run = trained
    ran = run_main(distillate.main, f"--config={path}:progressive", f"--checkpoint={run}", f"--workdir={tmp_path}",
                   "--config.distill.start_steps=4", "--config.train.steps=2", "--config.train.batch_size=8",
                   "--config.train.preview_every=2", "--config.distill.pair_images=3")
    assert ran.status == 0, ran.stderr
    assert (tmp_path / "pairs" / "steps_0002.png").is_file()

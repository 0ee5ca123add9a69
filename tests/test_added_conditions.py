"""A condition beside x that a training adds to weights without one: nothing at first, then as any other."""

import json
import shutil

import pytest
import torch
from image_condition_runs import refused, save_digits
from tiny_training import assert_equal_runs

import eval as eval_script
import prepare_data
import sample
import train
from libs import config as config_files
from libs.backbones.concat import add_concat_channels, without_concat
from libs.checkpoint import build_backbone, load_backbone, read, resolve, save_backbone
from libs.data import hold_out, load_learned, load_section
from libs.errors import UserError
from libs.processes import Processes
from libs.training import start_network
from libs.training.run import Run

CPU = torch.device("cpu")
SECTIONS = {
    "uvit": {"name": "uvit", "img_size": 8, "patch_size": 2, "in_chans": 1, "embed_dim": 16, "depth": 2,
             "num_heads": 2},
    "unet2d": {"name": "unet2d", "sample_size": 8, "in_channels": 1, "out_channels": 1, "layers_per_block": 1,
               "block_out_channels": (8, 16), "norm_num_groups": 8, "down_block_types": ("DownBlock2D", "DownBlock2D"),
               "up_block_types": ("UpBlock2D", "UpBlock2D"), "num_class_embeds": 11},
}
CONFIG = '''
from libs.defaults import base_config

def get_config(methods=""):
    config = base_config()
    config.backbone = {backbone}
    config.schedule = {{"name": "squared_cosine", "steps": 64}}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update({cond})
    config.compute.update(rows=4, device="cpu")
    config.sampler.update(name="ddim", steps=2, grid="trailing", threshold="static")
    config.data.update(name="digits", path="", image_size=8, channels=1, flip=False)
    config.train.update(steps=4, batch_size=8, warmup=2, log_every=1, save_every=2, keep=9, preview_every=4,
                        preview_images=3, ema=0.5, lr=1e-3)
    config.eval.metrics = ("psnr",)
    return config
'''
OF_LABELS = 'kind="label", num_classes=10, null_label=10, drop=0.1'
OF_IMAGES = 'kind="image", task="super_resolution", factor=2, drop=0.2'


def wide(kind, channels=1):
    section = SECTIONS[kind] | {"concat_channels": channels}
    return section | ({"in_channels": 1 + channels} if kind == "unet2d" else {})


def write_config(path, backbone, cond=OF_IMAGES):
    path.write_text(CONFIG.format(backbone=backbone, cond=cond))
    return path


@pytest.mark.parametrize("kind", SECTIONS)
def test_the_added_channels_change_nothing_before_they_are_trained(kind):
    torch.manual_seed(1)
    net, x, t = build_backbone(SECTIONS[kind]).eval(), torch.randn(3, 1, 8, 8), torch.tensor([1.0, 20.0, 60.0])
    with torch.no_grad():
        before = net(x, t)
        add_concat_channels(net, 2)
        assert torch.equal(net(x, t), before)
        assert torch.equal(net(x, t, concat=torch.randn(3, 2, 8, 8)), before)
    other = build_backbone(wide(kind, 2)).eval()
    other.load_state_dict(net.state_dict())  # what the section describes
    first = other.patch_embed.proj if kind == "uvit" else other.conv_in
    other(x, t, concat=torch.randn(3, 2, 8, 8)).square().mean().backward()
    assert first.weight.grad[:, 1:].abs().amax(dim=(0, 2, 3)).min() > 0  # it learns from the first step
    assert without_concat(wide(kind, 2)) == SECTIONS[kind]
    with pytest.raises(UserError, match="concat_channels=2: a Conv2d cannot take a condition beside x; uvit"):
        add_concat_channels(torch.nn.Conv2d(1, 1, 1), 2)


@pytest.mark.parametrize("task", ["super_resolution", "inpainting"])
def test_the_released_unet_starts_as_itself_without_a_class(task):
    config = config_files.load(f"configs/cifar10_{task}.py")
    net, description = start_network(config, "cifar10_unet_v")
    released = load_backbone(resolve("cifar10_unet_v"))
    assert {name: each.shape for name, each in build_backbone(description["backbone"]).state_dict().items()} == {
        name: each.shape for name, each in net.state_dict().items()}
    assert (description["cond"]["kind"], description["cond"]["task"]) == ("image", task)
    x, t = torch.randn(2, 3, 32, 32), torch.tensor([1.0, 900.0])
    with torch.no_grad():
        wanted = released(x, t, torch.tensor([10, 10]))
        assert torch.equal(net.eval()(x, t, concat=torch.randn(2, config.backbone.concat_channels, 32, 32)), wanted)
        assert not torch.allclose(released(x, t, torch.tensor([3, 3])), wanted, atol=1e-3)


@pytest.fixture(scope="module", params=SECTIONS)
def trained(request, tmp_path_factory):
    """(kind, config file of the task, weights without a condition beside x, training folder that started from them)."""
    folder, kind = tmp_path_factory.mktemp(request.param), request.param
    first = write_config(folder / "first.py", SECTIONS[kind], OF_LABELS if kind == "unet2d" else 'kind="none"')
    assert train.main([f"--config={first}", f"--workdir={folder / 'first'}", "--config.train.preview_every=0"]) == 0
    path = write_config(folder / "config.py", wide(kind))
    assert train.main([f"--config={path}", f"--checkpoint={folder / 'first'}", f"--workdir={folder / 'run'}"]) == 0
    return kind, path, folder / "first", folder / "run"


def test_sample_evaluate_and_train_on(trained, tmp_path, run_main):
    kind, path, first, run = trained
    digits = save_digits(tmp_path / "digits")
    command = [f"--config={path}", f"--checkpoint={run}", f"--images={digits}", "--seeds=0-4"]
    for steps in (1, 2):
        ran = run_main(eval_script.main, *command, f"--config.sampler.steps={steps}", f"--out={tmp_path / 'psnr.json'}")
        assert ran.status == 0, ran.stderr
        held = json.loads((tmp_path / "psnr.json").read_text())
        assert (held["nfe"], held["metrics"]["psnr"]["samples"]) == (steps, 5)
    ran = run_main(sample.main, *command, f"--out={tmp_path / 'images'}")
    assert ran.status == 0, ran.stderr
    description = read(resolve(str(run)))[1]
    assert description["backbone"] == json.loads(json.dumps(wide(kind)))
    assert (description["cond"]["kind"], description["cond"]["num_classes"]) == ("image", 0)
    ran = run_main(train.main, f"--config={path}", f"--checkpoint={run}", f"--workdir={tmp_path / 'on'}",
                   "--config.train.steps=2")
    assert ran.status == 0, ran.stderr
    assert "channels are added" not in ran.stderr
    line = refused(run_main, sample.main, f"--config={path}", f"--checkpoint={first}", f"--images={digits}",
                   "--seeds=0", f"--out={tmp_path / 'other'}")
    assert "is of another architecture: its backbone.concat_channels is None, the config's 1" in line


def test_going_on_is_the_same_as_not_stopping(trained, tmp_path, run_main):
    _, path, first, run = trained
    for steps in (2, 4):
        ran = run_main(train.main, f"--config={path}", f"--checkpoint={first}", f"--workdir={tmp_path / 'again'}",
                       f"--config.train.steps={steps}")
        assert ran.status == 0, ran.stderr
    config = config_files.load(str(path))
    whole, again = (Run(folder, config, str(first), Processes(CPU)) for folder in (run, tmp_path / "again"))
    assert_equal_runs(whole, again, step=4)


@pytest.mark.parametrize("trained", ["unet2d"], indirect=True)
def test_a_folder_of_diffusers_is_a_start_too(trained, tmp_path):
    _, path, first, run = trained
    config = config_files.load(str(path))
    for weights in (first, run):  # without the condition, and with
        net = load_backbone(resolve(str(weights)))
        shutil.rmtree(tmp_path / "unet", ignore_errors=True)
        net.save_pretrained(tmp_path / "unet")
        started, description = start_network(config, str(tmp_path / "unet"))
        assert (started.concat_channels, description["backbone"]["in_channels"]) == (1, 2)
        x, t = torch.randn(2, 1, 8, 8), torch.tensor([1.0, 60.0])
        with torch.no_grad():
            assert torch.equal(started.eval()(x, t), net(x, t))


@pytest.mark.parametrize("trained", ["unet2d"], indirect=True)
def test_what_does_not_fit_gets_a_line(trained, tmp_path, run_main):
    _, path, first, run = trained
    for start, argv, text in (
        (first, ["--config.backbone.block_out_channels=8,24"], "architecture: its backbone.block_out_channels"),
        (first, ["--config.cond.task=inpainting"], "it gives 2 channels beside x, this network takes 1"),
        (first, ["--config.cond.kind=label"], "this network takes 1 channels beside x (backbone.concat_channels), so"),
        (run, ["--config.backbone.concat_channels=2", "--config.backbone.in_channels=3"],
         "its backbone.concat_channels is 1, the config's 2"),
        ("digits_uvit", [], "of another architecture"),
    ):
        line = refused(run_main, train.main, f"--config={path}", f"--checkpoint={start}", *argv,
                       f"--workdir={tmp_path / 'run'}")
        assert text in line, line


def test_a_network_with_classes_is_shown_labels(tmp_path, run_main):
    """A UNet2D has a class for none, which it takes itself; a U-ViT has to be given it."""
    section = SECTIONS["uvit"] | {"num_classes": 11}
    description = {"backbone": section, "schedule": {"name": "squared_cosine", "steps": 64},
                   "denoiser": {"prediction": "v", "time_input": "index"}, "codec": {"name": "pixel"},
                   "cond": {"kind": "label", "num_classes": 10, "null_label": 10, "drop": 0.1}}
    save_backbone(tmp_path / "labels.safetensors", build_backbone(section).state_dict(), description)
    path = write_config(tmp_path / "config.py", section | {"concat_channels": 1}, OF_IMAGES.replace(
        "super_resolution", "super_resolution,label") + ", num_classes=10, null_label=10")
    command = [f"--config={path}", f"--checkpoint={tmp_path / 'labels.safetensors'}", f"--workdir={tmp_path / 'run'}"]
    line = refused(run_main, train.main, *command, "--config.cond.task=super_resolution")
    assert "it gives no labels, and this UViT has classes (backbone.num_classes=11); add label" in line
    ran = run_main(train.main, *command, "--config.train.steps=1")
    assert ran.status == 0, ran.stderr


def test_held_out_images(tmp_path, run_main):
    """They are not learnt from, and are written as a folder."""
    path = write_config(tmp_path / "config.py", wide("unet2d"))
    section = config_files.load(str(path)).data.to_dict() | {"hold_out": 400}
    data, (learned, held) = load_section(section), hold_out(load_section(section), 400)
    assert (len(data), len(learned), len(held)) == (1797, 1793, 4)
    assert torch.equal(held.images, data.images[[399, 799, 1199, 1599]])
    assert held.labels.tolist() == data.labels[[399, 799, 1199, 1599]].tolist()
    assert torch.equal(load_learned(section).images, learned.images)
    assert torch.equal(torch.cat([learned.images[:399], held.images[:1], learned.images[399:401]]), data.images[:402])
    out, command = tmp_path / "held", ["held_out", f"--config={path}", f"--out={tmp_path / 'held'}"]
    ran = run_main(prepare_data.main, *command, "--config.data.hold_out=400")
    assert ran.stdout == f"{out}: 4 images\n", ran.stderr
    assert sorted(each.name for each in out.iterdir()) == ["000399.png", "000799.png", "001199.png", "001599.png"]
    written = load_section(section | {"name": "folder", "path": str(out)})
    assert torch.equal(written.images, held.images)
    learning = [f"--config={path}", f"--workdir={tmp_path / 'run'}"]
    for main, argv, text in (
        (prepare_data.main, command, "--config.data.hold_out=0: training leaves out no image"),
        (train.main, [*learning, "--config.data.hold_out=1"], "data.hold_out=1 must be at least 2"),
        (train.main, [*learning, "--config.data.hold_out=2000"], "data.hold_out=2000: the data set has only 1797"),
    ):
        assert text in refused(run_main, main, *argv)


def test_a_network_with_other_weights_of_the_same_names(tmp_path):
    """The file, not the config, says whether it has a condition."""
    path = write_config(tmp_path / "config.py", wide("uvit"))
    config = config_files.load(str(path))
    tensors = build_backbone(SECTIONS["uvit"]).state_dict()
    save_backbone(tmp_path / "wide.safetensors", tensors, {"backbone": wide("uvit")})
    with pytest.raises(UserError, match="patch_embed.proj.weight"):
        start_network(config, str(tmp_path / "wide.safetensors"))

"""diffusion_distiller's checkpoint.pt, read and written."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_ddpm_unet import CONFIG, FLAGS, TINY, tiny

import distillate
import sample
import train
from libs import build, distiller_checkpoint
from libs import config as config_files
from libs.checkpoint import load_described, read, save_backbone
from libs.errors import UserError
from libs.schedule import make_schedule, time_grid


@pytest.fixture
def student(tmp_path):
    """(a published student of 8 steps, its network)."""
    net = tiny()
    torch.save({"G": net.state_dict(), "n_timesteps": 8, "time_scale": 128}, tmp_path / "checkpoint.pt")
    return tmp_path / "checkpoint.pt", net


def tiny_config():
    config = config_files.load(CONFIG)
    for flag in FLAGS[1:]:
        config_files.override(config, *flag.removeprefix("--config.").split("="))
    return config


def same_function(a, b):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    return torch.equal(a(x, t), b(x, t))


def test_checkpoint_pt_says_what_it_is(student):
    """Its schedule, labels, codec and sampler win over the config's."""
    path, net = student
    config = tiny_config()
    config.schedule = {"name": "vp_linear"}
    config.denoiser.update(prediction="eps", time_input="999t")
    config.codec.order = "rgb"
    config.sampler.update(name="ddim", steps=50, threshold="none")
    loaded, description = build.load_model(config, str(path))
    assert same_function(loaded, net)
    assert not loaded.training
    assert description["schedule"] == {"name": "squared_cosine", "steps": 8}
    assert description["denoiser"] == {"prediction": "v", "time_input": "index", "time_scale": 128}
    assert description["codec"] == {"name": "pixel", "order": "bgr"}
    assert description["cond"]["kind"] == "none"
    assert description["image"] == {"size": 8, "channels": 3}
    assert description["backbone"] == config.backbone.to_dict()
    build.adopt_sampler(config, description)
    sampler = config.sampler
    assert (sampler.name, sampler.steps, sampler.grid) == ("ddpm", 8, "trailing")
    assert (sampler.threshold, sampler.threshold_value) == ("static", 1.0)

    # A base model's labels are its indices, so nothing about them is said.
    torch.save({"G": net.state_dict(), "n_timesteps": 1024, "time_scale": 1}, path)
    assert load_described(path)[1]["denoiser"] == {"prediction": "v", "time_input": "index"}


def test_the_network_sees_index_times_time_scale(student):
    _, description = load_described(student[0])
    seen = []

    def net(x, timesteps, y=None, context=None):
        seen.append(timesteps.tolist())
        return torch.zeros_like(x)

    denoiser = build.make_denoiser(net, description)
    for t in time_grid("trailing", 8, make_schedule(**description["schedule"]))[:-1]:
        denoiser(torch.zeros(1, 3, 8, 8), t)
    assert seen == [[128.0 * i] for i in range(7, -1, -1)]


def test_alphas_are_those_of_a_schedule_made_anew():
    """The cosine betas of N steps, clamped, by their own formula."""
    schedule = make_schedule("squared_cosine", steps=8)
    times = torch.arange(9, dtype=torch.float64) / 8 + 8e-3
    alphas = torch.cos(times / 1.008 * math.pi / 2) ** 2
    betas = (1 - alphas[1:] / alphas[:-1]).clamp(max=0.999)
    expect = torch.cumprod(1 - betas, 0)
    assert torch.allclose(schedule.alpha(torch.arange(1, 9, dtype=torch.float64) / 8) ** 2, expect, rtol=1e-12)


def test_the_file_wins_over_the_configs_architecture_but_for_what_it_does_not_tell(tmp_path):
    net = tiny(channel=16)
    torch.save({"G": net.state_dict(), "n_timesteps": 8, "time_scale": 128}, tmp_path / "wide.pt")
    loaded, description = load_described(tmp_path / "wide.pt", TINY)
    assert description["backbone"]["channel"] == 16
    assert description["backbone"]["attn_heads"] == 2
    assert same_function(loaded, net)
    assert load_described(tmp_path / "wide.pt")[1]["backbone"]["attn_heads"] == 4  # the published number


def test_sample_needs_no_flag(run_main, student, tmp_path):
    ran = run_main(sample.main, *FLAGS, f"--checkpoint={student[0]}", "--seeds=0-1", f"--out={tmp_path / 'out'}")
    assert ran.status == 0, ran.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["nfe"], summary["sampler"]) == (8, "ddpm")


def test_written_and_read_back(student, tmp_path):
    net, description = load_described(student[0])
    distiller_checkpoint.save(tmp_path / "again.pt", net, description)
    held = torch.load(tmp_path / "again.pt", weights_only=True)
    assert list(held) == ["G", "n_timesteps", "time_scale"]
    assert (held["n_timesteps"], held["time_scale"], type(held["time_scale"])) == (8, 128, int)
    assert list(held["G"]) == list(net.state_dict())
    again, same = load_described(tmp_path / "again.pt")
    assert same == description
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 0.25], dtype=torch.float64)
    a, b = (build.make_denoiser(each, description)(x, t) for each in (net, again))
    assert torch.equal(a.x_0, b.x_0)
    assert not list(tmp_path.glob(".*"))


def test_our_own_models_are_written(run_main, tmp_path):
    """train.py's weights, of a model of 1024 steps, by the command."""
    net, description = tiny(), json.loads(json.dumps(build.describe(tiny_config())))
    folder = tmp_path / "run/ckpts/00000007"
    folder.mkdir(parents=True)
    save_backbone(folder / "backbone_ema.safetensors", net.state_dict(), description)
    arguments = f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'checkpoint.pt'}"
    assert run_main(distiller_checkpoint.main, *arguments).status == 0
    held = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    assert (held["n_timesteps"], held["time_scale"]) == (1024, 1)
    loaded, again = load_described(tmp_path / "checkpoint.pt", TINY)
    assert same_function(loaded, net)
    assert all(again[section] == description[section] for section in ("schedule", "denoiser", "codec"))

    ran = run_main(distiller_checkpoint.main, f"--checkpoint={tmp_path / 'checkpoint.pt'}", arguments[1])
    assert (ran.status, "is diffusion_distiller's already" in ran.stderr) == (2, True)
    ran = run_main(distiller_checkpoint.main, "--checkpoint=cifar10_unet_v", arguments[1])
    assert ran.status == 2
    assert "error: backbone.name='unet2d' cannot be written for diffusion_distiller" in ran.stderr
    ran = run_main(distiller_checkpoint.main, arguments[0], f"--out={tmp_path / 'x.safetensors'}")
    assert (ran.status, "must end in .pt" in ran.stderr) == (2, True)


@pytest.mark.parametrize(("section", "change", "problem"), [
    ("schedule", {"name": "cosine"}, "schedule.name='cosine' .* which has 'squared_cosine'"),
    ("schedule", {"s": 0.01}, "schedule.s=0.01 .* which has 0.008"),
    ("denoiser", {"prediction": "eps"}, "denoiser.prediction='eps' .* which has 'v'"),
    ("denoiser", {"time_input": "step"}, "denoiser.time_input='step' .* which has 'index'"),
    ("cond", {"kind": "label"}, "cond.kind='label' .* no condition"),
    ("codec", {"order": "rgb"}, "codec.order='rgb' .* which has 'bgr'"),
    ("codec", {"name": "kl"}, "codec.name='kl' .* which has 'pixel'"),
    ("backbone", {"name": "uvit"}, "backbone.name='uvit' .* choose from ddpm_unet, factory"),
    ("sampler", {"steps": 256}, r"student of 256 steps on a schedule of 1024 .* 4 \(i \+ 1\) - 1, .*legacy"),
])
def test_what_the_format_cannot_say(tmp_path, section, change, problem):
    description = build.describe(tiny_config())
    description[section] = description.get(section, {}) | change
    with pytest.raises(UserError, match=problem) as caught:
        distiller_checkpoint.save(tmp_path / "x.pt", tiny(), description)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


def test_broken_checkpoint_pt(tmp_path):
    path = tmp_path / "checkpoint.pt"
    good = {"G": tiny().state_dict(), "n_timesteps": 8, "time_scale": 128}
    for change in ({"n_timesteps": 0}, {"n_timesteps": "8"}, {"time_scale": -1}, {"time_scale": math.nan}):
        torch.save(good | change, path)
        with pytest.raises(UserError, match=r"n_timesteps=.* and time_scale=.* must be positive numbers"):
            read(path)
    torch.save(good | {"G": [1]}, path)
    with pytest.raises(UserError, match="not a state dict of tensors"):
        read(path)
    del good["G"]["mid.0.attention.qkv.weight"]
    torch.save(good, path)
    with pytest.raises(UserError, match=r"of another architecture: mid.0.attention.qkv.weight is missing"):
        load_described(path)
    torch.save({"G": {"fc.weight": torch.zeros(2, 2)}, "n_timesteps": 8, "time_scale": 1}, path)
    with pytest.raises(UserError, match=r"not a DDPMUNet's"):
        load_described(path, TINY)


def test_half_precision_keeps_the_frequencies(tmp_path):
    net = tiny()
    save_backbone(tmp_path / "half.safetensors", net.state_dict(), {"backbone": TINY}, dtype=torch.float16)
    tensors, _ = read(tmp_path / "half.safetensors")
    assert torch.equal(tensors["time.0.inv_freq"], net.time[0].inv_freq)
    assert tensors["down.0.weight"].dtype == torch.float16


def test_a_published_student_is_a_teacher(run_main, student, tmp_path):
    """distillate.py takes it without a flag, and by its own rules the next student is of its kind."""
    (tmp_path / "images").mkdir()
    for i in range(4):
        pixels = np.random.default_rng(i).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"images/{i}.png")
    flags = [flag.replace(CONFIG, f"{CONFIG}:hramchenko") for flag in FLAGS]
    ran = run_main(distillate.main, *flags, f"--checkpoint={student[0]}", "--config.data.name=folder",
                   f"--config.data.path={tmp_path / 'images'}", "--config.train.steps=1",
                   "--config.train.preview_every=0", f"--workdir={tmp_path / 'run'}")
    assert ran.status == 0, ran.stderr
    arguments = f"--checkpoint={tmp_path / 'run'}", f"--out={tmp_path / 'next.pt'}"
    ran = run_main(distiller_checkpoint.main, *arguments)
    assert ran.status == 0, ran.stderr
    held = torch.load(tmp_path / "next.pt", weights_only=True)
    assert (held["n_timesteps"], held["time_scale"]) == (4, 256)


def test_a_published_student_goes_on_learning_from_images(run_main, student, tmp_path):
    """In all 8 steps of its schedule, where the config samples in 1,024."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8), "red").save(tmp_path / "images/0.png")
    ran = run_main(train.main, *FLAGS, f"--checkpoint={student[0]}", "--config.data.name=folder",
                   f"--config.data.path={tmp_path / 'images'}", "--config.train.steps=1", "--config.train.batch_size=2",
                   "--config.train.preview_images=2", f"--workdir={tmp_path / 'run'}")
    assert ran.status == 0, ran.stderr
    assert "previews take 8 steps, those of the checkpoint's schedule" in ran.stderr
    described = load_described(tmp_path / "run/ckpts/00000001/backbone_ema.safetensors")[1]
    assert described["schedule"] == {"name": "squared_cosine", "steps": 8}

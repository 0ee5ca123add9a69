"""diffusion_distiller's UNet, name by name, and its checkpoint.pt, read and written."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import distillate
import sample
import train
from libs import build, distiller_checkpoint
from libs import config as config_files
from libs.backbones import DDPMUNet
from libs.backbones.attention import set_attention
from libs.backbones.ddpm_unet import ResBlock, SelfAttention, TimeEmbedding
from libs.backbones.recompute import recompute_activations
from libs.checkpoint import build_backbone, infer_backbone, load_described, read, save_backbone
from libs.errors import UserError
from libs.schedule import make_schedule, time_grid

CONFIG = "configs/celebahq256_unet.py"
# The published model, block by block: name, channels in, channels out, attention.
DOWN = [("down.1", 112, 112, 0), ("down.2", 112, 112, 0), ("down.4", 112, 224, 0), ("down.5", 224, 224, 0),
        ("down.7", 224, 224, 0), ("down.8", 224, 224, 0), ("down.10", 224, 448, 1), ("down.11", 448, 448, 1),
        ("down.13", 448, 448, 1), ("down.14", 448, 448, 1)]
MID = [("mid.0", 448, 448, 1), ("mid.1", 448, 448, 0)]
UP = [("up.0", 896, 448, 1), ("up.1", 896, 448, 1), ("up.2", 896, 448, 1), ("up.4", 896, 448, 1), ("up.5", 896, 448, 1),
      ("up.6", 672, 448, 1), ("up.8", 672, 224, 0), ("up.9", 448, 224, 0), ("up.10", 448, 224, 0),
      ("up.12", 448, 224, 0), ("up.13", 448, 224, 0), ("up.14", 336, 224, 0), ("up.16", 336, 112, 0),
      ("up.17", 224, 112, 0), ("up.18", 224, 112, 0)]
RESIZE = {"down.3.0": 112, "down.6.0": 224, "down.9.0": 224, "down.12.0": 448,
          "up.3.1": 448, "up.7.1": 448, "up.11.1": 224, "up.15.1": 224}


def published_shapes() -> dict[str, tuple[int, ...]]:
    """The names and shapes of the published file, spelled out so that the test does not ask our class."""
    shapes = {"time.0.inv_freq": (56,)}

    def layer(name, out, inside, *kernel):
        shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (out, inside, *kernel), (out,)

    def norm(name, channels):
        shapes[f"{name}.weight"] = shapes[f"{name}.bias"] = (channels,)

    layer("time.1", 448, 112)
    layer("time.3", 448, 448)
    layer("down.0", 112, 3, 3, 3)
    for name, inside, out, attention in DOWN + MID + UP:
        norm(f"{name}.resblocks.norm1", inside)  # norm2 has no weights: the time scales and shifts it
        layer(f"{name}.resblocks.conv1", out, inside, 3, 3)
        layer(f"{name}.resblocks.time.1", 2 * out, 448)
        layer(f"{name}.resblocks.conv2", out, out, 3, 3)
        if inside != out:
            layer(f"{name}.resblocks.skip", out, inside, 1, 1)
        if attention:
            norm(f"{name}.attention.norm", out)
            layer(f"{name}.attention.qkv", 3 * out, out, 1, 1)
            layer(f"{name}.attention.out", out, out, 1, 1)
    for name, channels in RESIZE.items():
        layer(name, channels, channels, 3, 3)
    norm("out.0", 112)
    layer("out.2", 3, 112, 3, 3)
    return shapes


def test_published_variant():
    config = config_files.load(CONFIG)
    with torch.device("meta"):
        net = build_backbone(config.backbone)
    state = net.state_dict()
    assert {name: tuple(each.shape) for name, each in state.items()} == published_shapes()
    assert len(state) == 343
    assert sum(p.numel() for p in net.parameters()) == 92_701_171
    # The order, which zip(parameters(), parameters()) relies on elsewhere.
    assert list(state)[:6] == ["time.0.inv_freq", "time.1.weight", "time.1.bias", "time.3.weight", "time.3.bias",
                               "down.0.weight"]
    assert [name for name in state if name.startswith("up.0.") and name.endswith("weight")] == [
        f"up.0.{name}.weight" for name in ("resblocks.norm1", "resblocks.conv1", "resblocks.time.1", "resblocks.conv2",
                                           "resblocks.skip", "attention.norm", "attention.qkv", "attention.out")]
    assert {module.num_groups for module in net.modules() if isinstance(module, nn.GroupNorm)} == {28}
    assert infer_backbone(state) == {name: list(value) if isinstance(value, tuple) else value
                                     for name, value in config.backbone.items()}


TINY = {"name": "ddpm_unet", "in_channels": 3, "channel": 8, "channel_multiplier": (1, 2), "n_res_blocks": 1,
        "attn_strides": (2,), "attn_heads": 2, "use_affine_time": True, "dropout": 0.0, "fold": 1}
FLAGS = (f"--config={CONFIG}", "--config.compute.device=cpu", "--config.backbone.channel=8",
         "--config.backbone.channel_multiplier=1,2", "--config.backbone.n_res_blocks=1",
         "--config.backbone.attn_strides=2", "--config.backbone.attn_heads=2", "--config.data.image_size=8")


def tiny(**options) -> DDPMUNet:
    """A small network whose branches are not near zero."""
    net = build_backbone(TINY | options).eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.2)
    return net


@pytest.mark.parametrize("options", [
    {}, {"use_affine_time": False}, {"channel_multiplier": (1, 1, 2), "attn_strides": (1, 4)}, {"fold": 2},
    {"in_channels": 1}, {"out_channels": 6}, {"num_classes": 5}])
def test_inferred_from_names_and_shapes(options):
    net = tiny(**options, attn_heads=4)
    section = infer_backbone(net.state_dict())
    wanted = TINY | options | {"attn_heads": 4}
    assert section == {name: list(each) if isinstance(each, tuple) else each for name, each in wanted.items()}
    assert {k: v.shape for k, v in build_backbone(section).state_dict().items()} == {
        k: v.shape for k, v in net.state_dict().items()}


def test_time_embedding_puts_sines_first():
    embedding = TimeEmbedding(4)(torch.tensor([0.0, 300.0]))
    assert embedding[0].tolist() == [0, 0, 1, 1]
    expect = [math.sin(300), math.sin(3), math.cos(300), math.cos(3)]  # frequencies 1 and 1 / 100
    assert embedding[1].tolist() == pytest.approx(expect, abs=1e-4)


@pytest.mark.parametrize("affine", [True, False])
def test_where_the_time_enters_a_block(affine):
    block = ResBlock(8, 4, 6, groups=2, affine=affine, dropout=0.0)
    x, time = torch.randn(2, 8, 4, 4), torch.randn(2, 6)
    out = block.time[1](nn.functional.silu(time))[:, :, None, None]
    h = block.conv1(nn.functional.silu(nn.functional.group_norm(x, 2)))
    if affine:
        h = (1 + out[:, :4]) * nn.functional.group_norm(h, 2) + out[:, 4:]
    else:
        h = nn.functional.group_norm(h + out, 2)
    expect = block.skip(x) + block.conv2(nn.functional.silu(h))
    assert torch.allclose(block(x, time), expect, atol=1e-6)


def test_attention_divides_by_the_root_of_all_channels():
    layer = SelfAttention(32, heads=4, groups=8)
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.3)
    x = torch.randn(2, 32, 5, 3)
    qkv = layer.qkv(layer.norm(x)).view(2, 4, 3, 8, 15)  # heads, q k v, head width, places
    q, k, v = qkv.unbind(2)
    weights = (torch.einsum("bhci,bhcj->bhij", q, k) / 32**0.5).softmax(-1)
    expect = x + layer.out(torch.einsum("bhij,bhcj->bhci", weights, v).reshape(2, 32, 5, 3))
    assert torch.allclose(layer(x), expect, atol=1e-5)
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):  # the one of linear memory; it raises where it cannot serve
        assert torch.allclose(layer(x), expect, atol=1e-5)
    set_attention(layer, "plain")
    assert torch.allclose(layer(x), expect, atol=1e-5)


def test_initial_weights():
    net = build_backbone(TINY | {"channel": 32})
    weight = net.down[1].resblocks.conv1.weight
    bound = math.sqrt(6 / (2 * 32 * 9))
    assert 0.99 * bound < weight.abs().max() <= bound
    assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.05)
    near_zero = {name for name, each in net.named_parameters() if name.endswith("weight") and each.abs().max() < 1e-4}
    ends = ("conv2.weight", "resblocks.time.1.weight", "attention.out.weight", "out.2.weight")
    assert near_zero == {name for name in net.state_dict() if name.endswith(ends)}
    assert all(not each.any() for name, each in net.named_parameters() if name.endswith("bias"))
    added = build_backbone(TINY | {"use_affine_time": False}).down[1].resblocks.time[1].weight
    assert added.abs().max() > 0.1
    assert net(torch.randn(1, 3, 8, 8), torch.tensor([3.0])).abs().max() < 1e-2


def test_fold_stacks_squares_of_pixels():
    net = tiny(fold=2)
    seen = []
    net.down[0].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    x = torch.randn(1, 3, 8, 8)
    assert net(x, torch.tensor([3.0])).shape == x.shape
    for channel in range(3):
        for row in range(2):
            for column in range(2):
                assert torch.equal(seen[0][0, 4 * channel + 2 * row + column], x[0, channel, row::2, column::2])


def test_labels_and_what_is_refused():
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 9.0])
    net = tiny(num_classes=3)
    outs = [net(x, t, torch.tensor(y)) for y in ([0, 0], [0, 2])]
    assert torch.equal(outs[0][0], outs[1][0])
    assert not torch.allclose(outs[0][1], outs[1][1])
    with pytest.raises(ValueError, match="y "):
        net(x, t)
    with pytest.raises(ValueError, match="takes no y"):
        tiny()(x, t, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="context"):
        tiny()(x, t, context=x)
    with pytest.raises(UserError, match=r"data.image_size: .* stride 2, which must divide images of 7 x 7"):
        tiny()(torch.randn(1, 3, 7, 7), t[:1])
    with pytest.raises(UserError, match="channel=10 must be a multiple of 4"):
        build_backbone(TINY | {"channel": 10})
    with pytest.raises(UserError, match="attn_heads=3 must divide the 16 channels"):
        build_backbone(TINY | {"attn_heads": 3})


def test_gradient_checkpointing_changes_no_gradient():
    plain, recomputed = tiny(), tiny()
    recomputed.load_state_dict(plain.state_dict())
    recompute_activations(recomputed)
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 9.0])
    for net in (plain, recomputed):
        net(x, t).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)
    assert all(module.use_checkpoint for module in recomputed.modules() if hasattr(module, "use_checkpoint"))


def test_compiles_into_one_graph():
    net, x, t = tiny(), torch.randn(2, 3, 8, 8), torch.tensor([1.0, 9.0])
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, y=None, context=None), net(x, t), atol=1e-6)


# checkpoint.pt


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

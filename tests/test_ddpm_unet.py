"""diffusion_distiller's UNet, name by name."""

import math

import pytest
import torch
from tiny_ddpm_unet import CONFIG, TINY, tiny
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from libs import config as config_files
from libs.backbones.attention import set_attention
from libs.backbones.ddpm_unet import ResBlock, SelfAttention, TimeEmbedding
from libs.backbones.recompute import recompute_activations
from libs.checkpoint import build_backbone, infer_backbone
from libs.errors import UserError

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

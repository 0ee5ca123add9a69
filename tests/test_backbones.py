"""Published U-ViT variants: parameter counts and names; token order, patch layout, attention kernels; UNet2D."""

import pytest
import torch
from torch import nn

from libs import config as config_files
from libs.backbones import UNet2D, UViT
from libs.backbones.attention import choose_attention, plain_attention, sdpa_attention, set_attention
from libs.backbones.uvit import timestep_embedding
from libs.build import describe
from libs.checkpoint import build_backbone, infer_uvit
from libs.errors import UserError

# config -> (parameters in millions, tensors), of the published weights
PUBLISHED = {
    "cifar10_uvit_small": (44.26, 164),
    "celeba64_uvit_small": (44.29, 164),
    "imagenet64_uvit_mid": (130.94, 213),
    "imagenet64_uvit_large": (286.83, 261),
    "imagenet256_uvit_large": (286.76, 261),
    "imagenet256_uvit_huge": (500.83, 355),
    "imagenet512_uvit_large": (286.86, 261),
    "imagenet512_uvit_huge": (500.94, 355),
    "mscoco_uvit_small": (44.69, 166),
    "mscoco_uvit_deep": (58.35, 214),
}


def published_keys(depth: int, labels: bool, text: bool, conv: bool) -> set[str]:
    """The names in an official file, spelled out here so that the test does not ask our class."""
    keys = {"patch_embed.proj.weight", "patch_embed.proj.bias", "pos_embed", "norm.weight", "norm.bias",
            "decoder_pred.weight", "decoder_pred.bias"}
    keys |= {"label_emb.weight"} if labels else set()
    keys |= {"context_embed.weight", "context_embed.bias"} if text else set()
    keys |= {"final_layer.weight", "final_layer.bias"} if conv else set()
    halves = [f"in_blocks.{i}" for i in range(depth // 2)], [f"out_blocks.{i}" for i in range(depth // 2)]
    for block in [*halves[0], "mid_block", *halves[1]]:
        keys |= {f"{block}.{name}.{kind}" for name in ("norm1", "norm2", "attn.proj", "mlp.fc1", "mlp.fc2")
                 for kind in ("weight", "bias")}
        keys.add(f"{block}.attn.qkv.weight")
        if block.startswith("out"):
            keys |= {f"{block}.skip_linear.weight", f"{block}.skip_linear.bias"}
    return keys


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_variant(name):
    millions, tensors = PUBLISHED[name]
    config = config_files.load(f"configs/{name}.py")
    with torch.device("meta"):
        net = build_backbone(config.backbone)
    state = net.state_dict()
    assert round(sum(p.numel() for p in net.parameters()) / 1e6, 2) == millions
    section = config.backbone
    keys = published_keys(section.depth, section.num_classes > 0, name.startswith("mscoco"), section.conv)
    assert set(state) == keys
    assert len(keys) == tensors
    if name.startswith("mscoco"):
        assert state["pos_embed"].shape[1] == 1 + 77 + 256
    inferred = infer_uvit(state)  # what load_backbone makes of a file that does not describe itself
    with torch.device("meta"):
        again = build_backbone(inferred)
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in state.items()}
    assert inferred["num_heads"] == section.num_heads


@pytest.mark.parametrize("path", [
    path for path in config_files.known_files()
    if "backbone" in config_files.load(path) and config_files.load(path).backbone.get("factory") != ""
    and config_files.load(path).backbone.name != "autoencoder_kl"])  # not a network to sample from
def test_every_config_builds_on_meta(path):
    config = config_files.load(path)
    with torch.device("meta"):
        net = build_backbone(config.backbone)
    assert next(net.parameters()).device.type == "meta"
    assert describe(config)["backbone"]["name"] == config.backbone.name
    assert config_files.ROOT.joinpath(path).read_text().startswith('"""')


def tiny(**options):
    return UViT(**{"img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 32, "depth": 4, "num_heads": 4,
                   **options})


def test_timestep_embedding_puts_cosines_first():
    embedding = timestep_embedding(torch.tensor([0.0, 3.0]), 6)
    assert torch.equal(embedding[0], torch.tensor([1.0, 1, 1, 0, 0, 0]))
    assert torch.allclose(embedding[1, [0, 3]], torch.tensor([-0.98999, 0.14112]), atol=1e-4)  # cos 3, sin 3


def test_token_order():
    """[label, time, patches] and [time, text, patches]; each token shows where its input changes."""
    net = tiny(num_classes=5)
    x, t, y = torch.randn(1, 3, 8, 8), torch.tensor([3.0]), torch.tensor([1])
    tokens = net.embed(x, t, y)
    assert tokens.shape == (1, 2 + 16, 32)
    changed = lambda a: (a - tokens).abs().sum(-1)[0].nonzero().flatten().tolist()  # noqa: E731
    assert changed(net.embed(x, t, torch.tensor([2]))) == [0]
    assert changed(net.embed(x, t + 1, y)) == [1]
    pixel = x.clone()
    pixel[0, 0, 0, 7] += 1  # the patch at row 0, column 3
    assert changed(net.embed(pixel, t, y)) == [2 + 3]

    net = tiny(clip_dim=6, num_clip_token=7)
    context = torch.randn(1, 7, 6)
    tokens = net.embed(x, t, context=context)
    assert changed(net.embed(x, t + 1, context=context)) == [0]
    assert changed(net.embed(x, t, context=context + 1)) == list(range(1, 8))


def test_head_unpatchifies_channel_last():
    """The output of a patch is laid out (row, column, channel)."""
    net = tiny(conv=False)
    net.norm, net.decoder_pred = nn.Identity(), nn.Identity()
    tokens = torch.arange(12.0).repeat(17, 1)[None] + 100 * torch.arange(-1, 16.0)[None, :, None]
    image = net.head(tokens)
    for token, (row, column) in {0: (0, 0), 1: (0, 2), 4: (2, 0)}.items():
        for p1 in range(2):
            for p2 in range(2):
                expect = 100 * token + (p1 * 2 + p2) * 3 + torch.arange(3.0)
                assert torch.equal(image[0, :, row + p1, column + p2], expect)


def test_long_skips_run_last_in_first_out():
    net = tiny().eval()
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    tokens = net.embed(x, t)
    first = net.in_blocks[0](tokens)
    second = net.in_blocks[1](first)
    out = net.out_blocks[1](net.out_blocks[0](net.mid_block(second), second), first)
    assert torch.equal(net(x, t), net.head(out))
    assert len(net.block_list()) == 5


def test_attention_equals_the_formula():
    q, k, v = torch.randn(3, 2, 4, 9, 8).unbind(0)
    weights = torch.einsum("bhid,bhjd->bhij", q, k).div(8**0.5).softmax(-1)
    expect = torch.einsum("bhij,bhjd->bhid", weights, v)
    assert torch.allclose(plain_attention(q, k, v), expect, atol=1e-6)
    assert torch.allclose(sdpa_attention(q, k, v), expect, atol=1e-6)
    net, x, t = tiny().eval(), torch.randn(2, 3, 8, 8), torch.tensor([1.0, 9.0])
    fused = net(x, t)
    set_attention(net, "plain")
    assert net.mid_block.attn.attention_function is plain_attention
    assert torch.allclose(net(x, t), fused, atol=1e-5)
    with pytest.raises(UserError, match="attention='flash' is unknown; choose from sdpa, xformers, plain"):
        choose_attention("flash")


def test_gradient_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain = tiny()
    recomputed = tiny(use_checkpoint=True)
    recomputed.load_state_dict(plain.state_dict())
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 9.0])
    for net in (plain, recomputed):
        net(x, t).square().sum().backward()
    for a, b in zip(plain.parameters(), recomputed.parameters(), strict=True):
        assert torch.equal(a.grad, b.grad)


def test_uvit_refuses_missing_conditions_and_odd_sizes():
    x, t = torch.randn(1, 3, 8, 8), torch.tensor([1.0])
    with pytest.raises(ValueError, match="y"):
        tiny(num_classes=3)(x, t)
    with pytest.raises(ValueError, match="context"):
        tiny(clip_dim=4, num_clip_token=7)(x, t)
    with pytest.raises(UserError, match="depth=3"):
        build_backbone({"name": "uvit", "img_size": 8, "patch_size": 2, "embed_dim": 32, "num_heads": 4,
                        "depth": 3})
    with pytest.raises(UserError, match="backbone.name='vit' is unknown; choose from uvit, unet2d"):
        build_backbone({"name": "vit"})


def tiny_unet(**options):
    return UNet2D(sample_size=8, in_channels=3, out_channels=3, layers_per_block=1, block_out_channels=(16, 32),
                  down_block_types=("DownBlock2D", "AttnDownBlock2D"), norm_num_groups=8, attention_head_dim=8,
                  up_block_types=("AttnUpBlock2D", "UpBlock2D"), **options).eval()


def test_unet2d_is_diffusers_unet_behind_our_call():
    from diffusers import UNet2DModel

    net = tiny_unet(num_class_embeds=5)
    theirs = UNet2DModel.from_config(net.config).eval()
    theirs.load_state_dict(net.state_dict())
    x, t, y = torch.randn(2, 3, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 2])
    assert torch.equal(net(x, t, y), theirs(x, t, class_labels=y).sample)
    assert torch.equal(net(x, t), net(x, t, torch.tensor([4, 4])))  # no label is the last class
    with pytest.raises(ValueError, match="context"):
        net(x, t, y, context=torch.randn(2, 7, 6))

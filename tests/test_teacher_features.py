"""Teacher features: those of the full forward, of every family, at the price of the encoder."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from diffusers import (
    AuraFlowTransformer2DModel,
    DiTTransformer2DModel,
    PixArtTransformer2DModel,
    SanaTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from einops import rearrange
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DataParallel

from libs.backbones import DDPMUNet, UViT
from libs.backbones.recompute import recompute_activations
from libs.backbones.unet2d import UNet2D
from libs.cost import MacCounter
from libs.denoiser import Denoiser
from libs.distillation.teacher_features import TeacherFeatures, feature_shape
from libs.errors import UserError
from libs.heads.discriminator import Discriminator
from libs.lora import AdaptersOff, add_lora
from libs.schedule import make_schedule

SCHEDULE = make_schedule(name="scaled_linear")
UNET = {"sample_size": 16, "layers_per_block": 1, "block_out_channels": (8, 16), "norm_num_groups": 4,
        "attention_head_dim": 4}
TEXT_UNET = {**UNET, "cross_attention_dim": 6, "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
             "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D")}
TRANSFORMER = {"sample_size": 8, "patch_size": 2, "in_channels": 4, "num_attention_heads": 2, "attention_head_dim": 8}
TEXT = {"encoder_hidden_states": (5, 6)}


class Adapted(nn.Module):
    """A diffusers network behind the call that all backbones share."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x, timesteps, **cond):
        return self.net(x, timestep=timesteps, return_dict=False, **cond)[0]


class Family(NamedTuple):
    """A tiny network: its input (c, h, w), its conditions (...) a row, and where its middle is.

    tokens: (rows, columns) of patches at the end of the block's output; None where that is a map
    """

    build: Callable[[], nn.Module]
    shape: tuple[int, int, int]
    cond: dict[str, tuple[int, ...]]
    middle: str
    tokens: tuple[int, int] | None = None


FAMILIES = {
    "UNet2D": Family(lambda: UNet2D(**UNET, num_class_embeds=4, down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                    up_block_types=("AttnUpBlock2D", "UpBlock2D")), (3, 16, 8), {"y": ()}, "mid_block"),
    "UNet2DCondition": Family(lambda: Adapted(UNet2DConditionModel(**TEXT_UNET)), (4, 10, 7), TEXT, "net.mid_block"),
    "without a middle": Family(lambda: Adapted(UNet2DConditionModel(**TEXT_UNET, mid_block_type=None)), (4, 8, 8), TEXT,
                               "net.down_blocks.1"),
    "added conditions": Family(
        lambda: Adapted(UNet2DConditionModel(**TEXT_UNET, class_embed_type="projection",
                                             projection_class_embeddings_input_dim=5)),
        (4, 8, 8), {**TEXT, "class_labels": (5,)}, "net.mid_block"),
    "DDPMUNet": Family(lambda: DDPMUNet(channel=8, channel_multiplier=(1, 2, 3), n_res_blocks=1, num_classes=4),
                       (3, 16, 8), {"y": ()}, "mid.1"),
    "UViT": Family(lambda: UViT(img_size=8, patch_size=2, embed_dim=16, depth=2, num_heads=2, num_classes=4, clip_dim=6,
                                num_clip_token=5), (3, 8, 8), {"y": (), "context": (5, 6)}, "mid_block", (4, 4)),
    "DiT": Family(lambda: Adapted(DiTTransformer2DModel(**TRANSFORMER, num_layers=3, num_embeds_ada_norm=4,
                                                        norm_num_groups=4)),
                  (4, 8, 8), {"class_labels": ()}, "net.transformer_blocks.1", (4, 4)),
    "PixArt": Family(lambda: Adapted(PixArtTransformer2DModel(**TRANSFORMER, num_layers=4, cross_attention_dim=16,
                                                              caption_channels=6, use_additional_conditions=False)),
                     (4, 8, 12), TEXT, "net.transformer_blocks.2", (4, 6)),
    "Sana": Family(lambda: Adapted(SanaTransformer2DModel(**{**TRANSFORMER, "patch_size": 1}, num_layers=3,
                                                          num_cross_attention_heads=2, cross_attention_head_dim=8,
                                                          cross_attention_dim=16, caption_channels=6)),
                   (4, 4, 6), TEXT, "net.transformer_blocks.1", (4, 6)),
    "SD3": Family(lambda: Adapted(SD3Transformer2DModel(**TRANSFORMER, num_layers=4, joint_attention_dim=6,
                                                        caption_projection_dim=16, pooled_projection_dim=7,
                                                        out_channels=4, pos_embed_max_size=8)),
                  (4, 8, 12), {**TEXT, "pooled_projections": (7,)}, "net.transformer_blocks.2", (4, 6)),
    "AuraFlow": Family(lambda: Adapted(AuraFlowTransformer2DModel(
        **TRANSFORMER, num_mmdit_layers=1, num_single_dit_layers=3, joint_attention_dim=6, caption_projection_dim=16,
        pos_embed_max_size=64)), (4, 8, 8), TEXT, "net.single_transformer_blocks.1", (4, 4)),
    "AuraFlow, joint": Family(lambda: Adapted(AuraFlowTransformer2DModel(
        **TRANSFORMER, num_mmdit_layers=3, num_single_dit_layers=1, joint_attention_dim=6, caption_projection_dim=16,
        pos_embed_max_size=64)), (4, 8, 8), TEXT, "net.joint_transformer_blocks.2", (4, 4)),
}


def frozen(family: Family) -> nn.Module:
    torch.manual_seed(0)
    net = family.build().eval().requires_grad_(False)
    for parameter in net.parameters():
        if parameter.dim() < 2 or not parameter.any():  # zeros would hide what a layer does
            parameter.normal_(std=0.3)
    return net


def inputs(family: Family, rows: int = 2) -> tuple[torch.Tensor, torch.Tensor, dict]:
    cond = {name: torch.randn(rows, *shape) if shape else torch.arange(1, rows + 1)
            for name, shape in family.cond.items()}
    return torch.randn(rows, *family.shape), torch.linspace(0.2, 0.7, rows, dtype=torch.float64), cond


def denoiser_of(net, **options) -> Denoiser:
    return Denoiser(net, SCHEDULE, **{"time_input": "index", **options})


def middle_map(net: nn.Module, family: Family, call: Callable) -> torch.Tensor:
    """What the middle block gives in a forward that goes on to the end, as a map."""
    seen = []
    with net.get_submodule(family.middle).register_forward_hook(lambda module, args, out: seen.append(out)):
        call()
    out, = seen
    if family.tokens is None:
        return out[0] if isinstance(out, tuple) else out
    tokens = out[1] if isinstance(out, tuple) else out
    rows, columns = family.tokens
    return rearrange(tokens[:, tokens.shape[1] - rows * columns:], "b (h w) d -> b d h w", h=rows, w=columns)


class Calls:
    """Names of the modules that run in a `with` block, in order."""

    def __init__(self, net: nn.Module):
        self.net, self.names = net, []

    def __enter__(self) -> list[str]:
        self.hooks = [module.register_forward_pre_hook(lambda module, args, name=name: self.names.append(name))
                      for name, module in self.net.named_modules() if name]
        return self.names

    def __exit__(self, *error):
        for hook in self.hooks:
            hook.remove()


@pytest.fixture(params=FAMILIES)
def family(request) -> Family:
    return FAMILIES[request.param]


# What they are


def test_equal_the_full_forwards(family):
    net = frozen(family)
    x_t, t, cond = inputs(family)
    denoiser = denoiser_of(net)
    features = TeacherFeatures(denoiser, net)(x_t, t, cond)
    assert torch.equal(features, middle_map(net, family, lambda: denoiser.call(x_t, t, cond)))
    assert features.shape[1:] == feature_shape(net, family.shape)
    assert features.std(dim=(2, 3)).min() > 0
    assert Discriminator(*features.shape[1:], first=4)(features).shape == (2, 1)


def test_nothing_runs_behind_the_middle(family):
    net = frozen(family)
    x_t, t, cond = inputs(family)
    with Calls(net) as full:
        denoiser_of(net).call(x_t, t, cond)
    with Calls(net) as short:
        TeacherFeatures(denoiser_of(net), net)(x_t, t, cond)
    assert short == full[:len(short)]
    assert short[-1].startswith(family.middle)
    assert not any(name.startswith(family.middle) for name in full[len(short):])
    assert len(short) < len(full)


def test_gradient_of_the_input_alone(family):
    net = frozen(family)
    x_t, t, cond = inputs(family)
    x_t.requires_grad_(True)
    features = TeacherFeatures(denoiser_of(net), net)(x_t, t, cond)
    weights = torch.randn_like(features)
    gradient, = torch.autograd.grad((features * weights).sum(), x_t)
    full = middle_map(net, family, lambda: denoiser_of(net).call(x_t, t, cond))
    expected, = torch.autograd.grad((full * weights).sum(), x_t)
    assert torch.equal(gradient, expected)
    assert gradient.abs().sum() > 0
    assert all(each.grad is None for each in net.parameters())


def test_output_option():
    family = FAMILIES["SD3"]
    net = frozen(family)
    x_t, t, cond = inputs(family)
    denoiser = denoiser_of(net)
    features = TeacherFeatures(denoiser, net, "output")(x_t, t, cond)
    assert torch.equal(features, denoiser.output(x_t, t, cond))
    assert features.shape[1:] == feature_shape(net, family.shape, "output")
    unknown = nn.Conv2d(4, 4, 1)  # any network has an output
    assert feature_shape(unknown, (4, 8, 8), "output") == (4, 8, 8)
    TeacherFeatures(denoiser_of(unknown), unknown, "output")


@pytest.mark.parametrize(("name", "shape"), [("SD 1.5", (1280, 8, 8)), ("SDXL", (1280, 32, 32))])
def test_published_shapes(name, shape):
    config = {
        "SD 1.5": {"block_out_channels": (320, 640, 1280, 1280), "cross_attention_dim": 768,
                   "down_block_types": ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",),
                   "up_block_types": ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3},
        "SDXL": {"block_out_channels": (320, 640, 1280), "cross_attention_dim": 2048,
                 "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
                 "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D")},
    }[name]
    with torch.device("meta"):
        net = UNet2DConditionModel(**config)
    side = {"SD 1.5": 64, "SDXL": 128}[name]
    assert feature_shape(net, (4, side, side)) == shape
    if name == "SD 1.5":
        features, full = (counted(net, call) for call in (lambda denoiser: TeacherFeatures(denoiser, net),
                                                          lambda denoiser: denoiser.call))
        assert round(features / full, 3) == 0.325  # an early end saves two thirds of the multiply-adds


def counted(net: nn.Module, call: Callable) -> int:
    """Multiply-adds of `call(denoiser)(x_t, t, cond)` on the meta device."""
    x_t, context = torch.empty(1, 4, 64, 64, device="meta"), torch.empty(1, 77, 768, device="meta")
    with torch.no_grad(), MacCounter() as counter:
        call(denoiser_of(Adapted(net)))(x_t, torch.tensor(0.5, dtype=torch.float64), {"encoder_hidden_states": context})
    return counter.total


# How they are called


def test_time_unit_and_precision_are_the_denoisers():
    family = FAMILIES["UNet2D"]
    net = frozen(family)
    x_t, t, cond = inputs(family)
    half = denoiser_of(net, autocast=lambda: torch.autocast("cpu", torch.bfloat16))
    features = TeacherFeatures(half, net)(x_t, t, cond)
    expected = middle_map(net, family, lambda: half.call(x_t, t, cond))
    assert expected.dtype == torch.bfloat16
    assert features.dtype == torch.float32
    assert torch.equal(features, expected.float())
    assert not torch.is_autocast_enabled("cpu")
    continuous = TeacherFeatures(denoiser_of(net, time_input="1000t"), net)
    shifted = t - 1e-3  # index n = 1000 t - 1
    whole = TeacherFeatures(denoiser_of(net), net)
    assert torch.allclose(whole(x_t, t, cond), continuous(x_t, shifted, cond), atol=1e-5)
    assert not torch.allclose(whole(x_t, t, cond), continuous(x_t, t, cond), atol=1e-5)
    assert torch.equal(whole(x_t, t[0], cond), whole(x_t, t[:1].expand(2), cond))


def test_through_what_is_around_the_network():
    family = FAMILIES["UNet2D"]
    net = frozen(family)
    call = inputs(family)
    assert torch.equal(TeacherFeatures(denoiser_of(net), DataParallel(net))(*call),
                       TeacherFeatures(denoiser_of(net), net)(*call))


@pytest.mark.parametrize("name", ["UNet2DCondition", "DDPMUNet", "UViT", "PixArt", "SD3"])
def test_lora_student_as_its_own_teacher(name):
    """Features and their gradient are the base network's, with activations kept or computed again; the backward pass
    runs when LoRA is on again.
    """
    family = FAMILIES[name]
    net = frozen(family).train()
    x_t, t, cond = inputs(family)
    x_t.requires_grad_(True)
    weights = torch.randn(2, *feature_shape(net, family.shape))

    def gradient(called):
        found = TeacherFeatures(denoiser_of(called), net)(x_t, t, cond)
        return found, torch.autograd.grad((weights * found).sum(), x_t)[0]

    base = gradient(net)
    add_lora(net, 2)
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter, std=0.3)
    assert all(torch.equal(*pair) for pair in zip(base, gradient(AdaptersOff(net)), strict=True))
    recompute_activations(net)
    assert all(torch.equal(*pair) for pair in zip(base, gradient(AdaptersOff(net)), strict=True))
    assert not torch.allclose(base[0], gradient(net)[0])


def test_compiled_network(fresh_compiler):
    family = FAMILIES["UViT"]
    net, counter = frozen(family), CompileCounter()
    compiled = torch.compile(net, backend=counter)
    denoiser = denoiser_of(compiled)
    x_t, t, cond = inputs(family)
    features = TeacherFeatures(denoiser, compiled)
    before = features(x_t, t, cond)
    assert counter.frame_count == 0
    full = denoiser.call(x_t, t, cond)
    assert counter.frame_count == 1
    assert torch.equal(features(x_t, t, cond), before)
    assert torch.equal(before, TeacherFeatures(denoiser_of(net), net)(x_t, t, cond))
    assert torch.equal(denoiser.call(x_t, t, cond), full)
    assert counter.frame_count == 1  # the compiled forward is still the one without a hook


# What they leave behind


def hooks_of(net: nn.Module) -> int:
    return sum(len(module._forward_hooks) for module in net.modules())


def test_other_forwards_stay_as_they_are(family):
    net = frozen(family)
    x_t, t, cond = inputs(family)
    denoiser = denoiser_of(net)
    before = denoiser.call(x_t, t, cond)
    features = TeacherFeatures(denoiser, net)
    for _ in range(2):
        features(x_t, t, cond)
        assert hooks_of(net) == 0
        assert torch.equal(denoiser.call(x_t, t, cond), before)


def test_after_an_error():
    family = FAMILIES["UViT"]
    net = frozen(family)
    x_t, t, cond = inputs(family)
    denoiser = denoiser_of(net)
    features = TeacherFeatures(denoiser, net)
    with pytest.raises(ValueError, match="y .* is missing"):
        features(x_t, t, {"context": cond["context"]})
    assert hooks_of(net) == 0
    assert torch.equal(features(x_t, t, cond), middle_map(net, family, lambda: denoiser.call(x_t, t, cond)))


def test_another_network_is_an_error():
    family = FAMILIES["UViT"]
    net = frozen(family)
    with pytest.raises(RuntimeError, match="middle block"):
        TeacherFeatures(denoiser_of(copy.deepcopy(net)), net)(*inputs(family))
    assert hooks_of(net) == 0


@pytest.mark.parametrize("name", ["UNet2DCondition", "PixArt"])
def test_the_ended_forward_keeps_no_memory(name):
    family = FAMILIES[name]
    net = frozen(family).train()
    net.net.enable_gradient_checkpointing()
    kept = []
    first = net.get_submodule(family.middle.rpartition(".")[0]) if family.tokens else net.net.down_blocks
    first[0].register_forward_hook(lambda module, args, out: kept.append(weakref.ref(
        out[0] if isinstance(out, tuple) else out)))
    x_t, t, cond = inputs(family)
    gc.collect()
    gc.disable()
    try:
        with torch.no_grad():
            TeacherFeatures(denoiser_of(net), net)(x_t, t, cond)
        TeacherFeatures(denoiser_of(net), net)(x_t.requires_grad_(), t, cond)
        assert len(kept) == 2
        assert [reference() for reference in kept] == [None, None]
    finally:
        gc.enable()
    x = torch.randn(3, requires_grad=True)  # what is saved for a backward pass is checkpointing's no longer
    assert torch.equal(torch.autograd.grad(x.exp().sum(), x)[0], x.exp())


# Refusals


def test_unknown_network():
    net = nn.Sequential(nn.Conv2d(4, 4, 1))
    for call in (lambda: TeacherFeatures(denoiser_of(net), net), lambda: feature_shape(net, (4, 8, 8))):
        with pytest.raises(UserError) as caught:
            call()
        text = str(caught.value)
        assert "\n" not in text
        for fragment in ("discriminator_features=middle", "Sequential", "UViT", "SD3Transformer2DModel", "output"):
            assert fragment in text


def test_unknown_features():
    family = FAMILIES["UViT"]
    net = frozen(family)
    for call in (lambda: TeacherFeatures(denoiser_of(net), net, "midle"),
                 lambda: feature_shape(net, family.shape, "midle")):
        with pytest.raises(UserError, match=r"discriminator_features='midle' is unknown; choose from middle, output"):
            call()


def test_sizes_of_maps():
    """Odd sides too, which diffusers' encoders round up."""
    family = FAMILIES["UNet2DCondition"]
    net = frozen(family)
    for height, width in itertools.product((5, 8, 9), (4, 7)):
        sized = family._replace(shape=(4, height, width))
        features = TeacherFeatures(denoiser_of(net), net)(*inputs(sized))
        assert features.shape[1:] == feature_shape(net, sized.shape) == (16, -(-height // 2), -(-width // 2))

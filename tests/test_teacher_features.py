"""Teacher features: those of the full forward, of every family, at the price of the encoder."""

import copy
import gc
import itertools
import weakref
from collections.abc import Callable

import pytest
import torch
from diffusers import UNet2DConditionModel
from einops import rearrange
from network_families import FAMILIES, Adapted, Family, frozen, inputs
from torch import nn
from torch._dynamo.testing import CompileCounter
from torch.nn.parallel import DataParallel

from libs.backbones.recompute import recompute_activations
from libs.cost import MacCounter
from libs.denoiser import Denoiser
from libs.distillation.teacher_features import TeacherFeatures, feature_shape
from libs.errors import UserError
from libs.heads.discriminator import Discriminator
from libs.lora import AdaptersOff, add_lora
from libs.schedule import make_schedule

SCHEDULE = make_schedule(name="scaled_linear")


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

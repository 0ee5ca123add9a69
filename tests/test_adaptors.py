"""Adaptors: what they start as, what they recover, what they cost, and their files."""

import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from libs.adaptors import ADAPTORS, DeepFeatures, Extrapolation, RidgeAdaptor, make_adaptor
from libs.adaptors.files import check_adaptor, load_adaptor, save_adaptor
from libs.checkpoint import save_backbone
from libs.errors import UserError

LEARNED = ("resnet", "unet", "unet_light")
SIZES = {"c_in": 6, "c_out": 10, "temb_dim": 12}
MADE_FOR = {"depth": 1, "cut": "before", **SIZES, "sampler": "dpm_solver_pp", "steps": 8, "clock": 2,
            "network": {"name": "unet2d", "block_out_channels": [6, 10]}}
SD15 = {"c_in": 320, "c_out": 640, "temb_dim": 1280}


def options(name):
    return {"width": 16} if name in LEARNED else {}


def small(name):
    return make_adaptor(name, **SIZES, **options(name))


def features(size=8, rows=2, dtype=torch.float32, ratio=0.0):
    def draw(*shape):
        return torch.randn(rows, *shape).to(dtype)

    key = draw(10, size, size)
    return DeepFeatures(r_in=draw(6, size, size), r_in_key=draw(6, size, size), r_prev=key, r_key=key,
                        r_key_before=draw(10, size, size), ratio=torch.tensor([ratio]), temb=draw(12))


def moved(name):
    """An adaptor whose zero-initialised layer has moved."""
    adaptor = small(name)
    for parameter in adaptor.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return adaptor


def only_used(adaptor, deep):
    return DeepFeatures(**{name: getattr(deep, name) for name in adaptor.uses})


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 5, 8, 9])
@pytest.mark.parametrize("name", ADAPTORS)
def test_starts_as_the_identity(name, size, dtype):
    """Bit for bit, at odd sizes, in half precision, and with no field beyond `uses`."""
    adaptor, deep = small(name).to(dtype), features(size, dtype=dtype)
    out = adaptor(only_used(adaptor, deep))
    assert out.dtype == dtype
    assert torch.equal(out, deep.r_prev)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ADAPTORS)
def test_half_precision(name, dtype):
    """A float32 adaptor serves a half-precision UNet; its own weights may be halved too."""
    adaptor, deep = moved(name), features(5, dtype=dtype, ratio=0.5)
    wide = adaptor(DeepFeatures(*(each.float() for each in deep)))
    for each in (adaptor, adaptor.to(dtype)):
        out = each(deep)
        assert out.dtype == dtype
        assert out.shape == deep.r_prev.shape
        assert (out.float() - wide).norm() < 0.02 * wide.norm()


@pytest.mark.parametrize("name", ["resnet", "unet", "extrapolation", "ridge"])
def test_compiles_into_one_graph(name):
    adaptor, deep = moved(name), features(5, ratio=0.5)
    compiled = torch.compile(adaptor, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(deep), adaptor(deep))


@pytest.mark.parametrize("name", ADAPTORS)
def test_rows_are_independent(name):
    """The rows of guidance, or of other images, do not see each other."""
    adaptor, deep = moved(name), features(8, ratio=0.5)
    alone = adaptor(DeepFeatures(*(each if len(each) == 1 else each[:1] for each in deep)))
    torch.testing.assert_close(adaptor(deep)[:1], alone)


@pytest.mark.parametrize("name", [*LEARNED, "ridge"])
def test_trains(name):
    """The first step can only move the last layer; from then on every parameter gets a gradient."""
    adaptor, deep = small(name), features(8)
    target = deep.r_prev + 0.1 * torch.randn_like(deep.r_prev)
    optimizer = torch.optim.Adam(adaptor.parameters(), lr=1e-3)
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        loss = F.mse_loss(adaptor(deep), target)
        loss.backward()
        gradients = {key: each.grad for key, each in adaptor.named_parameters()}
        assert all(each is not None and each.isfinite().all() for each in gradients.values())
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(each.any() for each in gradients.values()), [key for key, each in gradients.items() if not each.any()]


def test_time_matters():
    for name in LEARNED:
        adaptor, deep = moved(name), features(8)
        assert not torch.allclose(adaptor(deep), adaptor(deep._replace(temb=deep.temb + 1)))


def test_sizes_on_stable_diffusion():
    """Against the paper's 14 M, 152 M and 3 M. Without its text input the first is 13.55 M; with one, 13.94 M."""
    with torch.device("meta"):
        count = {name: sum(each.numel() for each in make_adaptor(name, **SD15).parameters()) for name in LEARNED}
    text = 1024 * 384 + 384  # a projection of the pooled OpenCLIP embedding to the width
    assert count["resnet"] == 13_547_776
    assert count["resnet"] + text == pytest.approx(13.94e6, rel=1e-3)
    assert count["unet"] == pytest.approx(152e6, rel=0.15)
    assert count["unet_light"] == pytest.approx(3e6, rel=0.15)


def test_macs_on_stable_diffusion():
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        deep = DeepFeatures(r_in=torch.empty(1, 320, 32, 32), r_prev=torch.empty(1, 640, 32, 32),
                            temb=torch.empty(1, 1280))
        assert make_adaptor("resnet", **SD15)(deep).shape == (1, 640, 32, 32)
    assert counter.get_total_flops() / 2 == pytest.approx(3.2e9, rel=0.01)


def test_extrapolation_is_exact_on_a_line():
    """Full steps 3 and 7 of r(i) = a + b i give r(9), whichever the dtype of the ratio."""
    start, slope = torch.randn(2, 4, 3, 3).double(), torch.randn(2, 4, 3, 3).double()
    deep = DeepFeatures(r_key=start + 7 * slope, r_key_before=start + 3 * slope, ratio=torch.tensor([2 / 4]))
    torch.testing.assert_close(Extrapolation()(deep), start + 9 * slope)
    torch.testing.assert_close(Extrapolation(strength=0.5)(deep), start + 8 * slope)
    assert torch.equal(Extrapolation(strength=0.0)(deep), deep.r_key)


def ridge_samples(count=4, noise=0.0, size=7):
    """Steps whose r_out follows a known 1x1 map of the change of r_in, and that map."""
    weight, bias = torch.randn(10, 6), torch.randn(10)
    samples = []
    for _ in range(count):
        r_in, r_in_key, r_key = (torch.randn(2, c, size, size) for c in (6, 6, 10))
        change = F.conv2d(r_in - r_in_key, weight[:, :, None, None], bias)
        samples.append((r_in, r_in_key, r_key, r_key + change + noise * torch.randn_like(r_key)))
    return samples, weight, bias


def squared_error(adaptor, samples):
    return sum((adaptor(DeepFeatures(r_in=r_in, r_in_key=r_in_key, r_key=r_key)) - r_out).square().sum().item()
               for r_in, r_in_key, r_key, r_out in samples)


def test_ridge_recovers_a_map():
    samples, weight, bias = ridge_samples()
    adaptor = RidgeAdaptor(6, 10)
    adaptor.fit(iter(samples), ridge=1e-6)
    torch.testing.assert_close(adaptor.map.weight[:, :, 0, 0], weight, rtol=0, atol=1e-4)
    torch.testing.assert_close(adaptor.map.bias, bias, rtol=0, atol=1e-4)


@pytest.mark.parametrize("ridge", [0.0, 1e-3, 10.0])
@pytest.mark.parametrize("noise", [0.0, 30.0])
def test_ridge_is_never_worse_than_the_identity(noise, ridge):
    """On its own samples, few and noisy ones too, and where a channel never changes."""
    samples, _, _ = ridge_samples(count=1, noise=noise, size=2)
    samples[0][0][:, 0] = samples[0][1][:, 0]
    identity, fitted = RidgeAdaptor(6, 10), RidgeAdaptor(6, 10)
    fitted.fit(samples, ridge)
    assert squared_error(fitted, samples) <= squared_error(identity, samples)
    assert fitted.map.weight[:, 0].abs().max() < 1e-6


def test_ridge_refuses():
    adaptor = RidgeAdaptor(6, 10)
    (sample,), _, _ = ridge_samples(count=1)
    r_in, r_in_key, r_key, r_out = sample
    for samples, ridge, words in (
        ([], 1e-3, "no samples"),
        ([sample], -1.0, "ridge=-1.0"),
        ([(r_in, r_in_key, r_key[..., :3], r_out[..., :3])], 1e-3, "r_out"),
        ([(r_in, r_in_key, r_key, r_out * torch.inf)], 1e-3, "not finite"),
    ):
        with pytest.raises(UserError, match=words):
            adaptor.fit(samples, ridge)
    assert not adaptor.map.weight.any()


def test_unknown_names_and_options():
    for name, extra, words in (("resnt", {}, "choose from resnet, unet, unet_light, extrapolation, ridge"),
                               ("resnet", {"depth": 3}, "depth"), ("resnet", {"width": 3}, "width=3"),
                               ("extrapolation", {"strength": float("nan")}, "strength=nan")):
        with pytest.raises(UserError, match=words) as caught:
            make_adaptor(name, **SIZES, **extra)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ADAPTORS)
def test_files(name, tmp_path):
    adaptor, deep = moved(name), features(5, ratio=0.5)
    extra = {"strength": 0.5} if name == "extrapolation" else options(name)
    if name == "extrapolation":
        adaptor = Extrapolation(**extra)
    stem = torch.randn(6, 3, 3, 3)
    save_adaptor(tmp_path / "adaptor.safetensors", adaptor, name, extra, MADE_FOR, stem)
    loaded, made_for = load_adaptor(tmp_path / "adaptor.safetensors")
    assert torch.equal(loaded(deep), adaptor(deep))
    assert not loaded.training
    assert torch.equal(made_for.pop("stem"), stem.half())
    assert made_for == MADE_FOR
    save_adaptor(tmp_path / "bare.safetensors", adaptor, name, extra, MADE_FOR)
    assert load_adaptor(tmp_path / "bare.safetensors")[1]["stem"] is None


def test_bad_files(tmp_path):
    good = tmp_path / "good.safetensors"
    save_adaptor(good, moved("resnet"), "resnet", {"width": 16}, MADE_FOR)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-100])
    (tmp_path / "head.safetensors").write_bytes(good.read_bytes()[:50])
    (tmp_path / "note.txt").write_text("not weights")
    save_file({"x": torch.zeros(1)}, tmp_path / "plain.safetensors")
    save_backbone(tmp_path / "net.safetensors", {"x": torch.zeros(1)}, {"backbone": {"name": "uvit"}})
    save_adaptor(tmp_path / "width.safetensors", moved("resnet"), "resnet", {"width": 32}, MADE_FOR)
    save_adaptor(tmp_path / "name.safetensors", moved("resnet"), "resnt", {"width": 16}, MADE_FOR)
    save_adaptor(tmp_path / "option.safetensors", moved("resnet"), "resnet", {"widht": 16}, MADE_FOR)
    for file, words in {"gone.safetensors": "no such file; choose from identity, extrapolation, clockwork_resnet",
                        "note.txt": "no adaptor file; choose from identity",
                        "cut.safetensors": "cannot be read", "head.safetensors": "cannot be read",
                        "plain.safetensors": "holds no adaptor", "net.safetensors": "holds no adaptor",
                        "width.safetensors": "another architecture", "name.safetensors": "choose from resnet",
                        "option.safetensors": "widht", "": "no such file"}.items():
        with pytest.raises(UserError, match=words) as caught:
            load_adaptor(tmp_path / file)
        assert "\n" not in str(caught.value)
        assert f"policy.adaptor={str(tmp_path / file)!r}" in str(caught.value)


def test_save_wants_what_load_needs(tmp_path):
    with pytest.raises(ValueError, match="depth, cut"):
        save_adaptor(tmp_path / "a.safetensors", moved("ridge"), "ridge", {}, SIZES)
    assert not list(tmp_path.iterdir())


def test_check():
    """Rounding the UNet passes; another cut, other sizes and other weights do not."""
    stem = torch.randn(6, 3, 3, 3)
    file, made_for = "runs/adaptor.safetensors", MADE_FOR | {"stem": stem.half()}
    here = {"depth": 1, "cut": "before", **SIZES, "stem": stem}
    for each in (stem, stem.half(), stem.bfloat16(), 1.01 * stem, None):
        check_adaptor(file, made_for, **here | {"stem": each})
    check_adaptor(file, MADE_FOR | {"stem": None}, **here)
    check_adaptor(file, made_for | {"cut": "any"}, **here)
    for field, other, words in (("depth", 2, "depth=1, but here depth=2"), ("cut", "after", "cut='before'"),
                                ("c_in", 320, "c_in=6"), ("c_out", 640, "c_out=10"), ("temb_dim", 1280, "temb_dim=12"),
                                ("stem", 1.05 * stem, "differs by 5.0%"), ("stem", stem * torch.nan, "differs"),
                                ("stem", stem[:, :2], r"\(6, 2, 3, 3\)")):
        with pytest.raises(UserError, match=words) as caught:
            check_adaptor(file, made_for, **here | {field: other})
        assert str(caught.value).startswith("policy.adaptor='runs/adaptor.safetensors' was made for ")
        assert "\n" not in str(caught.value)

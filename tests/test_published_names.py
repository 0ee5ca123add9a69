"""The names of Clockwork's and Faster Diffusion's own releases, and the installed name of the package."""

import importlib
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from setuptools import find_packages
from small_pipeline import image, small, small_image_to_image
from tiny_pipelines import controlnet, text_to_image

from libs.errors import UserError
from libs.pipelines import (
    Clockwork,
    ClockworkWrapper,
    EncoderPropagation,
    apply_policy,
    register_faster_forward,
    register_normal_pipeline,
    register_parallel_pipeline,
    seed_everything,
)
from libs.policies.key_steps import PUBLISHED

ROOT = Path(__file__).parents[1]


def called(pipe, kwargs: dict, **others) -> torch.Tensor:
    return pipe.call(**kwargs | others, generator=torch.Generator().manual_seed(0)).images


@pytest.mark.parametrize("make", [text_to_image, small, small_image_to_image])
def test_clockwork_wrapper_is_clockwork(make):
    pipe, kwargs = make()
    plain, before = image(pipe, kwargs), dict(vars(pipe.unet))
    with apply_policy(pipe, Clockwork(4)):
        expected = image(pipe, kwargs)
    assert not torch.equal(expected, plain)

    unet = pipe.unet
    pipe.unet = ClockworkWrapper(pipe.unet, clock=4)
    assert (pipe.unet.dtype, pipe.unet.config.sample_size, pipe.unet.clock) == (torch.float32, 8, 4)
    for _ in range(2):
        assert torch.equal(image(pipe, kwargs), expected)
    pipe.unet.reset()
    assert torch.equal(image(pipe, kwargs), expected)
    with pytest.raises(UserError, match=r"has a caching policy already \(Clockwork\(clock=4,"):
        ClockworkWrapper(pipe.unet, clock=2)

    assert pipe.unet.disable_clockwork() is unet
    assert dict(vars(unet)) == before
    assert torch.equal(image(pipe, kwargs), plain)


def test_the_clock_of_a_clockwork_wrapper_may_be_changed():
    pipe, kwargs = small()
    with apply_policy(pipe, Clockwork(2)):
        expected = image(pipe, kwargs)
    pipe.unet = ClockworkWrapper(pipe.unet, clock=4)
    image(pipe, kwargs)
    pipe.unet.clock = 2
    assert torch.equal(image(pipe, kwargs), expected)
    pipe.unet.clock = 0
    with pytest.raises(UserError, match=r"policy\.clock=0 must be at least 1"):
        image(pipe, kwargs)


def test_clockwork_wrapper_with_a_clock_of_1_is_the_unet():
    pipe, kwargs = small()
    plain = image(pipe, kwargs)
    pipe.unet = ClockworkWrapper(pipe.unet, clock=1)
    assert torch.equal(image(pipe, kwargs), plain)
    with pytest.raises(UserError, match=r"policy\.clock=0"):
        ClockworkWrapper(small()[0].unet, clock=0)


@pytest.mark.parametrize("register", [register_parallel_pipeline, register_normal_pipeline])
@pytest.mark.parametrize(("mod", "key_steps"), [("50ls", "50ls"), (4, "every:4"), ("pro", "pro"), (1, "every:1")])
def test_registered_pipelines_are_encoder_propagation(register, mod, key_steps):
    pipe, kwargs = small()
    plain = image(pipe, kwargs)
    settings = EncoderPropagation(key_steps, parallel=register is register_parallel_pipeline, prior_noise=0.003)
    with apply_policy(pipe, settings):
        expected = image(pipe, kwargs)
    assert not torch.equal(expected, plain)

    register(pipe)
    register_faster_forward(pipe.unet, mod=mod)
    assert torch.equal(called(pipe, kwargs), expected)
    assert torch.equal(image(pipe, kwargs), plain)  # which stays as it was
    register(pipe, mod=mod)  # named in both places, as their README does
    assert torch.equal(called(pipe, kwargs), expected)


def test_published_lists_by_name_and_by_default():
    pipe, kwargs = controlnet()
    register_parallel_pipeline(pipe)
    register_faster_forward(pipe.unet)
    by_default = called(pipe, kwargs)
    with apply_policy(pipe, EncoderPropagation("50ls", parallel=True, prior_noise=0.003)) as handle:
        assert torch.equal(image(pipe, kwargs), by_default)
    assert handle.stats()["control_calls"] == handle.stats()["full_calls"] < kwargs["num_inference_steps"]
    for mod in PUBLISHED:
        register_faster_forward(pipe.unet, mod=mod)


def test_mod_that_nobody_knows():
    pipe, kwargs = small()
    for mod in (0, -1, 1.5, "51ls", True):
        for register in (lambda mod: register_parallel_pipeline(pipe, mod=mod),
                         lambda mod: register_faster_forward(pipe.unet, mod=mod)):
            with pytest.raises(UserError, match=r"mod=.* is unknown; choose an interval of at least 1 or one of 50ls"):
                register(mod)
    register_parallel_pipeline(pipe, mod=2)
    register_faster_forward(pipe.unet, mod=3)
    with pytest.raises(UserError, match="mod=2 of the pipeline is not mod=3 of register_faster_forward"):
        called(pipe, kwargs)
    assert not hasattr(pipe.unet, "_step_cache")


def test_an_error_in_a_registered_call_leaves_the_plain_pipeline():
    pipe, kwargs = small()
    plain = image(pipe, kwargs)
    register_parallel_pipeline(pipe, mod=2)

    def broken(pipe, step, t, tensors):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        called(pipe, kwargs, callback_on_step_end=broken)
    assert torch.equal(image(pipe, kwargs), plain)
    assert "forward" not in vars(pipe.unet)


def test_seed_everything():
    drawn = []
    for seed in (2023, 2023, 2024):
        seed_everything(seed)
        drawn.append((random.random(), np.random.random(), torch.rand(()).item()))  # noqa: NPY002
    assert drawn[0] == drawn[1] != drawn[2]


def test_the_installed_name(tmp_path, monkeypatch):
    """setup.py maps `libs` to `diffusion_shortcuts`; there is no package called libs where it is installed."""
    assert {"pipelines", "policies", "adaptors"} <= set(find_packages(str(ROOT / "libs")))
    pipe, kwargs = small()
    with apply_policy(pipe, Clockwork(2)):
        expected = image(pipe, kwargs)

    (tmp_path / "diffusion_shortcuts").symlink_to(ROOT / "libs")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "libs"]:
        monkeypatch.setitem(sys.modules, name, None)  # an import of it fails
    installed = importlib.import_module("diffusion_shortcuts.pipelines")
    try:
        with installed.apply_policy(pipe, installed.Clockwork(2)):
            assert torch.equal(image(pipe, kwargs), expected)
    finally:
        for name in [name for name in sys.modules if name.split(".")[0] == "diffusion_shortcuts"]:
            del sys.modules[name]

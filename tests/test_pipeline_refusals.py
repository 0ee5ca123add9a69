"""The one line that users of caching policies get for what cannot be served."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DiTPipeline, DiTTransformer2DModel, UNet3DConditionModel
from safetensors.torch import save_file
from small_pipeline import HERE, image, in_one_line, resnet, small, small_unet, traces
from tiny_pipelines import controlnet, scheduler, sdxl

from libs.adaptors import make_adaptor
from libs.adaptors.files import save_adaptor
from libs.pipelines import (
    Clockwork,
    EncoderPropagation,
    apply_policy,
    register_normal_pipeline,
    register_parallel_pipeline,
)
from libs.policies.early_exit import EarlyExit


@pytest.mark.parametrize(("make", "words"), [
    (lambda: Clockwork(0), r"policy\.clock=0 must be at least 1"),
    (lambda: Clockwork(clock="4"), r"policy\.clock='4' must be a whole number"),
    (lambda: Clockwork(clock=2.5), r"policy\.clock=2\.5 must be a whole number"),
    (lambda: Clockwork(clock=True), r"policy\.clock=True must be a whole number"),
    (lambda: Clockwork(depth=None), r"policy\.depth=None must be a whole number"),
    (lambda: Clockwork(depth=-1), r"policy\.depth=-1"),
    (lambda: Clockwork(protect_first=-1), r"policy\.protect_first=-1"),
    (lambda: Clockwork(cut="sideways"), "policy.cut='sideways'.*choose from auto, before, after"),
    (lambda: Clockwork(adaptor="gone.safetensors"), "policy.adaptor='gone.safetensors': no such file"),
    (lambda: Clockwork(adaptor=Path("gone.safetensors")), "policy.adaptor='gone.safetensors': no such file"),
    (lambda: Clockwork(adaptor=torch.nn.Linear(2, 2)), "policy.adaptor: an object of class Linear is no adaptor"),
    (lambda: Clockwork(adaptor=2), "policy.adaptor: an object of class int is no adaptor; choose"),
    (lambda: EncoderPropagation(4), "policy.key_steps=4 must be a string: every:4, a list such as 0,1,2,3,5,10, or"),
    (lambda: EncoderPropagation([0, 1, 2]), r"policy.key_steps=\[0, 1, 2\] must be a string: every:4"),
    (lambda: EncoderPropagation("1,2"), "policy.key_steps='1,2': step 0 must be a key step"),
    (lambda: EncoderPropagation("every:0"), "policy.key_steps='every:0': the interval must be at least 1"),
    (lambda: EncoderPropagation("often"), "policy.key_steps='often' is unknown; write every:4"),
    (lambda: EncoderPropagation("0,-1"), "policy.key_steps='0,-1'"),
    (lambda: EncoderPropagation(""), "policy.key_steps=''"),
    (lambda: EncoderPropagation("\N{SUPERSCRIPT TWO}"), "policy.key_steps='.' is unknown; write every:4"),
    (lambda: EncoderPropagation("every:\N{SUPERSCRIPT TWO}"), "policy.key_steps='every:.' is unknown; write every:4"),
    (lambda: EncoderPropagation(parallel="no"), "policy.parallel='no' must be True or False"),
    (lambda: EncoderPropagation(max_parallel=0), r"policy\.max_parallel=0"),
    (lambda: EncoderPropagation(max_parallel=2.5), r"policy\.max_parallel=2\.5 must be a whole number"),
    (lambda: EncoderPropagation(prior_noise="0.003"), r"policy\.prior_noise='0\.003' must be a number"),
    (lambda: EncoderPropagation(prior_noise=float("nan")), r"policy\.prior_noise=nan must be finite"),
    (lambda: EncoderPropagation(prior_noise=-1.0), r"policy\.prior_noise=-1\.0"),
    (lambda: EncoderPropagation(prior_from=2.0), r"policy\.prior_from=2\.0"),
])
def test_bad_settings_are_refused_in_one_line(make, words):
    in_one_line(make, words)


def refused(pipe, policy, words: str, *modules) -> None:
    """`apply_policy` refuses in one line and leaves nothing on the modules."""
    before = traces(*modules)
    in_one_line(lambda: apply_policy(pipe, policy), words)
    assert traces(*modules) == before
    assert "step" not in vars(pipe.scheduler)


@pytest.mark.parametrize(("policy", "shown"), [
    ("clockwork", "'clockwork'"), (None, "None"), ({"name": "clockwork"}, r"\{'name': 'clockwork'\}"),
    (Clockwork, "<class '.*Clockwork'>"), (EarlyExit(), r"EarlyExit\(.*\)"),
])
def test_what_is_no_policy(policy, shown):
    pipe, _ = small()
    refused(pipe, policy, rf"^apply_policy: {shown} is no policy; give it a Clockwork\(...\) or an "
            r"EncoderPropagation\(...\)$", pipe.unet)


def test_a_unet_is_no_pipeline():
    pipe, _ = small()
    in_one_line(lambda: apply_policy(pipe.unet, Clockwork(2)), r"^UNet2DConditionModel is a network, and Clockwork "
                r"wants the pipeline around it; for a loop of your own there is Clockwork\(...\).attach\(net\)$")


def test_depth_that_the_unet_does_not_have():
    pipe, kwargs = small()
    refused(pipe, Clockwork(depth=3), r"policy\.depth=3: this UNet2DConditionModel has 3 levels; choose from 1, 2",
            pipe.unet)
    with apply_policy(pipe, Clockwork(2, depth=2)):
        image(pipe, kwargs)
    pipe, kwargs = sdxl()
    with apply_policy(pipe, Clockwork(2)) as by_default:
        expected = image(pipe, kwargs)
    with apply_policy(pipe, Clockwork(2, depth=2)):
        assert torch.equal(image(pipe, kwargs), expected)
    assert by_default.stats()["reuse_calls"] == 3


def test_second_policy_on_one_unet():
    pipe, kwargs = small()
    for adaptor, named in (("identity", "identity"), (resnet(), "ResNetAdaptor")):
        with apply_policy(pipe, Clockwork(2, adaptor=adaptor)):
            expected = image(pipe, kwargs)
            for policy in (Clockwork(4), EncoderPropagation(prior_noise=0.1)):
                refused(pipe, policy, rf"UNet2DConditionModel has a caching policy already \(Clockwork\(clock=2, .*"
                        rf"adaptor='{named}', .*\); disable", pipe.unet)
            assert torch.equal(image(pipe, kwargs), expected)


def test_second_policy_on_one_controlnet():
    first, kwargs = controlnet()
    second = SimpleNamespace(unet=small_unet(), scheduler=scheduler(), controlnet=first.controlnet)
    with apply_policy(first, EncoderPropagation("every:2")) as handle:
        expected = image(first, kwargs)
        refused(second, EncoderPropagation("every:2", prior_noise=0.1), "ControlNetModel is served by a caching policy",
                second.unet, first.controlnet)
        assert torch.equal(image(first, kwargs), expected)
        assert handle.stats()["control_calls"] == 6
        assert apply_policy(second, Clockwork(2)).stats()["calls"] == 0  # which leaves ControlNets alone


def test_pipelines_without_a_unet_that_can_be_served():
    transformer = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=4,
                                        num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=10)
    pipe = DiTPipeline(transformer, None, scheduler())
    for register in (register_parallel_pipeline, register_normal_pipeline):
        in_one_line(lambda register=register: register(pipe), "DiTPipeline has no UNet, so EncoderPropagation cannot")
    for policy in (Clockwork(2), EncoderPropagation("every:3", parallel=True)):
        refused(pipe, policy, "DiTPipeline has no UNet, so (Clockwork|EncoderPropagation) cannot serve it; what "
                "applies to it are few-step students", transformer)
    video = UNet3DConditionModel(block_out_channels=(8, 8), down_block_types=("CrossAttnDownBlock3D", "DownBlock3D"),
                                 up_block_types=("UpBlock3D", "CrossAttnUpBlock3D"), layers_per_block=1,
                                 norm_num_groups=4, cross_attention_dim=8, attention_head_dim=4)
    refused(SimpleNamespace(unet=video, scheduler=scheduler()), Clockwork(2),
            "cannot serve a UNet3DConditionModel; they know UNet2DConditionModel, UNet2DModel", video)


def test_key_steps_beyond_the_loop():
    pipe, kwargs = small()
    plain = image(pipe, kwargs)
    for parallel in (False, True):
        with apply_policy(pipe, EncoderPropagation("0,7", parallel=parallel)):
            in_one_line(lambda: image(pipe, kwargs), "policy.key_steps='0,7': step 7 is out of range.*steps 0 to 5")
            image(pipe, kwargs, num_inference_steps=8)
    assert torch.equal(image(pipe, kwargs), plain)


def test_adaptors_of_another_unet(tmp_path):
    pipe, kwargs = small()
    here = {"depth": 1, "cut": "before", **HERE}
    files = {
        "good": {},
        "depth=2": {"depth": 2},
        "cut='after'": {"cut": "after"},
        "c_in=8": {"c_in": 8},
        "c_out=64": {"c_out": 64},
        "temb_dim=128": {"temb_dim": 128},
        "another UNet": {"stem": torch.randn_like(pipe.unet.conv_in.weight)},
    }
    for name, other in files.items():
        made_for = here | other
        stem = made_for.pop("stem", pipe.unet.conv_in.weight)
        path = str(tmp_path / f"{len(name)} {name.partition('=')[0]}.safetensors")  # which does not say what is wrong
        save_adaptor(path, resnet(**{key: made_for[key] for key in HERE}), "resnet", {"width": 16}, made_for, stem)
        policy = Clockwork(2, adaptor=path)
        assert f"adaptor={path!r}" in repr(policy)
        if name != "good":
            refused(pipe, policy, f"^policy.adaptor={re.escape(repr(path))} was made for {name}", pipe.unet)
            continue
        with apply_policy(pipe, policy) as handle:
            untrained = image(pipe, kwargs)
            assert handle.stats()["reuse_calls"] == 3
    with apply_policy(pipe, Clockwork(2, cut="before")):  # which every adaptor is before it is trained
        assert torch.equal(image(pipe, kwargs), untrained)
    in_one_line(lambda: Clockwork(adaptor=policy.adaptor, cut="after"), "policy.cut='after': a ResNetAdaptor needs")
    for field, other in {"c_in": 8, "c_out": 64, "temb_dim": 128}.items():  # handed over as a module
        refused(pipe, Clockwork(2, adaptor=resnet(**{field: other})),
                f"policy.adaptor: this ResNetAdaptor has {field}={other}, but here {field}={HERE[field]}", pipe.unet)
    refused(pipe, Clockwork(2, depth=2, adaptor=resnet()), "policy.adaptor: this ResNetAdaptor has c_in=16", pipe.unet)
    refused(pipe, Clockwork(2, adaptor=make_adaptor("ridge", 16, 64, 64)), "this RidgeAdaptor has c_out=64", pipe.unet)
    with apply_policy(pipe, Clockwork(2, adaptor=resnet())):
        assert torch.equal(image(pipe, kwargs), untrained)
    save_file({"x": torch.zeros(1)}, tmp_path / "weights.safetensors")
    in_one_line(lambda: Clockwork(adaptor=str(tmp_path / "weights.safetensors")), "holds no adaptor")

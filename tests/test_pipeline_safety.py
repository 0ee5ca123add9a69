"""Caching policies beside what else users put on a pipeline, and the one line that they get for what cannot be."""

import copy
import io
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate import hooks as accelerate_hooks
from diffusers import DiTPipeline, DiTTransformer2DModel, UNet3DConditionModel
from peft import LoraConfig
from safetensors.torch import save_file
from small_pipeline import close, image, small, small_unet
from tiny_pipelines import controlnet, scheduler, sdxl

from libs.adaptors import make_adaptor
from libs.adaptors.files import save_adaptor
from libs.errors import UserError
from libs.pipelines import (
    Clockwork,
    EncoderPropagation,
    apply_policy,
    register_normal_pipeline,
    register_parallel_pipeline,
)
from libs.policies.early_exit import EarlyExit

POLICIES = {
    "clockwork": Clockwork(2),
    "extrapolation": Clockwork(2, depth=2, adaptor="extrapolation", cut="before"),
    "parallel": EncoderPropagation("every:3", parallel=True, prior_noise=0.003),
}


def traces(*modules) -> list[dict]:
    return [{name: id(value) for name, value in vars(each).items()} for module in modules for each in module.modules()]


# Together with other things

def lora(pipe) -> None:
    torch.manual_seed(1)
    pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v", "conv1"]))
    for name, parameter in pipe.unet.named_parameters():
        if "lora_B" in name:  # zero at first
            torch.nn.init.normal_(parameter, std=0.1)


def free_u(pipe) -> None:
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)


def other_weights(pipe) -> None:
    pipe.unet.load_state_dict({key: value * 0.9 for key, value in pipe.unet.state_dict().items()})


def offload(pipe) -> None:
    """The hooks of accelerate's offloading, which wrap `forward`, on the UNet, some of its blocks and their layers."""
    for module in (pipe.unet, pipe.unet.conv_in, *pipe.unet.down_blocks, pipe.unet.up_blocks[-1],
                   pipe.unet.up_blocks[1].upsamplers[0]):
        accelerate_hooks.add_hook_to_module(module, accelerate_hooks.ModelHook())


OTHERS = {"lora": lora, "free_u": free_u, "other_weights": other_weights, "offload": offload}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("other", OTHERS)
def test_others_may_come_before_or_after_a_policy(other, policy):
    before, kwargs = small()
    OTHERS[other](before)
    plain = image(before, kwargs)
    untouched = traces(before.unet)
    with apply_policy(before, POLICIES[policy]) as handle:
        expected = image(before, kwargs)
        assert handle.stats()["reuse_calls"] > 0
    assert traces(before.unet) == untouched
    assert torch.equal(image(before, kwargs), plain)

    after, kwargs = small()
    assert torch.equal(image(after, kwargs), plain) == (other == "offload")  # which changes no image
    with apply_policy(after, POLICIES[policy]):
        image(after, kwargs)
        OTHERS[other](after)
        assert torch.equal(image(after, kwargs), expected)
        assert not torch.equal(expected, plain)
    assert torch.equal(image(after, kwargs), plain)
    assert not hasattr(after.unet, "_step_cache")


def offload_again(pipe) -> None:
    """What diffusers' model offloading does when an image is done."""
    pipe.remove_all_hooks()
    offload(pipe)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("first", ["offload", "policy"])
def test_offloading_takes_its_hooks_off_and_on_at_every_image(first, policy):
    pipe, kwargs = small()
    plain, untouched = image(pipe, kwargs), traces(pipe.unet)
    with apply_policy(pipe, POLICIES[policy]):
        expected = image(pipe, kwargs)
    if first == "offload":
        offload(pipe)
    handle = apply_policy(pipe, POLICIES[policy])
    for _ in range(2):
        offload_again(pipe)
        assert torch.equal(image(pipe, kwargs), expected)
    handle.disable()
    assert sum(hasattr(module, "_hf_hook") for module in pipe.unet.modules()) == 7
    assert torch.equal(image(pipe, kwargs), plain)
    pipe.remove_all_hooks()
    for module in pipe.unet.modules():
        if own := vars(module).pop("forward", None):  # accelerate puts the class's on the module
            assert own.__func__ is type(module).forward
    assert traces(pipe.unet) == untouched


@pytest.mark.parametrize("first", ["offload", "policy"])
def test_model_offloading(first):
    pipe, kwargs = small()
    handles = []
    steps = [lambda: pipe.enable_model_cpu_offload(device="cpu"),
             lambda: handles.append(apply_policy(pipe, Clockwork(2)))]
    for step in steps if first == "offload" else reversed(steps):
        step()
    made = image(pipe, kwargs), image(pipe, kwargs)
    assert torch.equal(*made)
    assert handles[0].stats()["reuse_calls"] == 6
    handles[0].disable()
    fresh, _ = small()
    assert torch.equal(image(pipe, kwargs), image(fresh, kwargs))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("policy", POLICIES)
def test_half_precision(policy, dtype):
    def half(pipe, kwargs):
        pipe.to(dtype=dtype)
        return {key: value.to(dtype) if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}

    pipe, kwargs = small()
    with apply_policy(pipe, POLICIES[policy]):
        single = image(pipe, kwargs)
        kwargs = half(pipe, kwargs)
        expected = image(pipe, kwargs)
        assert expected.dtype == dtype
        assert torch.equal(image(pipe, kwargs), expected)
        assert close(expected.float(), single, 0.1)
    plain = image(pipe, kwargs)
    with apply_policy(pipe, Clockwork(1)):
        assert torch.equal(image(pipe, kwargs), plain)
    with apply_policy(pipe, POLICIES[policy]):
        assert torch.equal(image(pipe, kwargs), expected)


def test_one_settings_object_serves_several_pipelines():
    pipes, policy = [small() for _ in range(2)], Clockwork(2, adaptor="extrapolation")
    handles = [apply_policy(pipe, policy) for pipe, _ in pipes]
    first, second = (image(*each) for each in pipes)
    assert torch.equal(first, second)
    handles[0].disable()
    assert torch.equal(image(*pipes[1]), first)


def test_disable_may_be_called_twice():
    pipe, kwargs = small()
    untouched = traces(pipe.unet)
    handle = apply_policy(pipe, Clockwork(2))
    image(pipe, kwargs)
    handle.disable()
    with apply_policy(pipe, EncoderPropagation("every:2")) as other:
        handle.disable()  # takes off nothing of the other
        image(pipe, kwargs)
        assert other.stats()["reuse_calls"] == 3
    assert traces(pipe.unet) == untouched


def pickled(value) -> Any:
    """`value` written and read again by torch.save."""
    file = io.BytesIO()
    torch.save(value, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("again", [copy.deepcopy, pickled])
@pytest.mark.parametrize("policy", POLICIES)
def test_a_network_is_copied_without_its_policy(policy, again):
    """A copy of the hooks would run the original's weights."""
    pipe, kwargs = controlnet()
    kwargs["num_inference_steps"] = 2
    plain = image(pipe, kwargs)
    with apply_policy(pipe, POLICIES[policy]):
        expected = image(pipe, kwargs)
        under_policy = [pipe.unet, pipe.unet.mid_block, *([pipe.controlnet] if policy == "parallel" else [])]
        for module in under_policy:
            in_one_line(lambda module=module: again(module), r"cannot be copied or pickled; disable\(\) the policy")
        again(pipe.unet.state_dict())
        assert torch.equal(image(pipe, kwargs), expected)
    pipe.unet, pipe.controlnet = again(pipe.unet), again(pipe.controlnet)
    assert torch.equal(image(pipe, kwargs), plain)


def test_an_adaptor_that_is_handed_over_stays_as_it_is():
    """Policies cast copies of their own, so that it may train on, and serve pipelines of several precisions."""
    torch.manual_seed(1)
    adaptor = resnet()
    for parameter in adaptor.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    before = {name: each.clone() for name, each in adaptor.state_dict().items()}
    (first, kwargs), (second, _) = small(), small()
    second.to(dtype=torch.bfloat16)
    half = {key: each.bfloat16() if isinstance(each, torch.Tensor) else each for key, each in kwargs.items()}
    with apply_policy(first, Clockwork(2, adaptor=adaptor)), apply_policy(second, Clockwork(2, adaptor=adaptor)):
        expected = image(first, kwargs)
        assert close(image(second, half).float(), expected, 0.1)
        assert torch.equal(image(first, kwargs), expected)
    assert adaptor.training
    assert all(torch.equal(each, before[name]) for name, each in adaptor.state_dict().items())

    # one that is stored in 8 bits between its layers' calls computes in more
    third, _ = small()
    third.unet.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
    with apply_policy(third, Clockwork(2, adaptor=adaptor)) as handle:
        assert close(image(third, kwargs), expected, 0.3)
        assert next(handle.cache.deep.adaptor.parameters()).dtype == torch.float32


def test_features_are_freed_when_an_image_is_done():
    for policy in (*POLICIES.values(), Clockwork(2, cut="before")):
        pipe, kwargs = small()
        with apply_policy(pipe, policy) as handle:
            image(pipe, kwargs)
            assert not handle.cache.branches
            assert not any(hook.memory is not None or hook.fresh is not None for hook in handle.cache.site_hooks)
            deep = handle.cache.deep
            assert (deep is not None and deep.capture is not None) == (getattr(policy, "cut", None) == "before")
            assert deep is None or deep.capture is None or deep.capture.seen is None


def test_the_upsamplers_input_is_let_go_at_once():
    """What `cut="before"` notes of a full call does not outlive it, and a call that broke off leaves it to `reset`."""
    pipe, kwargs = small()

    def broken(module, args):
        raise RuntimeError("broken")

    with apply_policy(pipe, Clockwork(2, cut="before")) as handle:
        capture, held = handle.cache.deep.capture, []

        def look(*_):
            held.append(capture.seen)
            return {}

        image(pipe, kwargs, callback_on_step_end=look)
        assert held == [None] * 6
        upsampler = handle.cache.deep.upsamplers[0]
        with (upsampler.conv.register_forward_pre_hook(broken), pytest.raises(RuntimeError, match="broken")):
            image(pipe, kwargs)
        assert capture.seen is not None
        handle.cache.reset()
        assert capture.seen is None


# Refusals

HERE = {"c_in": 16, "c_out": 32, "temb_dim": 64}  # of `small_unet` at depth 1


def resnet(**sizes) -> torch.nn.Module:
    return make_adaptor("resnet", **HERE | sizes, width=16)


def in_one_line(make, words: str):
    with pytest.raises(UserError, match=words) as caught:
        make()
    assert "\n" not in str(caught.value)


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
    for policy in POLICIES.values():
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

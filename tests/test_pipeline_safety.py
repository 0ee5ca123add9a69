"""Caching policies beside what else users put on a pipeline."""

import copy
import io
from typing import Any

import pytest
import torch
from accelerate import hooks as accelerate_hooks
from peft import LoraConfig
from small_pipeline import close, image, in_one_line, resnet, small, traces
from tiny_pipelines import controlnet

from libs.pipelines import Clockwork, EncoderPropagation, apply_policy

POLICIES = {
    "clockwork": Clockwork(2),
    "extrapolation": Clockwork(2, depth=2, adaptor="extrapolation", cut="before"),
    "parallel": EncoderPropagation("every:3", parallel=True, prior_noise=0.003),
}


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

"""Caching policies on tiny diffusers pipelines of every kind: off is never-on, and no image sees another's features."""

import functools

import pytest
import torch
from small_pipeline import close, image
from tiny_pipelines import IN_MEMORY

from libs.pipelines import Clockwork, EncoderPropagation, apply_policy

POLICIES = {
    "clockwork": Clockwork(2),
    "parallel": EncoderPropagation("every:2", parallel=True, prior_noise=0.003),
}
PLAIN = {"clock 1": Clockwork(1), "all keys": EncoderPropagation("every:1"),
         "all keys, parallel": EncoderPropagation("every:1", parallel=True)}


class Interrupted(Exception):
    pass


def make(kind: str):
    """A pipeline that takes three steps, image to image two or three."""
    pipe, kwargs = IN_MEMORY[kind]()
    return pipe, kwargs | {"num_inference_steps": 3}


@functools.cache
def shared(kind: str):
    """A pipeline with its plain image, for tests that leave it as it was."""
    pipe, kwargs = make(kind)
    return pipe, kwargs, image(pipe, kwargs)


def traces(pipe) -> list[dict]:
    """Everything that stands on the modules and the scheduler themselves, by identity."""
    objects = [pipe.scheduler, *(m for part in pipe.components.values() if isinstance(part, torch.nn.Module)
                                 for m in part.modules())]
    return [{name: id(value) for name, value in vars(each).items()
             if each is not pipe.scheduler or name == "step"} for each in objects]


def interrupt(pipe, kwargs: dict, monkeypatch) -> None:
    """Break an image off in its second step."""
    inner, calls = pipe.scheduler.step, []

    def step(*args, **kwargs):
        calls.append(None)
        if len(calls) == 2:
            raise Interrupted
        return inner(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(pipe.scheduler, "step", functools.wraps(inner)(step))
        with pytest.raises(Interrupted):
            image(pipe, kwargs, seed=5)


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", IN_MEMORY)
def test_off_is_never_on_and_images_do_not_see_each_other(kind, policy, monkeypatch):
    pipe, kwargs, plain = shared(kind)
    before, keys = traces(pipe), list(pipe.unet.state_dict())
    handle = apply_policy(pipe, POLICIES[policy])
    assert list(pipe.unet.state_dict()) == keys
    first = image(pipe, kwargs, seed=0)
    assert not torch.equal(first, plain)  # it does reuse
    second = image(pipe, kwargs, seed=1)
    interrupt(pipe, kwargs, monkeypatch)
    assert torch.equal(image(pipe, kwargs, seed=0), first)
    interrupt(pipe, kwargs, monkeypatch)
    assert handle.stats()["loops"] == 5
    assert handle.stats()["reuse_calls"] >= 5
    handle.disable()
    assert traces(pipe) == before
    assert torch.equal(image(pipe, kwargs), plain)

    fresh, kwargs = make(kind)
    with apply_policy(fresh, POLICIES[policy]):
        assert torch.equal(image(fresh, kwargs, seed=1), second)


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_clock_1_and_all_keys_are_the_plain_pipeline(kind):
    pipe, kwargs, plain = shared(kind)
    for policy in PLAIN.values():
        with apply_policy(pipe, policy) as handle:
            assert torch.equal(image(pipe, kwargs), plain)
            assert handle.stats()["reuse_calls"] == 0 < handle.stats()["full_calls"]


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_parallel_is_sequential(kind):
    pipe, kwargs, plain = shared(kind)
    made, stats = {}, {}
    for parallel in (False, True):
        with apply_policy(pipe, EncoderPropagation("every:4", parallel=parallel)) as handle:
            made[parallel] = image(pipe, kwargs)
            stats[parallel] = handle.stats()
    assert close(made[True], made[False])
    assert not close(made[True], plain)
    ahead = stats[False]["reuse_calls"]
    assert ahead == (1 if kwargs.get("strength") == 0.8 else 2)
    assert [stats[True][each] for each in ("reuse_calls", "decoded_steps", "decoder_batches")] == [ahead, ahead, 1]


@pytest.mark.parametrize("kind", IN_MEMORY)
def test_the_same_input_again_gives_the_same_output(kind):
    """Reused features are those of the full step, also where FreeU and adapters change tensors in place."""
    pipe, kwargs = make(kind)
    seen = []

    def see(module, args, kwargs):
        own = {name: list(value) if isinstance(value, list) else value for name, value in kwargs.items()}
        seen.append((args, own))

    with pipe.unet.register_forward_pre_hook(see, with_kwargs=True):
        image(pipe, kwargs)
    (x, t, *args), given = seen[0]
    if residuals := given.get("down_intrablock_additional_residuals"):
        given["down_intrablock_additional_residuals"] = [*residuals, torch.ones(1, 64, 1, 1)]  # the middle's, as XL's
    if kind != "ddim_unconditional":  # whose UNet has none
        pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    deepest = len(pipe.unet.up_blocks) - 1
    for policy in (Clockwork(9), Clockwork(9, depth=deepest), EncoderPropagation("every:9"),
                   EncoderPropagation("every:9", parallel=True)):
        pipe.scheduler.timesteps = torch.full((3,), int(t))
        with torch.no_grad(), apply_policy(pipe, policy):
            full, *reused = [pipe.unet(x, now, *args, **given)[0] for now in pipe.scheduler.timesteps]
        for each in reused:
            assert close(each, full) if policy.parallel else torch.equal(each, full)

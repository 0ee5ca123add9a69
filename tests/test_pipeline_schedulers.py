"""Caching policies and prior noise under every scheduler that a Stable Diffusion pipeline takes."""

import copy
import inspect
import math
import pickle
from unittest import mock

import pytest
import torch
from absl import logging
from diffusers import (
    DDIMInverseScheduler,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    HeunDiscreteScheduler,
    KDPM2DiscreteScheduler,
    PNDMScheduler,
)
from small_pipeline import close, image, small, small_image_to_image, swap_scheduler

from libs.pipelines import Clockwork, EncoderPropagation, apply_policy

NEEDS = {"DPMSolverSDEScheduler": "torchsde"}  # scheduler -> the extra package that it needs
SCHEDULERS = {cls.__name__: cls for cls in DDIMScheduler().compatibles}
pytestmark = pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")


@pytest.mark.parametrize("name", sorted(SCHEDULERS))
def test_every_compatible_scheduler(name):
    if name in NEEDS:
        pytest.importorskip(NEEDS[name])
    pipe, kwargs = small(num_inference_steps=4)
    swap_scheduler(pipe, SCHEDULERS[name])
    plain = image(pipe, kwargs)
    assert plain.isfinite().all()
    calls = len(pipe.scheduler.timesteps)
    with apply_policy(pipe, Clockwork(1)):
        assert torch.equal(image(pipe, kwargs), plain)
    made = {}
    for key, policy in {"clockwork": Clockwork(2), "sequential": EncoderPropagation("every:3"),
                        "parallel": EncoderPropagation("every:3", parallel=True)}.items():
        with apply_policy(pipe, policy) as handle:
            made[key] = image(pipe, kwargs)
            assert torch.equal(image(pipe, kwargs), made[key])
            assert not torch.equal(made[key], plain)
            stats = handle.stats()
            keys = range(0, calls, 2 if key == "clockwork" else 3)
            assert stats["loops"] == 2
            assert stats["full_calls"] == 2 * len(keys)
            assert stats["reuse_calls"] == 2 * (calls - len(keys))
    assert stats["decoder_batches"] == 2 * sum(step + 1 < calls for step in keys)
    assert close(made["parallel"], made["sequential"])


# Prior noise: z_t + alpha z_T where t < 500 of 1000

ALPHA = 0.01
KEYS = EncoderPropagation("every:1", prior_noise=ALPHA)  # the plain network, so that only the noise is seen


def guided(pipe, kwargs: dict, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
    both = pipe.scheduler.scale_model_input(torch.cat([x, x]), t)
    prompts = torch.cat([kwargs["negative_prompt_embeds"], kwargs["prompt_embeds"]])
    uncond, cond = pipe.unet(both, t, prompts, return_dict=False)[0].chunk(2)
    return uncond + kwargs["guidance_scale"] * (cond - uncond)


@torch.no_grad()
def by_hand(pipe, kwargs: dict) -> torch.Tensor:
    """The published loop, in front of the UNet's call; for DDIM, whose pure noise has variance 1 at every t."""
    pipe.scheduler.set_timesteps(kwargs["num_inference_steps"])
    x = z_T = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for t in pipe.scheduler.timesteps:
        if t / 1000 < 0.5:
            x = x + ALPHA * z_T
        x = pipe.scheduler.step(guided(pipe, kwargs, x, t), t, x).prev_sample
    return x


def states(pipe, kwargs: dict) -> list[torch.Tensor]:
    """The latents after every step."""
    seen = []

    def see(pipe, step, t, tensors):
        seen.append(tensors["latents"])
        return {}

    image(pipe, kwargs, callback_on_step_end=see)
    return seen


def test_prior_noise_is_the_published_loop():
    pipe, kwargs = small()
    expected = by_hand(pipe, kwargs)
    assert not close(expected, image(pipe, kwargs))
    with apply_policy(pipe, KEYS):
        assert torch.equal(image(pipe, kwargs), expected)
        assert torch.equal(image(pipe, kwargs), expected)
    assert torch.equal(by_hand(pipe, kwargs), expected)


def test_prior_noise_of_a_scheduler_in_sigmas_is_that_of_its_variance_preserving_equal():
    """Euler is DDIM in x / alpha: its states divided by sqrt(1 + sigma^2) must be DDIM's, with the noise in them."""
    pipe, kwargs = small()
    with apply_policy(pipe, KEYS):
        ddim = states(pipe, kwargs)
        swap_scheduler(pipe, EulerDiscreteScheduler, timestep_spacing="leading")
        euler = [x / math.sqrt(1 + sigma**2)
                 for x, sigma in zip(states(pipe, kwargs), pipe.scheduler.sigmas[1:], strict=True)]
    for a, b in zip(ddim[:-1], euler[:-1], strict=True):  # they differ in what they take for the last alpha
        assert close(a, b, 1e-4)


@pytest.mark.parametrize(("cls", "options"), [
    (DDIMScheduler, {}),
    (EulerDiscreteScheduler, {}),
    (DPMSolverMultistepScheduler, {}),
    (PNDMScheduler, {"skip_prk_steps": True}),
    (HeunDiscreteScheduler, {}),
    (KDPM2DiscreteScheduler, {}),
    (EDMEulerScheduler, {}),  # whose times, as those of the next two, are log(sigma) / 4
    (EDMDPMSolverMultistepScheduler, {}),
    (EulerDiscreteScheduler, {"timestep_type": "continuous", "prediction_type": "v_prediction"}),
])
def test_prior_noise_goes_where_it_belongs(cls, options):
    """On grid points below the limit, not on the last state, nor midway through a step of a second-order solver.

    Half of the steps where the times are not training's.
    """
    pipe, kwargs = small()
    swap_scheduler(pipe, cls, **options)
    scheduler, made = pipe.scheduler, []
    inner = scheduler.step

    def step(model_output, timestep, sample, **kwargs):
        if not made:
            made.append((0, sample / scheduler.sigmas[0].square().add(1).sqrt() if in_sigmas else sample))
        out = inner(model_output, timestep, sample, **kwargs)
        midway = not getattr(scheduler, "state_in_first_order", True)
        scale = math.sqrt(1 + scheduler.sigmas[scheduler.step_index] ** 2) if in_sigmas else 1
        made.append((out[0], 0 if midway else scale))
        return out

    in_sigmas = float(scheduler.init_noise_sigma) != 1
    scheduler.step = step  # beneath the policy's
    with apply_policy(pipe, KEYS):
        after = states(pipe, kwargs)
    assert scheduler.step is step
    (_, z_T), *made = made
    times = scheduler.timesteps.tolist()
    if times[0] < 2:
        times = [999 - 1000 * i / len(times) for i in range(len(times))]
    count = 0
    for x, (before, scale), t in zip(after, made, [*times[1:], None], strict=True):
        due = t is not None and t < 500 and scale > 0
        count += due
        assert torch.allclose(x - before, ALPHA * scale * z_T if due else torch.zeros(()), atol=1e-5 * max(1, scale))
    assert count >= 2


def test_image_to_image_from_the_middle_gets_no_prior_noise():
    pipe, kwargs = small_image_to_image(strength=0.8)
    plain = image(pipe, kwargs)
    with apply_policy(pipe, KEYS), mock.patch.object(logging, "warning") as warning:
        assert not torch.equal(image(pipe, kwargs, strength=1.0), plain)
        warning.assert_not_called()
        for _ in range(2):
            assert torch.equal(image(pipe, kwargs), plain)
        warning.assert_called_once()  # which says so
        assert "prior_noise=0.01: no noise is added" in warning.call_args.args[0] % warning.call_args.args[1:]


def test_inversion_gets_no_prior_noise():
    """Its loop goes upwards, from an image."""
    pipe, kwargs = small(guidance_scale=1.0)
    swap_scheduler(pipe, DDIMInverseScheduler)
    plain = image(pipe, kwargs)
    with apply_policy(pipe, KEYS):
        assert torch.equal(image(pipe, kwargs), plain)


def test_the_scheduler_is_its_own_again():
    pipe, kwargs = small()
    first, signature = pipe.scheduler, inspect.signature(pipe.scheduler.step)
    with apply_policy(pipe, EncoderPropagation("every:2")):
        assert "step" not in vars(first)  # no prior noise, nothing to do
    with apply_policy(pipe, KEYS):
        assert inspect.signature(first.step) == signature  # pipelines look for eta and generator in it
        swap_scheduler(pipe, EulerDiscreteScheduler)
        expected = image(pipe, kwargs)
        assert "step" not in vars(first)
        assert "step" in vars(pipe.scheduler)
    assert "step" not in vars(pipe.scheduler)
    assert not torch.equal(image(pipe, kwargs), expected)


@pytest.mark.parametrize("again", [copy.deepcopy, lambda scheduler: pickle.loads(pickle.dumps(scheduler))])
def test_a_copy_of_the_scheduler_is_plain(again, monkeypatch):
    pipe, kwargs = small()
    plain = image(pipe, kwargs)

    def refuse(*args):
        raise AssertionError("the pipeline was copied too")

    with apply_policy(pipe, KEYS):
        noisy = image(pipe, kwargs)
        with monkeypatch.context() as patch:
            patch.setattr(torch.nn.Parameter, "__deepcopy__", refuse)
            patch.setattr(torch.nn.Parameter, "__reduce_ex__", refuse)
            scheduler = again(pipe.scheduler)
        assert torch.equal(image(pipe, kwargs), noisy)
    own, pipe.scheduler = pipe.scheduler, scheduler
    assert torch.equal(image(pipe, kwargs), plain)
    assert own.step.__self__ is own
    assert scheduler.step.__self__ is scheduler


def test_wrappers_of_others_around_step_stay():
    pipe, kwargs = small()
    plain, calls = image(pipe, kwargs), []

    def wrapped(step):
        def wrapper(*args, eta=0.0, **kwargs):
            calls.append(None)
            return step(*args, **kwargs)

        return wrapper

    pipe.scheduler.step = before = wrapped(pipe.scheduler.step)
    handle = apply_policy(pipe, KEYS)
    pipe.scheduler.step = after = wrapped(pipe.scheduler.step)
    noisy = image(pipe, kwargs)
    assert not torch.equal(noisy, plain)
    handle.disable()
    assert pipe.scheduler.step is after
    assert torch.equal(image(pipe, kwargs), plain)
    assert len(calls) == 4 * kwargs["num_inference_steps"]
    pipe.scheduler.step = before
    with apply_policy(pipe, KEYS):
        assert torch.equal(image(pipe, kwargs), noisy)
    assert pipe.scheduler.step is before

"""Caching policies in one denoising loop after another: other settings, broken and own loops."""

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionImg2ImgPipeline
from small_pipeline import close, image, small, small_image_to_image, small_unet, swap_scheduler
from tiny_pipelines import CROSS, TOKENS, sdxl

from libs.pipelines import Clockwork, EncoderPropagation, apply_policy

POLICIES = {
    "clockwork": Clockwork(3),
    "sequential": EncoderPropagation("every:3"),
    "parallel": EncoderPropagation("every:3", parallel=True, prior_noise=0.003),
}


# From one image to the next, with the same pipeline

CHANGES = {
    "text": (small, [{}, {"num_inference_steps": 4}, {"guidance_scale": 1.0}, {"num_images_per_prompt": 2}]),
    "image": (small_image_to_image, [{"strength": 0.9}, {"strength": 0.5}, {"strength": 1.0}]),
}


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("kind", CHANGES)
def test_other_settings_are_as_good_as_a_fresh_pipeline(kind, policy):
    make, changes = CHANGES[kind]
    expected = []
    for change in changes:
        fresh, kwargs = make()
        with apply_policy(fresh, POLICIES[policy]):
            expected.append(image(fresh, kwargs, **change))
    pipe, kwargs = make()
    with apply_policy(pipe, POLICIES[policy]):
        for i in (*range(len(changes)), 1, 0):
            assert torch.equal(image(pipe, kwargs, **changes[i]), expected[i]), changes[i]


@pytest.mark.parametrize("policy", POLICIES)
def test_swapped_schedulers_are_followed(policy):
    pipe, kwargs = small()
    with apply_policy(pipe, POLICIES[policy]):
        for cls in (DDIMScheduler, EulerDiscreteScheduler, DDIMScheduler):
            fresh, _ = small()
            swap_scheduler(pipe, cls)
            swap_scheduler(fresh, cls)
            with apply_policy(fresh, POLICIES[policy]):
                assert torch.equal(image(pipe, kwargs), image(fresh, kwargs))


@pytest.mark.parametrize(("policy", "stop"), [("clockwork", 0), ("clockwork", 2), ("sequential", 0), ("parallel", 2)])
def test_two_pipelines_around_one_unet_do_not_share_features(policy, stop):
    """Each has a scheduler of its own; the policy was put on the first, whose image breaks off after step `stop`."""
    def second(first, kwargs):
        own = {**first.components, "scheduler": DDIMScheduler.from_config(first.scheduler.config)}
        pipe = StableDiffusionImg2ImgPipeline(**own, requires_safety_checker=False)
        pipe.set_progress_bar_config(disable=True)
        picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(3))
        kwargs = {key: value for key, value in kwargs.items() if key not in ("height", "width")}
        return image(pipe, kwargs, image=picture, strength=0.7)

    def break_off(pipe, step, t, tensors):
        if step == stop:
            raise KeyboardInterrupt
        return tensors

    pipe, kwargs = small()
    with apply_policy(pipe, POLICIES[policy]):
        with pytest.raises(KeyboardInterrupt):
            image(pipe, kwargs, callback_on_step_end=break_off)
        after = second(pipe, kwargs)
    fresh, _ = small()
    with apply_policy(fresh, POLICIES[policy]):
        assert torch.equal(after, second(fresh, kwargs))


def test_a_loop_that_stops_for_a_refiner():
    """SDXL's `denoising_end`: the loop's last step is the pipeline's, not that of its scheduler's list."""
    pipe, kwargs = sdxl()
    clockwork = Clockwork(9, protect_last=1)
    parallel = EncoderPropagation("every:9", parallel=True)
    for end, steps in ((0.6, 3), (None, 6), (0.6, 3)):
        with apply_policy(pipe, clockwork) as handle:
            image(pipe, kwargs, num_inference_steps=6, denoising_end=end)
            assert pipe.num_timesteps == steps
            assert (handle.stats()["full_calls"], handle.stats()["reuse_calls"]) == (2, steps - 2)
        with apply_policy(pipe, parallel) as handle:
            image(pipe, kwargs, num_inference_steps=6, denoising_end=end)
            assert (handle.stats()["decoded_steps"], handle.stats()["reuse_calls"]) == (steps - 1, steps - 1)


# In other processes

MAKE = """
import os
import sys
import torch
torch.set_num_threads(1)
from test_pipeline_loops import made
for seed, path in enumerate(sys.argv[1:]):
    child = os.fork()  # from a process that has run nothing
    if not child:
        torch.save(made([seed]), path)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def made(seeds: list[int]) -> list[list[torch.Tensor]]:
    """The images of some seeds in a row, by each policy."""
    images = []
    for policy in POLICIES.values():
        pipe, kwargs = small()
        with apply_policy(pipe, policy):
            images.append([image(pipe, kwargs, seed) for seed in seeds])
    return images


def test_two_images_in_a_row_are_those_of_two_fresh_processes(tmp_path):
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
    files = [tmp_path / f"{seed}.pt" for seed in (0, 1)]
    subprocess.run([sys.executable, "-c", MAKE, *files], check=True,
                   env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)})
    alone = [torch.load(file) for file in files]
    for in_a_row, first, second in zip(made([0, 1]), *alone, strict=True):
        assert torch.equal(in_a_row[0], *first)
        assert torch.equal(in_a_row[1], *second)
        assert not torch.equal(*in_a_row)


# Loops that users write themselves

FORMS = {
    "view": lambda t: t,
    "expanded": lambda t: t.expand(2),
    "copy": lambda t: t.clone(),
    "batch": lambda t: torch.stack([t, t]),
    "number": int,
}
EMBEDS = torch.randn(2, TOKENS, CROSS, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def own_loop(unet, scheduler, form: str = "view", seed: int = 0, stop: int | None = None, separate: bool = False):
    """Guided sampling over `scheduler.timesteps`, as somebody would write it; broken off after step `stop`."""
    x = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(seed)) * scheduler.init_noise_sigma
    for i, t in enumerate(scheduler.timesteps):
        both = scheduler.scale_model_input(torch.cat([x, x]), t)
        given = FORMS[form](t)
        if separate:
            cond, uncond = (unet(both[:1], given, EMBEDS[j:j + 1]).sample for j in (0, 1))
        else:
            cond, uncond = unet(both, given, EMBEDS).sample.chunk(2)
        x = scheduler.step(uncond + 7.5 * (cond - uncond), t, x).prev_sample
        if i == stop:
            break
    return x


def unet_and_scheduler(steps: int = 6):
    scheduler = DDIMScheduler(clip_sample=False)
    scheduler.set_timesteps(steps)
    return small_unet(), scheduler


@pytest.mark.parametrize("policy", POLICIES)
def test_guidance_in_separate_calls_keeps_its_branches_apart(policy):
    made = {}
    for separate in (False, True):
        unet, scheduler = unet_and_scheduler()
        with apply_policy(SimpleNamespace(unet=unet, scheduler=scheduler), POLICIES[policy]) as handle:
            made[separate] = own_loop(unet, scheduler, separate=separate)
            assert handle.stats()["reuse_calls"] == (8 if separate else 4)
    assert close(made[True], made[False])

    unet, scheduler = unet_and_scheduler()
    if policy != "parallel":  # which needs the scheduler
        cache = POLICIES[policy].attach(unet)
        assert torch.equal(own_loop(unet, scheduler, separate=True), made[True])
        assert cache.stats()["reuse_calls"] == 8


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("stop", [0, 1])
def test_a_loop_that_was_broken_off_leaves_nothing_behind(form, stop):
    """A bare policy on a UNet, the same list of timesteps again: all that it can go by is the calls."""
    unet, scheduler = unet_and_scheduler()
    plain = own_loop(unet, scheduler, form, seed=1)
    cache = Clockwork(2).attach(unet)
    first = own_loop(unet, scheduler, form, seed=1)
    assert not torch.equal(first, plain)
    own_loop(unet, scheduler, form, seed=0, stop=stop)
    again = own_loop(unet, scheduler, form, seed=1)
    assert torch.equal(again, plain if stop == 0 else first)  # at the same t again nobody can tell: all in full
    assert torch.equal(own_loop(unet, scheduler, form, seed=1), first)
    cache.disable()
    assert torch.equal(own_loop(unet, scheduler, form, seed=1), plain)


@pytest.mark.parametrize(("policy", "form"), [*((policy, "view") for policy in POLICIES),
                                              *(("clockwork", form) for form in FORMS if form != "view")])
def test_own_loop_with_a_scheduler(form, policy):
    made = []
    for stop in (None, 0, 2):
        unet, scheduler = unet_and_scheduler(4)
        with apply_policy(SimpleNamespace(unet=unet, scheduler=scheduler), POLICIES[policy]) as handle:
            if stop is not None:
                own_loop(unet, scheduler, form, seed=1, stop=stop)
            scheduler.set_timesteps(6)
            made.append(own_loop(unet, scheduler, form))
            assert handle.stats()["reuse_calls"] >= 4
    assert all(torch.equal(each, made[0]) for each in made)


def test_reset_begins_a_loop_anywhere():
    unet, scheduler = unet_and_scheduler()
    cache = Clockwork(2).attach(unet)
    first = own_loop(unet, scheduler)
    own_loop(unet, scheduler, seed=1, stop=0)
    cache.reset()
    assert torch.equal(own_loop(unet, scheduler), first)

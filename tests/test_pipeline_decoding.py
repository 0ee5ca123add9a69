"""Encoder propagation that decodes the steps between two key steps in one batch, and what a callback may change."""

import itertools
from unittest import mock

import pytest
import torch
from absl import logging
from peft import LoraConfig
from small_pipeline import close, image, small
from tiny_pipelines import controlnet

from libs.errors import UserError
from libs.pipelines import EncoderPropagation, apply_policy

SHOWN = {"callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"]}
PARALLEL = EncoderPropagation("every:6", parallel=True)  # one key step, five steps ahead


def pair(**kwargs) -> tuple[torch.Tensor, torch.Tensor, dict]:
    """One image decoded in parallel, the same one sequentially, and what ran in parallel."""
    pipe, defaults = small()
    with apply_policy(pipe, PARALLEL) as handle:
        parallel, stats = image(pipe, defaults, **kwargs), handle.stats()
    with apply_policy(pipe, EncoderPropagation("every:6")):
        return parallel, image(pipe, defaults, **kwargs), stats


@pytest.mark.parametrize(("window", "batches"), [(1, 5), (2, 3), (5, 1), (64, 1)])
def test_windows_bound_the_rows_of_a_decoder_batch(window, batches):
    pipe, kwargs = small()
    rows = []
    with apply_policy(pipe, EncoderPropagation("every:6")):
        sequential = image(pipe, kwargs)
    with (
        pipe.unet.conv_out.register_forward_pre_hook(lambda module, args: rows.append(len(args[0]))),
        apply_policy(pipe, EncoderPropagation("every:6", parallel=True, max_parallel=window)) as handle,
    ):
        assert close(image(pipe, kwargs), sequential)
    assert handle.stats()["decoder_batches"] == batches == len(rows) - 1
    assert max(rows[1:]) == 2 * min(window, 5)


def test_parallel_with_several_images_and_without_guidance():
    for kwargs in ({"num_images_per_prompt": 2}, {"guidance_scale": 1.0},
                   {"guidance_scale": 1.0, "num_images_per_prompt": 3}):
        parallel, sequential, stats = pair(**kwargs)
        assert close(parallel, sequential)
        assert (stats["full_calls"], stats["decoder_batches"]) == (1, 1)


def test_a_window_that_does_not_fit_in_memory_shrinks():
    pipe, kwargs = small()
    with apply_policy(pipe, EncoderPropagation("every:6")):
        sequential = image(pipe, kwargs)

    def limited(module, args):
        if len(args[0]) > 3:  # two rows a step
            raise torch.OutOfMemoryError("too many rows")

    with pipe.unet.conv_out.register_forward_pre_hook(limited), apply_policy(pipe, PARALLEL) as handle:
        with mock.patch.object(logging, "warning") as warning:
            assert close(image(pipe, kwargs), sequential)
            assert handle.stats()["decoder_batches"] == 5
            assert close(image(pipe, kwargs), sequential)
        said = [call.args[0] % call.args[1:] for call in warning.call_args_list]
        assert [text.partition("going on with ")[2] for text in said] == ["max_parallel=2", "max_parallel=1"]


def test_another_error_in_a_decoder_batch_is_raised():
    pipe, kwargs = small()

    def broken(module, args):
        if len(args[0]) > 2:
            raise RuntimeError("something else")

    with apply_policy(pipe, PARALLEL) as handle:
        expected = image(pipe, kwargs)
        with pipe.unet.conv_out.register_forward_pre_hook(broken), pytest.raises(RuntimeError, match="something else"):
            image(pipe, kwargs, seed=1)
        assert torch.equal(image(pipe, kwargs), expected)
        assert handle.cache.decoding.window == PARALLEL.max_parallel


def test_prompts_that_a_callback_changes_drop_the_outputs_made_ahead():
    def change(pipe, step, t, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if step == 2 else {}

    parallel, sequential, stats = pair(callback_on_step_end=change, **SHOWN)
    assert close(parallel, sequential)
    assert not close(sequential, pair()[1])
    assert (stats["reuse_calls"], stats["decoded_steps"]) == (5, 5)  # of which three for the old prompt, not asked for


def test_the_scale_of_a_lora_that_a_callback_changes_drops_the_outputs_made_ahead():
    def change(pipe, step, t, tensors):
        if step == 2:
            pipe.cross_attention_kwargs["scale"] = 0.0
        return {}

    def made(policy, **kwargs):
        pipe, defaults = small(cross_attention_kwargs={"scale": 1.0})
        torch.manual_seed(1)
        pipe.unet.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_v"], init_lora_weights=False))
        with apply_policy(pipe, policy):
            return image(pipe, defaults, **kwargs)

    sequential = made(EncoderPropagation("every:6"), callback_on_step_end=change)
    assert close(made(PARALLEL, callback_on_step_end=change), sequential)
    assert not close(made(PARALLEL), sequential)


def test_guidance_that_a_callback_cuts_off_starts_afresh():
    def cut(pipe, step, t, tensors):
        if step != 2:
            return {}
        pipe._guidance_scale = 1.0
        return {"prompt_embeds": tensors["prompt_embeds"].chunk(2)[1]}

    parallel, sequential, stats = pair(callback_on_step_end=cut, **SHOWN)
    assert close(parallel, sequential)
    assert stats["full_calls"] == 2  # features of two rows are of no use to one


def test_tensors_that_cannot_be_batched_are_refused():
    pipe, kwargs = small(cross_attention_kwargs={"scale": torch.tensor(1.0)})
    with apply_policy(pipe, PARALLEL), pytest.raises(UserError, match=r"parallel=True: cross_attention_kwargs.*scale"):
        image(pipe, kwargs)
    with apply_policy(pipe, EncoderPropagation("every:6")):
        image(pipe, kwargs)


@pytest.mark.parametrize("parallel", [False, True])
def test_a_controlnet_outside_its_guidance_interval_is_not_replayed(parallel):
    pipe, kwargs = controlnet()
    steering = []

    def see(module, args, kwargs):
        steering.append(bool(kwargs["mid_block_additional_residual"].any()))

    with (
        apply_policy(pipe, EncoderPropagation("every:4", parallel=parallel)) as handle,
        pipe.unet.register_forward_pre_hook(see, with_kwargs=True),
    ):
        image(pipe, kwargs, num_inference_steps=4, control_guidance_end=0.5)
        assert steering == [True, True, False, False]
        assert handle.stats()["control_calls"] == 2


@pytest.mark.parametrize("steered_by", ["image", "prompt_embeds"])
def test_what_steers_a_controlnet_may_be_changed_by_a_callback(steered_by):
    """The ControlNet then runs once more, and what was decoded with its old residuals goes."""
    def change(pipe, step, t, tensors):
        return {steered_by: 1 - tensors[steered_by]} if step == 1 else {}

    changed = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": [steered_by]}
    pipe, kwargs = controlnet()
    made, residuals = {}, []

    def see(module, args, kwargs):
        residuals.append(kwargs["mid_block_additional_residual"])

    for parallel in (False, True):
        with apply_policy(pipe, EncoderPropagation("every:6", parallel=parallel)) as handle:
            made[parallel] = image(pipe, kwargs, **changed)
            assert handle.stats()["control_calls"] == 2
    assert close(made[True], made[False])
    with apply_policy(pipe, EncoderPropagation("every:6")), pipe.unet.register_forward_pre_hook(see, with_kwargs=True):
        image(pipe, kwargs, **changed)
    same = [torch.equal(*each) for each in itertools.pairwise(residuals)]
    assert same == [True, False, True, True, True]


def test_a_controlnet_that_guesses_is_replayed_too():
    """Its pipeline hands it a new view of the same prompt at every step."""
    pipe, kwargs = controlnet()
    with apply_policy(pipe, EncoderPropagation("every:6", parallel=True)) as handle:
        image(pipe, kwargs, guess_mode=True)
        assert handle.stats()["control_calls"] == 1

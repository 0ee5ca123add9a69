"""Caching policies under torch.compile: how many graphs, and that a compiled network obeys them."""

import pytest
import torch
from small_pipeline import close, image, small, small_unet
from torch._dynamo.utils import counters

from libs.pipelines import Clockwork, EncoderPropagation, apply_policy

STEPS = 50


pytestmark = pytest.mark.usefixtures("fresh_compiler")


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def in_place(pipe) -> None:
    pipe.unet.compile(backend="eager")


def wrapped(pipe) -> None:
    pipe.unet = torch.compile(pipe.unet, backend="eager")


@pytest.mark.parametrize(("policy", "expected", "compiled", "first"), [
    (Clockwork(4, adaptor="extrapolation"), 2, in_place, True),
    (Clockwork(4, cut="before"), 2, wrapped, False),
    (EncoderPropagation("every:4"), 2, wrapped, False),
    (EncoderPropagation("every:4", parallel=True, max_parallel=2), 3, wrapped, True),  # windows of two steps and of one
    (EncoderPropagation("paper", parallel=True, max_parallel=4), 3, in_place, False),  # windows of one to four steps
    (EncoderPropagation("paper", parallel=True), 4, in_place, False),  # of one, four, nine and fourteen
])
def test_graphs(policy, expected, compiled, first):
    """One graph for full calls and one for those that reuse, whether compiled before or after, also in a second image.

    Beside them there is one break in the calls' way: the policy itself.
    """
    pipe, kwargs = small(num_inference_steps=STEPS)
    pipe.register_modules(unet=small_unet(levels=2))
    with apply_policy(pipe, policy):
        eager = [image(pipe, kwargs, seed) for seed in (0, 1)]
    if first:
        compiled(pipe)
        plain = image(pipe, kwargs)
    before = graphs()
    assert before == int(first)
    with apply_policy(pipe, policy) as handle:
        if not first:
            compiled(pipe)
        made = [image(pipe, kwargs, seed) for seed in (0, 1)]
        keys = sum(policy.is_full(i, STEPS) for i in range(STEPS))
        assert keys == (9 if getattr(policy, "key_steps", "") == "paper" else 13)
        assert handle.stats()["full_calls"] == 2 * keys
        assert handle.stats()["reuse_calls"] == 2 * (STEPS - keys)
    assert graphs() - before == expected
    assert sum(counters["graph_break"].values()) == 1
    for a, b in zip(made, eager, strict=True):
        assert close(a, b)
    if first:
        assert not close(made[0], plain)
        assert close(image(pipe, kwargs), plain)

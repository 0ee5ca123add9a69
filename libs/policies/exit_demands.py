"""How certain early exit wants to be in each call of the network: more where an error would move the image farther."""

from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..samplers import state_times


def call_weights(chain: Any) -> Tensor:
    """(calls,) float64, at most 1: how far an error of the network's output moves the image in the step of each call
    of the chain, as a share of the farthest; see `Denoiser.moved`.

    No call counts less than one before it: later calls correct what earlier ones did wrong, and nothing corrects the
    last ones, whose steps may be short. Calls inside a step of a singlestep solver count by the way that is left of it.
    """
    schedule, times = chain.denoiser.schedule, chain.times
    if chain.denoiser.prediction == "both":
        raise UserError("policy.by_step: denoiser.prediction='both' has two outputs, which move an image differently")
    states = torch.cat([state_times(chain.sampler, chain.ts, schedule), times.new_zeros(1)])
    ends = states[(states[:-1] >= times[:, None]).sum(1)]  # the first state after each call
    moved = chain.denoiser.moved(times, ends).cummax(0).values
    return moved / moved[-1]


def call_thresholds(threshold: float, weights: Tensor) -> Tensor:
    """(calls,) certainties c that a row must exceed: (1 - c) weight < 1 - threshold. Below 0 none is asked for.

    >>> call_thresholds(0.95, torch.tensor([1.0, 0.5, 0.1, 0.01]))
    tensor([ 0.9500,  0.9000,  0.5000, -4.0000])
    """
    return 1 - (1 - threshold) / weights

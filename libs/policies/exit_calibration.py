"""Thresholds and schedules found by sampling: exit layers on images that no user asks for."""

import copy
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from absl import logging
from torch import Tensor

from ..errors import UserError
from .full import Full

FIRST_SEED = 2**62  # far from users' seeds, so that nothing is tuned on the images it is measured on
NEAR_ZERO = sys.float_info.min  # a threshold that every certainty exceeds
TOLERANCE = 0.01  # of a layer ratio
REFUSED = 0.05  # distance from the ratio asked for at which there is no use in going on
ITERATIONS = 12


def calibration_exits(chain: Any, policy: Full, count: int) -> Tensor:
    """Exit layers (calls, rows) int64 of `count` images by `policy`, in the place of the chain's own.

    Guidance and sampler are the chain's, labels come in turn. Nothing of it shows in the chain's policy.
    """
    denoiser = copy.copy(chain.denoiser)
    denoiser.net = policy
    chain, exits = replace(chain, policy=policy, denoiser=denoiser), []
    policy.prepare(chain)
    for start in range(0, count, chain.rows):
        group = range(start, min(start + chain.rows, count))
        labels = [i % chain.num_classes for i in group] if chain.num_classes else None
        chain.sample([FIRST_SEED + i for i in group], labels)
        exits.append(policy.exits)
    return torch.cat(exits, dim=1)


def find_threshold(ratio_at: Callable[[float], float], target: float) -> tuple[float, float]:
    """(threshold, the layer ratio there): `target` by bisection, where `ratio_at(threshold)` does not fall.

    Ends within 0.01 of the target, or else after 12 steps at the nearest there is, with a warning. Raises UserError
    where that is farther than 0.05, with the ratios that can be.
    """
    def miss(threshold: float) -> float:
        return abs(ratios[threshold] - target)

    ratios, low, high, best = {1.0: 1.0}, 0.0, 1.0, 1.0
    if miss(1.0) > TOLERANCE:
        ratios[NEAR_ZERO] = lowest = ratio_at(NEAR_ZERO)
        if target < lowest - TOLERANCE:
            raise UserError(f"policy.target_layer_ratio={target}: no threshold reaches it; it can be from {lowest:.3f} "
                            "(threshold near 0) to 1 (threshold 1)")
    while miss(best := min(ratios, key=miss)) > TOLERANCE and len(ratios) < 2 + ITERATIONS:
        threshold = (low + high) / 2
        ratios[threshold] = ratio = ratio_at(threshold)
        logging.info("early exit: threshold %.5f gives a layer ratio of %.3f", threshold, ratio)
        low, high = (threshold, high) if ratio < target else (low, threshold)
    if miss(best) > REFUSED:
        below = max(ratio for ratio in ratios.values() if ratio < target)
        above = min(ratio for ratio in ratios.values() if ratio > target)
        raise UserError(f"policy.target_layer_ratio={target}: no threshold reaches it; the nearest that can be are "
                        f"{below:.3f} and {above:.3f}, between {lowest:.3f} (threshold near 0) and 1 (threshold 1)")
    if miss(best) > TOLERANCE:
        logging.warning("policy.target_layer_ratio=%g: the nearest that a threshold reaches is %.3f", target,
                        ratios[best])
    return best, ratios[best]


def depth_quantiles(exits: Tensor, quantile: float) -> tuple[int, ...]:
    """The depth of each call: the `quantile` of its exit layers (calls, rows), rounded up to one that occurred."""
    return tuple(torch.quantile(exits.double(), quantile, dim=1, interpolation="higher").int().tolist())

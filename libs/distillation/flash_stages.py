"""The stages of Flash Diffusion (2406.02347): where the student starts, what it learns from, how its teacher is guided.

A stage starts the student at step i of its teacher's grid of K steps, at or near one of the modes t = 1, ..., 1 / M:
the times of students of M steps. Fields of the `distill` section hold a value for each stage, or one for all; commas
part them, or semicolons where a value is a list itself.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError, choose


@dataclass(frozen=True)
class Stage:
    """A part of the training.

    updates              of the optimizer
    steps                K of the teacher's grid
    start_probabilities  pi_s(i), i = 0 ... K - 1 from noise to data: (K,) float64
    distil, dmd, adversarial   scales of the three losses
    guidance             lowest and highest scale w of the teacher, drawn uniformly; 1, 1 is none
    """

    updates: int
    steps: int
    start_probabilities: Tensor
    distil: float
    dmd: float
    adversarial: float
    guidance: tuple[float, float]


def start_probabilities(steps: int, weights: Sequence[float], spread: float) -> Tensor:
    """pi_s(i) ~ sum_m p_m exp(-(i - m K / M)^2 / spread), m = 0 ... M - 1: (K,) float64 that sum to 1.

    weights: p_m of the M modes t = 1, ..., 1 / M.
    """
    p = torch.tensor(weights, dtype=torch.float64)
    centres = torch.arange(len(p)) * (steps / len(p))
    density = torch.exp(-(torch.arange(steps)[:, None].double() - centres) ** 2 / spread) @ p
    return density / density.sum()


def stage_at(stages: Sequence[Stage], step: int) -> tuple[int, Stage]:
    """(its number from 0, the stage) of the update after `step` others; the last stage goes on."""
    for number, stage in enumerate(stages):
        if step < stage.updates:
            return number, stage
        step -= stage.updates
    return len(stages) - 1, stages[-1]


def read_stages(section: Mapping[str, Any]) -> list[Stage]:
    """The stages of a `distill` section: as many as its `stage_updates`. Raises UserError for what makes none."""
    uniform = choose("--config.distill.start", section["start"], ("modes", "uniform")) == "uniform"
    count = len(str(section["stage_updates"]).split(","))
    updates = _whole(section, "stage_updates", count)
    steps = _whole(section, "teacher_steps", count)
    scales = [_column(section, f"{name}_scale", count) for name in ("distil", "dmd", "adversarial")]
    for number, each in enumerate(zip(*scales, strict=True), start=1):
        if not any(each):
            raise UserError(f"--config.distill.distil_scale={section['distil_scale']}: stage {number} has no loss; its "
                            "dmd_scale and adversarial_scale are 0 too")
    starts = [torch.full((K,), 1 / K, dtype=torch.float64) for K in steps] if uniform else _starts(section, steps)
    return [Stage(*row) for row in zip(updates, steps, starts, *scales, _guidance(section, count), strict=True)]


def _starts(section: Mapping, steps: list[int]) -> list[Tensor]:
    """Each stage's `start_probabilities`."""
    weights = _rows(section, "mode_weights", len(steps))
    modes = len(weights[0])
    if any(len(row) != modes for row in weights):
        raise _refusal(section, "mode_weights", "every stage needs a weight for the same modes")
    if any(min(row) < 0 or sum(row) == 0 for row in weights):
        raise _refusal(section, "mode_weights", "the weights of a stage must not be negative, nor all 0")
    if not section["spread"] > 0:
        raise _refusal(section, "spread", "must be positive")
    for K in steps:
        if K % modes:
            raise _refusal(section, "teacher_steps", f"a grid of {K} steps does not hold the {modes} modes of "
                           f"mode_weights; choose a multiple of {modes}")
    return [start_probabilities(K, row, section["spread"]) for K, row in zip(steps, weights, strict=True)]


def _guidance(section: Mapping, count: int) -> list[tuple[float, float]]:
    """Each stage's lowest and highest scale."""
    rows = _rows(section, "guidance", count)
    if any(len(row) > 2 or row[0] > row[-1] for row in rows):
        raise _refusal(section, "guidance", "want the lowest and the highest scale, or one number")
    if any(row[0] < 0 for row in rows):
        raise _refusal(section, "guidance", "must not be negative")
    return [(row[0], row[-1]) for row in rows]


def _whole(section: Mapping, field: str, count: int) -> list[int]:
    """`_column` of whole numbers from 1."""
    values = _column(section, field, count)
    if any(value != int(value) or value < 1 for value in values):
        raise _refusal(section, field, "want whole numbers of at least 1")
    return [int(value) for value in values]


def _column(section: Mapping, field: str, count: int) -> list[float]:
    """A number of at least 0 for each of `count` stages, parted by commas."""
    values = _numbers(section, field, str(section[field]))
    if min(values) < 0:
        raise _refusal(section, field, "must not be negative")
    return _for_each_stage(section, field, values, count)


def _rows(section: Mapping, field: str, count: int) -> list[list[float]]:
    """A list of numbers for each stage; semicolons part the stages."""
    values = [_numbers(section, field, text) for text in str(section[field]).split(";")]
    return _for_each_stage(section, field, values, count)


def _for_each_stage(section: Mapping, field: str, values: list, count: int) -> list:
    if len(values) not in (1, count):
        raise _refusal(section, field, f"{len(values)} values for {count} stage{'s' * (count > 1)} (stage_updates); "
                       "give one for each, or one for all")
    return values * count if len(values) == 1 else values


def _numbers(section: Mapping, field: str, text: str) -> list[float]:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        values = [math.nan]
    if not all(map(math.isfinite, values)):
        raise _refusal(section, field, "want numbers, parted by commas (stages that are lists by semicolons)")
    return values


def _refusal(section: Mapping, field: str, why: str) -> UserError:
    return UserError(f"--config.distill.{field}={section[field]}: {why}")

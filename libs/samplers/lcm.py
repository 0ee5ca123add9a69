"""Multistep sampling of consistency models (2303.01469, algorithm 1; 2310.04378): for students that jump onto data."""

from collections.abc import Callable

from torch import Tensor

from ..denoiser import Denoise, rows
from ..schedule import Schedule
from .after_step import AfterStep, keep


def lcm(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule, noise: Callable | None = None,
        after_step: AfterStep = keep) -> Tensor:
    """x_s = alpha_s x_0 + sigma_s z with new noise z at every step; the last one returns x_0.

    x_0 must be where the ODE ends (a consistency function): the mean E[x_0 | x_t] of a diffusion model loses spread.
    """
    alphas, sigmas = schedule.alpha(ts), schedule.sigma(ts)
    last = len(ts) - 2
    x = x_T
    for i in range(last + 1):
        x = denoise(x, ts[i]).x_0
        if i < last:
            x = rows(alphas[i + 1], x) * x + rows(sigmas[i + 1], x) * noise(i)
        x = after_step(x, ts[i + 1])
    return x

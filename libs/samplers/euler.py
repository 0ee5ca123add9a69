"""First-order solvers of the reverse-time equations of score-based diffusion (2011.13456)."""

from collections.abc import Callable

from torch import Tensor

from ..denoiser import Denoise, rows
from ..schedule import Schedule
from .after_step import AfterStep, keep


def euler_sde(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule,
              noise: Callable | None = None, after_step: AfterStep = keep) -> Tensor:
    """Euler-Maruyama on dx = (f x - g^2 score) dt + g dw (equation 6), score = -eps / sigma.

    No noise on the last step, as U-ViT does for its 1,000-step results.
    """
    f, g2, sigmas, dt = schedule.drift(ts), schedule.diffusion2(ts), schedule.sigma(ts), ts.diff(dim=0)
    last = len(ts) - 2
    x = x_T
    for i in range(last + 1):
        eps = denoise(x, ts[i]).eps
        x = rows(1 + f[i] * dt[i], x) * x + rows(g2[i] / sigmas[i] * dt[i], x) * eps
        if i < last:
            x = x + rows((-g2[i] * dt[i]).sqrt(), x) * noise(i)
        x = after_step(x, ts[i + 1])
    return x


def euler_ode(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule,
              noise: Callable | None = None, after_step: AfterStep = keep) -> Tensor:
    """Euler on the probability-flow ODE dx = (f x - g^2 score / 2) dt (equation 13)."""
    f, g2, sigmas, dt = schedule.drift(ts), schedule.diffusion2(ts), schedule.sigma(ts), ts.diff(dim=0)
    x = x_T
    for i in range(len(ts) - 1):
        eps = denoise(x, ts[i]).eps
        x = rows(1 + f[i] * dt[i], x) * x + rows(0.5 * g2[i] / sigmas[i] * dt[i], x) * eps
        x = after_step(x, ts[i + 1])
    return x

"""DDIM (2010.02502), plain and clipped, and DDPM ancestral sampling (2006.11239), for any pair (alpha, sigma)."""

from collections.abc import Callable

from torch import Tensor

from ..denoiser import Denoise, Prediction, rows
from ..errors import choose
from ..schedule import Schedule
from .after_step import AfterStep, keep


def ddim(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule, noise: Callable | None = None,
         after_step: AfterStep = keep, eta: float = 0.0) -> Tensor:
    """DDIM, equation 12: deterministic at eta = 0, with the posterior's variance at eta = 1."""
    alphas, sigmas, _ = schedule.on_grid(ts)
    # sigma_{t|s}^2, the noise that the forward process adds from s = ts[i + 1] to t = ts[i]
    sigmas_ts2 = sigmas[:-1] ** 2 - (alphas[:-1] / alphas[1:]) ** 2 * sigmas[1:] ** 2
    stds = eta * sigmas[1:] / sigmas[:-1] * sigmas_ts2.clamp(min=0).sqrt()  # equation 16
    directions = (sigmas[1:] ** 2 - stds**2).clamp(min=0).sqrt()
    x = x_T
    for i in range(len(ts) - 1):
        x_0, eps = denoise(x, ts[i])
        x = rows(alphas[i + 1], x) * x_0 + rows(directions[i], x) * eps
        if stds[i].any():
            x = x + rows(stds[i], x) * noise(i)
        x = after_step(x, ts[i + 1])
    return x


def clipped(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule, noise: Callable | None = None,
            after_step: AfterStep = keep, clipping_value: float = 1.2, eta: float = 0.0) -> Tensor:
    """DDIM with x_0 clipped at +-clipping_value, and then eps, once it has followed x_0: diffusion_distiller's sampler.

    x_t = alpha_t x_0 + sigma_t eps holds until eps is clipped. A step onto clean data returns the clipped x_0.
    """
    def denoise_clipped(x_t: Tensor, t: Tensor) -> Prediction:
        x_0, eps = denoise(x_t, t)
        x_0_clipped = x_0.clamp(-clipping_value, clipping_value)
        # As a difference, so that where x_0 lies inside, eps keeps its every bit.
        eps = eps + rows(schedule.alpha(t) / schedule.sigma(t), x_t) * (x_0 - x_0_clipped)
        return Prediction(x_0_clipped, eps.clamp(-clipping_value, clipping_value))

    return ddim(denoise_clipped, x_T, ts, schedule, noise, after_step, eta)


def ddpm(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule, noise: Callable | None = None,
         after_step: AfterStep = keep, variance: str = "small") -> Tensor:
    """Draws from q(x_s | x_t, x_0) step by step, equations 6 and 7.

    variance: `small`, the posterior's (beta tilde), or `large`, the forward process's (beta).
    """
    choose("sampler.variance", variance, ("small", "large"))
    alphas, sigmas, _ = schedule.on_grid(ts)
    alphas_ts = alphas[:-1] / alphas[1:]
    sigmas_ts2 = (sigmas[:-1] ** 2 - alphas_ts**2 * sigmas[1:] ** 2).clamp(min=0)
    from_x = alphas_ts * sigmas[1:] ** 2 / sigmas[:-1] ** 2
    from_x_0 = alphas[1:] * sigmas_ts2 / sigmas[:-1] ** 2
    small = sigmas_ts2.sqrt() * sigmas[1:] / sigmas[:-1]
    stds = small if variance == "small" else sigmas_ts2.sqrt() * (sigmas[1:] > 0)  # none onto clean data
    x = x_T
    for i in range(len(ts) - 1):
        x_0, _ = denoise(x, ts[i])
        x = rows(from_x[i], x) * x + rows(from_x_0[i], x) * x_0
        if stds[i].any():
            x = x + rows(stds[i], x) * noise(i)
        x = after_step(x, ts[i + 1])
    return x

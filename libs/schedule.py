"""Noise schedules: x_t = alpha_t x_0 + sigma_t eps, t in [0, 1], t = 0 data.

Every function takes t as a tensor of any shape on the host and answers in float64. A discrete schedule of N
steps puts its step n (counted from 0) at t = (n + 1) / N and interpolates log alpha linearly in between, as
DPM-Solver does; t = 0 is clean data.
"""

import inspect
import math
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from .errors import UserError, choose


class Schedule(ABC):
    """A pair (alpha_t, sigma_t) of amplitudes. Subclasses give `log_alpha`, `t_of_lambda` and `drift`, and where they
    do not preserve the variance, `log_sigma` and `diffusion2`.
    """

    steps: int | None = None  # N of a discrete schedule

    @abstractmethod
    def log_alpha(self, t: Tensor) -> Tensor:
        """log alpha at t."""

    def log_sigma(self, t: Tensor) -> Tensor:
        """Variance preserving: sigma^2 = 1 - alpha^2."""
        return 0.5 * torch.log(-torch.expm1(2 * self.log_alpha(t)))

    @abstractmethod
    def t_of_lambda(self, lam: Tensor) -> Tensor:
        """The t at which log(alpha / sigma) is lam."""

    def alpha(self, t: Tensor) -> Tensor:
        return self.log_alpha(t).exp()

    def sigma(self, t: Tensor) -> Tensor:
        return self.log_sigma(t).exp()

    def lambda_(self, t: Tensor) -> Tensor:
        """Half the log signal-to-noise ratio, log(alpha / sigma): infinite at t = 0."""
        return self.log_alpha(t) - self.log_sigma(t)

    def logsnr(self, t: Tensor) -> Tensor:
        return 2 * self.lambda_(t)

    def on_grid(self, ts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """alpha, sigma and lambda at a sampler's times, each shaped as `ts`.

        t = 0 is clean data, (1, 0, infinity), also where log SNR is truncated: there 2202.00512's sampler returns x_0.
        """
        clean = ts == 0
        return (self.alpha(ts).masked_fill(clean, 1), self.sigma(ts).masked_fill(clean, 0),
                self.lambda_(ts).masked_fill(clean, math.inf))

    @abstractmethod
    def drift(self, t: Tensor) -> Tensor:
        """f(t) = d log alpha / dt of the forward SDE dx = f x dt + g dw."""

    def diffusion2(self, t: Tensor) -> Tensor:
        """g(t)^2 = d sigma^2 / dt - 2 f sigma^2; -2 f when variance preserving."""
        return -2 * self.drift(t)


def _log_alpha_of_lambda(lam: Tensor) -> Tensor:
    """log alpha of a variance-preserving schedule: alpha^2 = sigmoid(2 lambda)."""
    return 0.5 * logsigmoid(2 * lam)


class VPLinear(Schedule):
    """beta(t) = beta_min + (beta_max - beta_min) t in continuous time (2011.13456, appendix C)."""

    def __init__(self, beta_min: float = 0.1, beta_max: float = 20.0):
        self.beta_min, self.beta_max = beta_min, beta_max

    def log_alpha(self, t: Tensor) -> Tensor:
        t = t.double()
        return -0.25 * t**2 * (self.beta_max - self.beta_min) - 0.5 * t * self.beta_min

    def t_of_lambda(self, lam: Tensor) -> Tensor:
        log_alpha = _log_alpha_of_lambda(lam.double())
        slope = self.beta_max - self.beta_min  # the stable root of the quadratic above
        return -4 * log_alpha / (self.beta_min + torch.sqrt(self.beta_min**2 - 4 * slope * log_alpha))

    def drift(self, t: Tensor) -> Tensor:
        return -0.5 * (self.beta_min + (self.beta_max - self.beta_min) * t.double())


class Cosine(Schedule):
    """alpha = cos(pi t / 2) with log SNR truncated: l(t) = -2 log tan(a t + b) (2202.00512, appendix)."""

    def __init__(self, logsnr_min: float = -20.0, logsnr_max: float = 20.0):
        self.b = math.atan(math.exp(-0.5 * logsnr_max))
        self.a = math.atan(math.exp(-0.5 * logsnr_min)) - self.b

    def lambda_(self, t: Tensor) -> Tensor:
        return -torch.log(torch.tan(self.a * t.double() + self.b))

    def log_alpha(self, t: Tensor) -> Tensor:
        return _log_alpha_of_lambda(self.lambda_(t))

    def log_sigma(self, t: Tensor) -> Tensor:
        return _log_alpha_of_lambda(-self.lambda_(t))

    def t_of_lambda(self, lam: Tensor) -> Tensor:
        return (torch.atan(torch.exp(-lam.double())) - self.b) / self.a

    def drift(self, t: Tensor) -> Tensor:
        # alpha = cos(a t + b) exactly, so d log alpha / dt = -a tan(a t + b).
        return -self.a * torch.tan(self.a * t.double() + self.b)


class Discrete(Schedule):
    """DDPM's N steps from their betas: alpha^2 at step n is the product of (1 - beta) up to n (2006.11239)."""

    def __init__(self, betas: Tensor):
        log_alphas = 0.5 * torch.log1p(-betas.double()).cumsum(0)
        self.steps = len(betas)
        self.log_alphas = torch.cat([log_alphas.new_zeros(1), log_alphas])  # at t = 0, 1/N, ..., 1

    def log_alpha(self, t: Tensor) -> Tensor:
        position = t.double() * self.steps
        below = position.floor().clamp(0, self.steps - 1).long()
        left, right = self.log_alphas[below], self.log_alphas[below + 1]
        return left + (position - below) * (right - left)

    def t_of_lambda(self, lam: Tensor) -> Tensor:
        log_alpha = _log_alpha_of_lambda(lam.double())
        above = torch.searchsorted(-self.log_alphas, -log_alpha).clamp(1, self.steps)
        left, right = self.log_alphas[above - 1], self.log_alphas[above]
        return (above - 1 + (log_alpha - left) / (right - left)) / self.steps

    def drift(self, t: Tensor) -> Tensor:
        above = (t.double() * self.steps).ceil().clamp(1, self.steps).long()
        return self.steps * (self.log_alphas[above] - self.log_alphas[above - 1])


def ddpm_linear(steps: int = 1000, beta_start: float = 1e-4, beta_end: float = 0.02) -> Discrete:
    """Betas uniform from beta_start to beta_end (2006.11239, section 4)."""
    return Discrete(torch.linspace(beta_start, beta_end, steps, dtype=torch.float64))


def scaled_linear(steps: int = 1000, beta_start: float = 0.00085, beta_end: float = 0.012) -> Discrete:
    """Stable Diffusion's betas: uniform in their square roots."""
    return Discrete(torch.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=torch.float64) ** 2)


def squared_cosine(steps: int = 1000, s: float = 0.008, beta_max: float = 0.999) -> Discrete:
    """alpha^2 proportional to cos^2((t + s) / (1 + s) pi / 2), betas clamped (2102.09672, equation 17)."""
    t = torch.linspace(0, 1, steps + 1, dtype=torch.float64)
    alpha2 = torch.cos((t + s) / (1 + s) * math.pi / 2) ** 2
    return Discrete((1 - alpha2[1:] / alpha2[:-1]).clamp(max=beta_max))


class FlowMatching(Schedule):
    """alpha = 1 - sigma (2210.02747, the straight path), sigma = shift t / (1 + (shift - 1) t): t itself at shift 1,
    more time at high noise for the larger images of Stable Diffusion 3 (2403.03206, equation 23).
    """

    def __init__(self, shift: float = 1.0):
        self.shift = shift

    def log_alpha(self, t: Tensor) -> Tensor:
        return torch.log1p(-t.double()) - torch.log1p((self.shift - 1) * t.double())

    def log_sigma(self, t: Tensor) -> Tensor:
        return torch.log(self.shift * t.double()) - torch.log1p((self.shift - 1) * t.double())

    def t_of_lambda(self, lam: Tensor) -> Tensor:
        return torch.sigmoid(-lam.double() - math.log(self.shift))

    def drift(self, t: Tensor) -> Tensor:
        t = t.double()
        return -self.shift / ((1 - t) * (1 + (self.shift - 1) * t))

    def diffusion2(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return -2 * self.drift(t) * sigma  # d sigma / dt = -alpha f, so that g^2 = -2 alpha f sigma - 2 f sigma^2


SCHEDULES = {
    "vp_linear": VPLinear,
    "cosine": Cosine,
    "ddpm_linear": ddpm_linear,
    "scaled_linear": scaled_linear,
    "squared_cosine": squared_cosine,
    "flow_matching": FlowMatching,
}


def make_schedule(name: str, **options) -> Schedule:
    """A schedule by its name in `SCHEDULES`; options are its own arguments, unknown ones are refused."""
    factory = choose("schedule.name", name, SCHEDULES)
    known = inspect.signature(factory).parameters
    for option, value in options.items():
        if option not in known:
            raise UserError(f"schedule.{option}={value!r}: {name} has no such field; it has {', '.join(known)}")
    return factory(**options)


def schedule_options(name: str, **options) -> dict[str, Any]:
    """All arguments of a schedule, those that are not given at their usual values."""
    known = inspect.signature(choose("schedule.name", name, SCHEDULES)).parameters
    return {option: each.default for option, each in known.items()} | options


def _uniform_lambda(schedule: Schedule, t_start: float, t_end: float, orders: list[int]) -> Tensor:
    """Intervals uniform in lambda, the k-th cut into orders[k] equal parts."""
    ends = schedule.lambda_(torch.tensor([t_start, t_end], dtype=torch.float64)).tolist()
    outer = torch.linspace(ends[0], ends[1], len(orders) + 1, dtype=torch.float64)
    parts = [torch.linspace(a, b, order + 1, dtype=torch.float64)[:-1]
             for a, b, order in zip(outer[:-1].tolist(), outer[1:].tolist(), orders, strict=True)]
    return schedule.t_of_lambda(torch.cat([*parts, outer[-1:]]))


def time_grid(name: str, steps: int, schedule: Schedule, t_start: float = 1.0, t_end: float = 0.0,
              orders: list[int] | None = None) -> Tensor:
    """The decreasing times at which a solver of `steps` evaluations stands: (steps + 1,) float64.

    name: `uniform` in t; `logsnr`, uniform in log SNR (t_end > 0), where a singlestep solver's intervals are
    uniform and each is cut by its order; `trailing`, a discrete schedule's own steps, spaced evenly back from
    the last one (2305.08891, table 2), ending on clean data, and in continuous time `uniform`.
    """
    choose("sampler.grid", name, ("uniform", "logsnr", "trailing"))
    if steps < 1:
        raise UserError(f"sampler.steps={steps} must be at least 1")
    if not 0 <= t_end < t_start <= 1:
        raise UserError(f"sampler.t_start={t_start}, sampler.t_end={t_end}: need 0 <= t_end < t_start <= 1")
    if name == "logsnr":
        if t_end == 0:
            raise UserError("sampler.t_end=0.0: the grid logsnr needs t_end > 0 (log SNR is infinite at 0)")
        ts = _uniform_lambda(schedule, t_start, t_end, orders or [1] * steps)
        ts[0], ts[-1] = t_start, t_end  # free of the inversion's rounding
        return ts
    ts = torch.linspace(t_start, t_end, steps + 1, dtype=torch.float64)
    if name == "trailing" and schedule.steps is not None:
        if steps > schedule.steps:
            raise UserError(f"sampler.steps={steps}: the schedule has {schedule.steps} steps")
        ts = (ts * schedule.steps).round() / schedule.steps
    return ts

"""The one place that knows what a network predicts (eps, x_0, v, flow, eps_damped, eps_to_x_0, both) and its own unit
of time.

    denoise(x_t, t, cond) -> Prediction(x_0, eps)

x_t is (b, c, h, w); t lies on the host in float64, a scalar () or one time a row (b,); cond is a dict with
`y` and / or `context`, or None. The training loss and every sampler use the same object.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .errors import choose
from .schedule import Schedule


class Prediction(NamedTuple):
    """Both views of one prediction: x_t = alpha_t x_0 + sigma_t eps."""

    x_0: Tensor
    eps: Tensor


Denoise = Callable[..., Prediction]


def rows(c: Tensor, x: Tensor) -> Tensor:
    """A coefficient () or (b,) made fit to multiply x (b, ...).

    A scalar stays on the host: torch hands it to the kernel as a number, with no copy and no sync.
    """
    return c if c.dim() == 0 else c.to(x.device, x.dtype).view(-1, *[1] * (x.dim() - 1))


DAMPING = 0.025  # alpha / sigma at which eps_damped believes half of what eps says of x_0


def _damping(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(1 - s) / sigma and s / alpha of s, the part of eps's x_0 that eps_damped believes.

    s = 1 / (1 + (DAMPING sigma / alpha)^3) is near 1 where the noise leaves something to see, and to 0 where it does
    not: there x_0 is small on average, while (x_t - sigma eps) / alpha has the error of eps times sigma / alpha, 150 at
    the end of U-ViT's schedule. The best s is the variance of what x_t tells of x_0, by the sum of that and of this
    error; DAMPING and the power were chosen by it for `cifar10_uvit_tiny`. s sigma / alpha stays below
    0.53 / DAMPING = 21.
    """
    total = alpha**3 + (DAMPING * sigma) ** 3
    return DAMPING**3 * sigma**2 / total, alpha**2 / total


def _from_damped(x_t: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    rest, scale = _damping(alpha, sigma)
    return Prediction(scale * (x_t - sigma * out), rest * x_t + alpha * scale * out)


TURNING = 8.0  # sigma / alpha at which eps_to_x_0 is half way from eps to x_0


def _turn(alpha: Tensor, sigma: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angle by which eps_to_x_0 turns from eps to -x_0, tan = (sigma / (TURNING alpha))^2.

    v turns by tan = sigma / alpha (2202.00512, appendix D), so it is no eps at low noise either, and a network of eps
    must learn all of it anew. This one turns only where eps says little of x_0: a network of eps is one of eps_to_x_0
    as it is at low noise, while at high noise a few layers can say it, who cannot copy the noise exactly.
    """
    cos, sin = (TURNING * alpha) ** 2, sigma**2
    length = torch.hypot(cos, sin)
    return cos / length, sin / length


def _turned(x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
    cos, sin = _turn(alpha, sigma)
    return cos * eps - sin * x_0


def _from_turned(x_t: Tensor, out: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    cos, sin = _turn(alpha, sigma)
    total = alpha * cos + sigma * sin
    return Prediction((cos * x_t - sigma * out) / total, (sin * x_t + alpha * out) / total)


# What the network outputs, from x_0 and eps: for the loss.
TARGETS = {
    "eps": lambda x_0, eps, alpha, sigma: eps,
    "x_0": lambda x_0, eps, alpha, sigma: x_0,
    "v": lambda x_0, eps, alpha, sigma: alpha * eps - sigma * x_0,  # 2202.00512, appendix D
    "flow": lambda x_0, eps, alpha, sigma: eps - x_0,
    "eps_damped": lambda x_0, eps, alpha, sigma: eps - DAMPING**3 * (sigma / alpha) ** 2 * x_0,
    "eps_to_x_0": _turned,
    "both": lambda x_0, eps, alpha, sigma: torch.cat([x_0, eps], dim=1),  # 2202.00512, section 4
}

# And back: Prediction from x_t and the output, for any pair (alpha, sigma).
PREDICTIONS = {
    "eps": lambda x_t, out, alpha, sigma: Prediction((x_t - sigma * out) / alpha, out),
    "x_0": lambda x_t, out, alpha, sigma: Prediction(out, (x_t - alpha * out) / sigma),
    "v": lambda x_t, out, alpha, sigma: Prediction((alpha * x_t - sigma * out) / (alpha**2 + sigma**2),
                                                   (sigma * x_t + alpha * out) / (alpha**2 + sigma**2)),
    "flow": lambda x_t, out, alpha, sigma: Prediction((x_t - sigma * out) / (alpha + sigma),
                                                      (x_t + alpha * out) / (alpha + sigma)),
    "eps_damped": _from_damped,
    "eps_to_x_0": _from_turned,
    "both": lambda x_t, out, alpha, sigma: _from_both(x_t, *out.chunk(2, dim=1), alpha, sigma),
}


COUNTED_AS_V = ("eps_damped", "eps_to_x_0")  # in the loss, see `Denoiser.scaled`


def _from_both(x_t: Tensor, x_0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Prediction:
    """Two estimates of x_0, one by way of eps, weighted by sigma^2 and alpha^2 (2202.00512, section 4): each is good
    where the other is not. Variance preserving; elsewhere the weights are divided by their sum.
    """
    total = alpha**2 + sigma**2
    # alpha^2 (x_t - sigma eps) / alpha has no quotient left, so that alpha near 0 amplifies nothing.
    x_0 = (sigma**2 * x_0 + alpha * (x_t - sigma * eps)) / total
    return Prediction(x_0, (x_t - alpha * x_0) / sigma)


# The network's own unit of time, from t and the schedule.
TIME_INPUTS = {
    "999t": lambda t, schedule: 999 * t,  # U-ViT, continuous
    "1000t": lambda t, schedule: 1000 * t,
    "1000sigma": lambda t, schedule: 1000 * schedule.sigma(t),  # Stable Diffusion 3, whose times are shifted
    "step": lambda t, schedule: schedule.steps * t,  # U-ViT, discrete: 1 to N
    "index": lambda t, schedule: schedule.steps * t - 1,  # diffusers: 0 to N - 1
    "logsnr": lambda t, schedule: 2000 / math.pi * torch.atan(torch.exp(-schedule.lambda_(t))),  # 2202.00512
}


class Denoiser:
    """A network (or a policy around one) as `denoise(x_t, t, cond)`.

    net          `net(x, timesteps, y=None, context=None)`
    prediction   what it outputs: eps, x_0, v, flow, eps_damped (eps, of which x_0 is made with care at high noise),
                 eps_to_x_0 (eps at low noise, -x_0 at high), or both (twice the channels: x_0, then eps)
    time_input   its unit of time: 999t, 1000t, 1000sigma, step (1 to N), index (0 to N - 1) or logsnr
    time_scale   factor on that time
    autocast     a context manager factory for mixed precision, or None
    cuda_graphs  whether the network replays CUDA graphs, which write over the results of the ones before: then every
                 call is told to be a step of its own, and `output` is a copy, which a solver may hold on to
    """

    def __init__(self, net, schedule: Schedule, prediction: str = "eps", time_input: str = "999t",
                 autocast: Callable | None = None, time_scale: float = 1.0, cuda_graphs: bool = False):
        self.net, self.schedule, self.autocast, self.time_scale = net, schedule, autocast, time_scale
        self.cuda_graphs = cuda_graphs
        self._target = choose("denoiser.prediction", prediction, TARGETS)
        self._predict = PREDICTIONS[prediction]
        self._time_input = choose("denoiser.time_input", time_input, TIME_INPUTS)
        self.prediction = prediction

    def alpha_sigma(self, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
        return rows(self.schedule.alpha(t), x), rows(self.schedule.sigma(t), x)

    def time_input(self, t: Tensor) -> Tensor:
        """t in the network's unit, on the host."""
        return self.time_scale * self._time_input(t, self.schedule)

    def call(self, x_t: Tensor, t: Tensor, cond: dict | None = None, **options):
        """What the network returns, called with its own unit of time under autocast; options are its own."""
        time = self.time_input(t)
        if time.dim() == 0:
            timesteps = torch.full(x_t.shape[:1], float(time), dtype=torch.float32, device=x_t.device)
        else:
            timesteps = time.float().to(x_t.device)
        if self.cuda_graphs:
            torch.compiler.cudagraph_mark_step_begin()
        if self.autocast is None:
            return self.net(x_t, timesteps, **(cond or {}), **options)
        with self.autocast():
            return self.net(x_t, timesteps, **(cond or {}), **options)

    def output(self, x_t: Tensor, t: Tensor, cond: dict | None = None) -> Tensor:
        """The network's raw output (b, c, h, w), in x_t's precision."""
        return self.call(x_t, t, cond).to(x_t.dtype, copy=self.cuda_graphs)

    def target(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """What the network should output at t: eps, x_0, v, ..."""
        return self._target(x_0, eps, *self.alpha_sigma(t, x_0))

    def __call__(self, x_t: Tensor, t: Tensor, cond: dict | None = None) -> Prediction:
        return self._predict(x_t, self.output(x_t, t, cond), *self.alpha_sigma(t, x_t))

    def diffuse(self, x_0: Tensor, eps: Tensor, t: Tensor) -> Tensor:
        """x_t = alpha_t x_0 + sigma_t eps."""
        alpha, sigma = self.alpha_sigma(t, x_0)
        return alpha * x_0 + sigma * eps

    def loss(self, x_0: Tensor, eps: Tensor, t: Tensor, cond: dict | None = None) -> Tensor:
        """Mean squared error of the network's own output, one value a row: (b,); see `scaled`."""
        error = self.scaled(self.output(self.diffuse(x_0, eps, t), t, cond) - self.target(x_0, eps, t), t)
        return error.float().square().flatten(1).mean(dim=1)

    def scaled(self, outputs: Tensor, t: Tensor) -> Tensor:
        """Outputs (..., b, c, h, w), or their errors, in the unit in which differences count: as they are, but of
        eps_damped and eps_to_x_0 as large as the differences of v that they make, since where noise is high small ones
        of eps matter.
        """
        if self.prediction not in COUNTED_AS_V:
            return outputs
        dtype = torch.promote_types(outputs.dtype, torch.float32)
        return outputs.to(dtype) * self._unit(t)[1].to(outputs.device, dtype).view(-1, 1, 1, 1)

    def moved(self, t: Tensor, s: Tensor) -> Tensor:
        """How far x_s moves, after a step of DDIM from t, where the output is off by 1 in the unit of `scaled`.

        t, s: (n,) float64, s = 0 is clean data; returns (n,), for predictions of one output. Of v and what counts as v
        it is sin(phi_t - phi_s), with alpha = cos phi and sigma = sin phi (2202.00512, appendix D).
        """
        difference, v = self._unit(t)
        alpha, sigma, _ = self.schedule.on_grid(s)
        moved = (alpha * difference.x_0 + sigma * difference.eps).abs()
        return moved / v.abs() if self.prediction in COUNTED_AS_V else moved

    def _unit(self, t: Tensor) -> tuple[Prediction, Tensor]:
        """The differences of x_0 and eps, and that of v, which an output of 1 makes at t; predictions are linear."""
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        difference = self._predict(torch.zeros_like(alpha), torch.ones_like(alpha), alpha, sigma)
        return difference, TARGETS["v"](*difference, alpha, sigma)


def guided(denoise: Denoise, cfg_scale: float | Tensor, null: dict) -> Denoise:
    """Classifier-free guidance uncond + w (cond - uncond) with w = cfg_scale, one for all or (b,) (2207.12598).

    One call of 2b rows, the conditional rows first. `null` holds the unconditional `y` / `context`, (b, ...).
    """
    def denoise_guided(x_t: Tensor, t: Tensor, cond: dict) -> Prediction:
        both = {name: torch.cat([value, null[name]]) for name, value in cond.items()}
        pair = denoise(torch.cat([x_t, x_t]), t if t.dim() == 0 else torch.cat([t, t]), both)
        w = rows(cfg_scale, x_t) if isinstance(cfg_scale, Tensor) else cfg_scale
        return Prediction(*(uncond + w * (cond - uncond) for cond, uncond in (each.chunk(2) for each in pair)))

    return denoise_guided


def clip_static(x_0: Tensor, value: float) -> Tensor:
    return x_0.clamp(-value, value)


def clip_dynamic(x_0: Tensor, quantile: float) -> Tensor:
    """Clip each image at s = max(1, its quantile of |x_0|), then divide by s (2205.11487, section 2.3)."""
    s = torch.quantile(x_0.abs().flatten(1), quantile, dim=1).clamp(min=1).view(-1, *[1] * (x_0.dim() - 1))
    return x_0.clamp(-s, s) / s


THRESHOLDS = {"static": clip_static, "dynamic": clip_dynamic}


def thresholded(denoise: Denoise, schedule: Schedule, name: str, value: float) -> Denoise:
    """Thresholding of x_0: `static` at +-value, `dynamic` at the quantile `value`; eps follows from x_t."""
    clip = choose("sampler.threshold", name, THRESHOLDS)

    def denoise_thresholded(x_t: Tensor, t: Tensor, cond: dict | None = None) -> Prediction:
        x_0 = clip(denoise(x_t, t, cond).x_0, value)
        return Prediction(x_0, (x_t - rows(schedule.alpha(t), x_t) * x_0) / rows(schedule.sigma(t), x_t))

    return denoise_thresholded

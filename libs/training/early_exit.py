"""AdaDiff's training loss (2309.17074, section 3.2): every layer of a U-ViT learns to predict, and every uncertainty
head learns how good that is.

    L = L_simple + lambda L_u + beta L_UAL

With eps the network's target, g_i = g(L_i) what the output head makes of layer i = 1 ... N, c_i = 1 - u_i the certainty
of its uncertainty head, and ms a mean of squares over an image:

    L_simple = ms(eps - g_N)
    L_u      = sum_i ms(c_i - c*_i),                  c*_i = 1 - tanh|g_i - eps|, of which no gradient is taken
    L_UAL    = sum_i w_i ms(eps - g_i),               w_i from c_i

The paper and its released code differ in the sums and the weights; see `LayerwiseLoss`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UserError, choose
from ..random import Stream
from .batches import Batch
from .objective import training_times

TARGETS = ("eps_error", "final_gap")
U_REDUCTIONS = ("mean", "sum")
UAL_NORMS = ("sum1", "none")


class Lesson(NamedTuple):
    """What the network is shown and what it should say of it: x_t, target (b, c, h, w), t (b,) on the host."""

    x_t: Tensor
    t: Tensor
    cond: dict[str, Tensor] | None
    target: Tensor


def from_data(denoiser: Denoiser, batch: Batch) -> Lesson:
    """The diffusion loss's: the data and their noise know the target, at all times."""
    t, eps = training_times(denoiser, batch), batch.noise()
    return Lesson(denoiser.diffuse(batch.x_0, eps, t), t, batch.cond, denoiser.target(batch.x_0, eps, t))


@dataclass(frozen=True)
class FromStart:
    """The target is what the network said before this training, or another one says, at the times at which it is asked
    when it samples, in terms of what it is to predict now.

    For a student of few steps, which must go on saying what it has learnt from its teacher: data would teach it to be
    a model of many steps again.

    teacher   the network as it was, or another one, in eval mode
    times     (n,) float64 on the host, the latest first; None is all times, as in `from_data`
    power     0: each of the times is drawn as often; p: in proportion to the p-th power of the angle that a step of
              DDIM goes from it, see `shares`
    scales    lowest and highest guidance scale of a network that takes it as an input, else None
    """

    teacher: Denoiser
    times: Tensor | None = None
    scales: tuple[float, float] | None = None
    power: float = 0.0

    def __post_init__(self):
        if not 0 <= self.power < math.inf:
            raise UserError(f"--config.early_exit.angle_power={self.power} must be a number of at least 0")
        if self.power and self.times is None:
            raise UserError(f"--config.early_exit.angle_power={self.power}: the checkpoint is no student of few steps, "
                            "and learns at all times")

    def shares(self) -> Tensor:
        """(n,) shares of the lessons at each time.

        An error d of v at t moves the next x_s of DDIM by sin(phi_t - phi_s) d, with alpha = cos phi, sigma = sin phi
        (2202.00512, appendix D): errors of the last calls, which go far, show in the images, those of the first hardly.
        """
        schedule = self.teacher.schedule
        phi = torch.cat([torch.atan2(schedule.sigma(self.times), schedule.alpha(self.times)), self.times.new_zeros(1)])
        angles = (phi[:-1] - phi[1:]) ** self.power
        return angles / angles.sum()

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Lesson:
        if self.times is None:
            t = training_times(denoiser, batch)
        else:
            t = self.times[torch.searchsorted(self.shares().cumsum(0)[:-1], batch.uniform(), right=True)]
        cond: dict[str, Any] | None = batch.cond
        if self.scales is not None:
            low, high = self.scales
            w = low + (high - low) * batch.uniform(Stream.TRAIN_GUIDANCE)
            cond = {**(cond or {}), "guidance": w.float().to(batch.x_0.device)}
        x_t = denoiser.diffuse(batch.x_0, batch.noise(), t)
        with torch.no_grad():
            if denoiser.prediction == self.teacher.prediction:
                target = self.teacher.output(x_t, t, cond)
            else:
                target = denoiser.target(*self.teacher(x_t, t, cond), t)
        return Lesson(x_t, t, cond, target)


@dataclass(frozen=True)
class LayerwiseLoss:
    """The loss of `train.py --config=...:early_exit`: `loss(denoiser, batch) -> (b,)`, an `Objective`.

    The defaults are the released code's; in brackets the paper's.

    lambda_u, beta_ual   weights of L_u and L_UAL
    target               eps_error: c* from the error against the noise, as above. final_gap: from the distance to what
                         the last layer gives, |g_i - g_N|, which is small at low noise too, where no layer can tell the
                         noise from the image
    u_reduction          L_u is the mean over the layers [sum]
    ual_norm             sum1: w_i = c_i / sum_j c_j; none: w_i = c_i [none]
    ual_per_sample       w_i is of each image; else of the mean over the rows of the batch that this process sees at
                         once [True]
    ual_last_layer       L_UAL counts the last layer too, whose error L_simple counts already [False]
    ual_detach           no gradient of L_UAL goes through w_i. Where it does (False, in both), the heads are also
                         pushed to be less certain of layers that err
    ual_from             L_UAL counts images at t of at least this alone [0]. At low noise no layer but the last ones is
                         ever certain, and what the others can learn there costs the last ones what they know
    noise_power          errors count max(1, SNR^-p) times [0]. At t near 1 a small error of eps is a large one of x_0:
                         1 weighs the errors of x_0 there, 1/2 lies between
    lesson               what is learnt: `from_data`, or a `FromStart`
    """

    lambda_u: float = 1.0
    beta_ual: float = 1.0
    target: str = "eps_error"
    u_reduction: str = "mean"
    ual_norm: str = "sum1"
    ual_per_sample: bool = False
    ual_last_layer: bool = True
    ual_detach: bool = False
    ual_from: float = 0.0
    noise_power: float = 0.0
    lesson: Callable[[Denoiser, Batch], Lesson] = from_data

    def __post_init__(self):
        choose("early_exit.target", self.target, TARGETS)
        choose("early_exit.u_reduction", self.u_reduction, U_REDUCTIONS)
        choose("early_exit.ual_norm", self.ual_norm, UAL_NORMS)
        for name in ("lambda_u", "beta_ual", "noise_power"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--config.early_exit.{name}={getattr(self, name)} must be a number of at least 0")
        if not 0 <= self.ual_from <= 1:
            raise UserError(f"--config.early_exit.ual_from={self.ual_from} must be a time from 0 to 1")

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        x_t, t, cond, target = self.lesson(denoiser, batch)
        out, certainty = denoiser.call(x_t, t, cond, every_layer=True)
        counts = torch.exp(-self.noise_power * denoiser.schedule.logsnr(t)).clamp(min=1)
        out, target = denoiser.scaled(out, t), denoiser.scaled(target, t)
        return self.of_layers(out, certainty, target, counts.to(out.device, torch.float32),
                              (t >= self.ual_from).to(out.device, torch.float32))

    def of_layers(self, out: Tensor, certainty: Tensor, target: Tensor, counts: Tensor | float = 1.0,
                  layerwise: Tensor | float = 1.0) -> Tensor:
        """The loss (b,) of outputs g and certainties c of every layer, both (layers, b, c, h, w), target (b, c, h, w).

        counts: (b,), by which squared errors are multiplied. layerwise: (b,), by which L_UAL is.
        """
        error = out.float() - target
        squares = counts * _mean_per_image(error.square())  # layers b
        simple = squares[-1]
        error_of = error if self.target == "eps_error" else out.float() - out[-1].float()
        true_certainty = 1 - torch.tanh(error_of.detach().abs())
        uncertainty = _mean_per_image((certainty - true_certainty).square())  # layers b
        loss_u = uncertainty.mean(0) if self.u_reduction == "mean" else uncertainty.sum(0)
        return simple + self.lambda_u * loss_u + self.beta_ual * layerwise * self._layerwise(squares, certainty)

    def _layerwise(self, squares: Tensor, certainty: Tensor) -> Tensor:
        """L_UAL (b,) of ms(eps - g_i) (layers, b)."""
        weight = _mean_per_image(certainty)  # layers b
        if not self.ual_per_sample:
            weight = weight.mean(dim=1, keepdim=True)
        if self.ual_detach:
            weight = weight.detach()
        if not self.ual_last_layer:
            weight, squares = weight[:-1], squares[:-1]
        if self.ual_norm == "sum1":
            weight = weight / weight.sum(0)
        return (weight * squares).sum(0)


def _mean_per_image(maps: Tensor) -> Tensor:
    """(layers, b, c, h, w) -> (layers, b)."""
    return maps.flatten(2).mean(dim=2)

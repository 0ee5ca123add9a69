"""Stage 0 of progressive distillation: a network goes on to predict something else, such as v in place of eps.

The paper trains its models for v from the start (2202.00512, section 4). A model of eps can be told what to say by its
own predictions, where these survive the conversion: they are free of the noise that data have as a target, so far
fewer updates are needed.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import PREDICTIONS, TARGETS, Denoiser, rows
from ..errors import UserError
from ..training.batches import Batch
from ..training.objective import training_times


def amplification(prediction: str, alpha: Tensor, sigma: Tensor) -> Tensor:
    """By what a prediction's error is multiplied when v is made of it: |d v / d output|, shaped as alpha.

    prediction: a name of `TARGETS`, but not "both". v is affine in the output, so this is its value for the output 1 at
    x_t = 0. Of eps it is 1 / alpha where alpha^2 + sigma^2 = 1.

    >>> alpha = torch.tensor([0.8, 0.1])
    >>> amplification("eps", alpha, (1 - alpha**2).sqrt())
    tensor([ 1.2500, 10.0000])
    """
    x_0, eps = PREDICTIONS[prediction](torch.zeros_like(alpha), torch.ones_like(alpha), alpha, sigma)
    return TARGETS["v"](x_0, eps, alpha, sigma).abs()


@dataclass(frozen=True)
class Conversion:
    """The objective `conversion(student, batch) -> (b,)`: mean squared error of the student's own output.

    model   what is converted, as it was, in eval mode
    trust   largest amplification at which its converted prediction is the target, v being what networks of all kinds
            err alike in; beyond it the data and their noise are, as in `diffusion_loss`. 0 is data at all times
    """

    model: Denoiser
    trust: float

    def __post_init__(self):
        if not self.trust >= 0:
            raise UserError(f"--config.distill.convert_trust={self.trust} must be at least 0")

    def __call__(self, student: Denoiser, batch: Batch) -> Tensor:
        t, eps = training_times(student, batch), batch.noise()
        x_t, target = student.diffuse(batch.x_0, eps, t), student.target(batch.x_0, eps, t)
        schedule = student.schedule
        trusted = amplification(self.model.prediction, schedule.alpha(t), schedule.sigma(t)) <= self.trust  # b
        with torch.no_grad():
            told = student.target(*self.model(x_t, t, batch.cond), t)
        target = torch.where(rows(trusted, target) > 0, told, target)
        return student.squared_error(x_t, t, target, batch.cond)

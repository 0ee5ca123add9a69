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

from dataclasses import dataclass

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..errors import UserError, choose
from .batches import Batch
from .objective import training_times

TARGETS = ("eps_error", "final_gap")
U_REDUCTIONS = ("mean", "sum")
UAL_NORMS = ("sum1", "none")


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
    ual_detach           no gradient of L_UAL goes through w_i. With it (False, both) the heads are also pushed to
                         be less certain of layers that err
    """

    lambda_u: float = 1.0
    beta_ual: float = 1.0
    target: str = "eps_error"
    u_reduction: str = "mean"
    ual_norm: str = "sum1"
    ual_per_sample: bool = False
    ual_last_layer: bool = True
    ual_detach: bool = False

    def __post_init__(self):
        choose("early_exit.target", self.target, TARGETS)
        choose("early_exit.u_reduction", self.u_reduction, U_REDUCTIONS)
        choose("early_exit.ual_norm", self.ual_norm, UAL_NORMS)
        for name in ("lambda_u", "beta_ual"):
            if getattr(self, name) < 0:
                raise UserError(f"--config.early_exit.{name}={getattr(self, name)} must not be negative")

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        t, eps = training_times(denoiser, batch), batch.noise()
        target = denoiser.target(batch.x_0, eps, t)
        out, certainty = denoiser.call(denoiser.diffuse(batch.x_0, eps, t), t, batch.cond, every_layer=True)
        return self.of_layers(out, certainty, target)

    def of_layers(self, out: Tensor, certainty: Tensor, target: Tensor) -> Tensor:
        """The loss (b,) of outputs g and certainties c of every layer, both (layers, b, c, h, w), target (b, c, h, w).
        """
        error = out.float() - target
        squares = _mean_per_image(error.square())  # layers b
        simple = squares[-1]
        error_of = error if self.target == "eps_error" else out.float() - out[-1].float()
        true_certainty = 1 - torch.tanh(error_of.detach().abs())
        uncertainty = _mean_per_image((certainty - true_certainty).square())  # layers b
        loss_u = uncertainty.mean(0) if self.u_reduction == "mean" else uncertainty.sum(0)
        return simple + self.lambda_u * loss_u + self.beta_ual * self._layerwise(squares, certainty)

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

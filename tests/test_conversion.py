"""Stage 0: a model goes on to another prediction, taught by itself where that can be trusted, else by data."""

import pytest
import torch

from libs.denoiser import PREDICTIONS, TARGETS, Denoiser, Prediction
from libs.distillation.conversion import Conversion, amplification
from libs.errors import UserError
from libs.schedule import make_schedule
from libs.training.batches import Batch
from libs.training.objective import diffusion_loss, training_times

SCHEDULE = make_schedule("vp_linear")


class Perfect:
    """A network that outputs the best `prediction` for data N(0, 0.25), plus `error`."""

    def __init__(self, prediction: str, error: float = 0.0):
        self.prediction, self.error = prediction, error

    def __call__(self, x_t, timesteps):
        t = timesteps.double() / 999
        alpha, sigma = (c[:, None, None, None] for c in (SCHEDULE.alpha(t), SCHEDULE.sigma(t)))
        total = alpha**2 / 4 + sigma**2
        exact = Prediction(alpha / 4 * x_t / total, sigma * x_t / total)
        return TARGETS[self.prediction](*exact, alpha, sigma) + self.error


def denoiser(prediction: str, error: float = 0.0) -> Denoiser:
    return Denoiser(Perfect(prediction, error), SCHEDULE, prediction)


def batch(images: int = 64) -> Batch:
    x_0 = 0.5 * torch.randn(images, 3, 4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    return Batch(x_0, None, torch.arange(images), seed=1, step=0)


@pytest.mark.parametrize("prediction", ["eps", "x_0", "v", "flow"])
def test_amplification_is_what_happens_to_an_error(prediction):
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    alpha, sigma = SCHEDULE.alpha(t), SCHEDULE.sigma(t)
    x_t, out = torch.tensor([0.3, -1.0, 2.0]).double(), torch.tensor([0.2, 0.7, -0.4]).double()

    def v(out):
        return TARGETS["v"](*PREDICTIONS[prediction](x_t, out, alpha, sigma), alpha, sigma)

    moved = (v(out + 1e-3) - v(out)).abs() / 1e-3
    torch.testing.assert_close(amplification(prediction, alpha, sigma), moved, rtol=1e-8, atol=1e-8)


def test_from_eps_to_v_errors_grow_as_alpha_falls():
    t = torch.tensor([1.0], dtype=torch.float64)
    assert 140 < amplification("eps", SCHEDULE.alpha(t), SCHEDULE.sigma(t)).item() < 160


def test_a_perfect_student_has_no_loss_where_the_model_is_trusted():
    """The data's own noise, which is in the diffusion loss at every time, is not in this target."""
    student, data = denoiser("v"), batch()
    loss = Conversion(denoiser("eps"), trust=10.0)(student, data)
    t = training_times(student, data)
    trusted = 1 / SCHEDULE.alpha(t) <= 10
    assert 0 < trusted.sum() < len(t)
    assert loss[trusted].max() < 1e-10
    torch.testing.assert_close(loss[~trusted], diffusion_loss(student, data)[~trusted])
    assert diffusion_loss(student, data)[trusted].min() > 0.01


def test_a_models_error_reaches_the_student_amplified_and_no_further_than_trusted():
    student, data = denoiser("v"), batch()
    loss = Conversion(denoiser("eps", error=1e-3), trust=10.0)(student, data)
    factor = 1 / SCHEDULE.alpha(training_times(student, data))
    trusted = factor <= 10
    torch.testing.assert_close(loss[trusted].double(), (1e-3 * factor[trusted]) ** 2, rtol=1e-3, atol=1e-9)
    assert loss[trusted].max() <= 1e-4


def test_without_trust_it_is_the_diffusion_loss():
    student, data = denoiser("v", error=0.1), batch()
    loss = Conversion(denoiser("eps", error=0.3), trust=0.0)(student, data)
    torch.testing.assert_close(loss, diffusion_loss(student, data))


def test_the_model_gets_no_gradient():
    class Learns(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones((), dtype=torch.float64))

        def forward(self, x_t, timesteps):
            return self.scale * x_t

    model, student = (Denoiser(Learns(), SCHEDULE, prediction) for prediction in ("eps", "v"))
    Conversion(model, trust=100.0)(student, batch()).sum().backward()
    assert model.net.scale.grad is None
    assert student.net.scale.grad.abs() > 0


def test_trust_below_zero_is_refused():
    for trust in (-1.0, float("nan")):
        with pytest.raises(UserError, match=rf"--config.distill.convert_trust={trust} must be at least 0"):
            Conversion(denoiser("eps"), trust)



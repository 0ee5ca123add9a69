"""Schedules against their definitions, their inverses, finite differences, and diffusers' tables."""

import math

import pytest
import torch

from libs.errors import UserError
from libs.schedule import SCHEDULES, VPLinear, make_schedule, time_grid

T = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
VARIANCE_PRESERVING = [name for name in SCHEDULES if name != "flow_matching"]


@pytest.mark.parametrize("name", SCHEDULES)
def test_lambda_inverts_and_falls(name):
    schedule = make_schedule(name)
    lam = schedule.lambda_(T)
    assert (lam.diff() < 0).all()
    assert torch.allclose(schedule.t_of_lambda(lam), T, atol=1e-9)
    assert torch.allclose(lam, torch.log(schedule.alpha(T) / schedule.sigma(T)), atol=1e-9)
    assert torch.allclose(schedule.logsnr(T), 2 * lam)


@pytest.mark.parametrize("name", VARIANCE_PRESERVING)
def test_variance_preserving(name):
    schedule = make_schedule(name)
    assert torch.allclose(schedule.alpha(T) ** 2 + schedule.sigma(T) ** 2, torch.ones_like(T), atol=1e-12)


@pytest.mark.parametrize("name", SCHEDULES)
def test_drift_and_diffusion_are_the_derivatives(name):
    """f = d log alpha / dt, g^2 = d sigma^2 / dt - 2 f sigma^2, at points between a discrete schedule's steps."""
    schedule, t, d = make_schedule(name), T[:-1] + 0.01737, 1e-6
    f = (schedule.log_alpha(t + d) - schedule.log_alpha(t - d)) / (2 * d)
    g2 = (schedule.sigma(t + d) ** 2 - schedule.sigma(t - d) ** 2) / (2 * d) - 2 * f * schedule.sigma(t) ** 2
    assert torch.allclose(schedule.drift(t), f, rtol=1e-5)
    assert torch.allclose(schedule.diffusion2(t), g2, rtol=1e-5)


def test_vp_linear_definition():
    beta = 0.1 + 19.9 * torch.linspace(0, 0.7, 100_001, dtype=torch.float64)
    integral = torch.trapezoid(beta, dx=0.7 / 100_000)
    assert math.isclose(float(VPLinear().alpha(torch.tensor(0.7))) ** 2, math.exp(-integral), rel_tol=1e-6)


def test_cosine_definition():
    """alpha = cos(pi t / 2) but for the truncation of log SNR at 20, and exactly +-20 at the ends."""
    cosine = make_schedule("cosine")
    assert torch.allclose(cosine.alpha(T), torch.cos(math.pi / 2 * T), atol=1e-4)
    ends = cosine.logsnr(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert torch.allclose(ends, torch.tensor([20.0, -20.0], dtype=torch.float64))


@pytest.mark.parametrize(("name", "theirs"), [
    ("ddpm_linear", {"beta_schedule": "linear"}),
    ("scaled_linear", {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}),
    ("squared_cosine", {"beta_schedule": "squaredcos_cap_v2"}),
])
def test_discrete_tables_equal_diffusers(name, theirs):
    from diffusers import DDPMScheduler

    schedule = make_schedule(name, steps=1000)
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    alphas_cumprod = DDPMScheduler(num_train_timesteps=1000, **theirs).alphas_cumprod.double()
    assert torch.allclose(schedule.alpha(t) ** 2, alphas_cumprod, rtol=2e-4, atol=1e-9)
    assert schedule.alpha(torch.tensor(0.0)) == 1


def test_one_small_schedule_by_hand():
    schedule = make_schedule("ddpm_linear", steps=2, beta_start=0.1, beta_end=0.3)
    alpha = schedule.alpha(torch.tensor([0.0, 0.5, 1.0, 0.25]))
    expect = [1, 0.9**0.5, (0.9 * 0.7) ** 0.5, 0.9**0.25]
    assert torch.allclose(alpha, torch.tensor(expect, dtype=torch.float64))


def test_grids():
    vp, discrete = VPLinear(), make_schedule("squared_cosine", steps=1024)
    assert torch.allclose(time_grid("uniform", 4, vp), torch.tensor([1, 0.75, 0.5, 0.25, 0]).double())
    lam = vp.lambda_(time_grid("logsnr", 6, vp, t_end=1e-3))
    assert torch.allclose(lam.diff(), lam.diff()[0].expand(6))
    orders = vp.lambda_(time_grid("logsnr", 5, vp, t_end=1e-3, orders=[3, 2])).diff()
    assert torch.allclose(orders[:3].sum(), orders[3:].sum())  # equal intervals, each cut evenly
    assert torch.allclose(orders, torch.stack([orders[0]] * 3 + [orders[3]] * 2))
    trailing = time_grid("trailing", 8, discrete) * 1024
    assert torch.equal(trailing, torch.arange(8, -1, -1).double() * 128)
    uneven = time_grid("trailing", 50, discrete) * 1024
    assert torch.equal(uneven, uneven.round())
    assert (uneven.diff() < 0).all()
    assert torch.equal(time_grid("trailing", 7, vp), time_grid("uniform", 7, vp))  # there are no steps of its own


@pytest.mark.parametrize(("call", "message"), [
    (lambda: make_schedule("linear"), "schedule.name='linear' is unknown; choose from vp_linear"),
    (lambda: make_schedule("vp_linear", steps=5), "schedule.steps=5: vp_linear has no such field; it has beta_min"),
    (lambda: time_grid("quadratic", 5, VPLinear()), "sampler.grid='quadratic' is unknown"),
    (lambda: time_grid("uniform", 0, VPLinear()), "sampler.steps=0 must be at least 1"),
    (lambda: time_grid("uniform", 5, VPLinear(), 0.5, 0.6), "need 0 <= t_end < t_start <= 1"),
    (lambda: time_grid("logsnr", 5, VPLinear()), "the grid logsnr needs t_end > 0"),
    (lambda: time_grid("trailing", 5, make_schedule("ddpm_linear", steps=4)), "the schedule has 4 steps"),
])
def test_bad_input(call, message):
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        call()

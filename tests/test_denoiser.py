"""Conversions among eps, x_0, v and flow; units of time; guidance; thresholding; the loss."""

import math

import pytest
import torch

from libs.denoiser import PREDICTIONS, TARGETS, Denoiser, guided, thresholded
from libs.errors import UserError
from libs.schedule import make_schedule

CASES = [(name, prediction) for name in ("vp_linear", "squared_cosine", "flow_matching") for prediction in TARGETS]


def double(x, timesteps, y=None, context=None):
    return 2 * x


@pytest.mark.parametrize(("name", "prediction"), CASES)
def test_the_target_of_a_perfect_network_converts_back(name, prediction):
    schedule = make_schedule(name)
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    for t in (torch.tensor(0.3).double(), torch.tensor([0.1, 0.6, 0.9]).double()):
        denoiser = Denoiser(None, schedule, prediction, "1000t")
        alpha, sigma = denoiser.alpha_sigma(t, x_0)
        denoiser.net = lambda x, timesteps, a=alpha, s=sigma: TARGETS[prediction](x_0, eps, a, s)
        x_t = denoiser.diffuse(x_0, eps, t)
        assert torch.allclose(x_t, alpha * x_0 + sigma * eps)
        got = denoiser(x_t, t)
        assert torch.allclose(got.x_0, x_0, atol=1e-9)
        assert torch.allclose(got.eps, eps, atol=1e-9)
        assert torch.equal(denoiser.loss(x_0, eps, t), torch.zeros(3))


def test_v_loss_is_snr_plus_one_weighting():
    """||v - v'||^2 = (SNR + 1) ||x_0 - x_0'||^2 (2202.00512, section 4)."""
    schedule, t = make_schedule("cosine"), torch.tensor([0.2, 0.7]).double()
    denoiser = Denoiser(double, schedule, "v", "1000t")
    x_0, eps = torch.randn(2, 2, 1, 4, 4, dtype=torch.float64)
    x_0_hat = denoiser(denoiser.diffuse(x_0, eps, t), t).x_0
    expect = (schedule.logsnr(t).exp() + 1) * (x_0_hat - x_0).square().flatten(1).mean(1)
    assert torch.allclose(denoiser.loss(x_0, eps, t).double(), expect, rtol=1e-5)


def test_damped_eps_is_eps_where_something_shows_and_never_amplifies_beyond_its_bound():
    """On U-ViT's schedule, where eps multiplies its errors by 150 at t = 1."""
    schedule = make_schedule("vp_linear")
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    x_t, out = torch.randn(2, 101, dtype=torch.float64)
    for prediction, bound in (("eps", 160), ("eps_damped", 0.53 / 0.025)):
        x_0 = PREDICTIONS[prediction](x_t, out, alpha, sigma).x_0
        moved = (PREDICTIONS[prediction](x_t, out + 1, alpha, sigma).x_0 - x_0).abs()
        assert bound * 0.9 < moved.max() < bound
    plain, damped = (PREDICTIONS[prediction](x_t, out, alpha, sigma) for prediction in ("eps", "eps_damped"))
    believed = damped.x_0 / plain.x_0
    assert believed[:61].min() > 0.99
    assert believed.diff().max() <= 1e-12, "the more noise, the less is believed"
    assert believed[-1] < 0.03
    torch.testing.assert_close(alpha * damped.x_0 + sigma * damped.eps, x_t)
    assert damped.eps[0].isfinite(), "sigma is 0"


def test_eps_to_x_0_is_eps_at_low_noise_and_x_0_at_high():
    """On U-ViT's schedule: half way at TURNING, and no error is multiplied by more than 2.2 on the way, by eps 150."""
    schedule = make_schedule("vp_linear")
    x_0, eps, out = torch.randn(3, 101, dtype=torch.float64)
    t = torch.linspace(0, 1, 101, dtype=torch.float64)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    said = TARGETS["eps_to_x_0"](x_0, eps, alpha, sigma)
    low, high = t < 0.3, t > 0.85
    torch.testing.assert_close(said[low], eps[low], atol=0.03 * float(x_0.abs().max()), rtol=0.001)
    torch.testing.assert_close(said[high], -x_0[high], atol=0.05 * float(eps.abs().max()), rtol=0.001)
    half = torch.tensor(8 / math.sqrt(65), dtype=torch.float64)
    assert TARGETS["eps_to_x_0"](1, 0, (1 - half**2).sqrt(), half) == pytest.approx(-math.sqrt(0.5))
    x_t = alpha * x_0 + sigma * eps
    moved = PREDICTIONS["eps_to_x_0"](x_t, said + 1, alpha, sigma).x_0 - x_0
    assert 2.1 < moved.abs().max() < 2.2
    said = PREDICTIONS["eps_to_x_0"](x_t, out, alpha, sigma)
    torch.testing.assert_close(alpha * said.x_0 + sigma * said.eps, x_t)


@pytest.mark.parametrize("prediction", ["eps_damped", "eps_to_x_0"])
def test_errors_of_eps_count_as_those_of_v(prediction):
    schedule, t = make_schedule("vp_linear"), torch.tensor([0.2, 0.7, 1.0]).double()
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    ours, v = (Denoiser(double, schedule, name) for name in (prediction, "v"))
    said = ours(ours.diffuse(x_0, eps, t), t)
    v.net = lambda x, timesteps: v.target(*said, t)
    torch.testing.assert_close(ours.loss(x_0, eps, t), v.loss(x_0, eps, t), rtol=1e-5, atol=0)
    assert v.scaled(eps, t) is eps


def test_time_inputs():
    seen = []

    def net(x, timesteps):
        seen.append(timesteps)
        return x

    x = torch.zeros(2, 1, 2, 2)
    discrete, cosine = make_schedule("squared_cosine", steps=1024), make_schedule("cosine")
    for schedule, unit, t, expect in [
        (discrete, "index", 1.0, 1023), (discrete, "index", 1 / 1024, 0), (discrete, "step", 0.5, 512),
        (discrete, "999t", 0.5, 499.5), (discrete, "1000t", 0.5, 500), (cosine, "logsnr", 0.5, 500),
    ]:
        Denoiser(net, schedule, "eps", unit).output(x, torch.tensor(t, dtype=torch.float64))
        assert seen[-1].dtype == torch.float32
        assert torch.allclose(seen[-1], torch.full((2,), float(expect)))
    Denoiser(net, discrete, "eps", "step").output(x, torch.tensor([0.25, 1.0], dtype=torch.float64))
    assert torch.equal(seen[-1], torch.tensor([256.0, 1024.0]))
    with pytest.raises(UserError, match="denoiser.time_input='t' is unknown"):
        Denoiser(net, discrete, "eps", "t")
    with pytest.raises(UserError, match="denoiser.prediction='epsilon' is unknown; choose from eps, x_0, v, flow"):
        Denoiser(net, discrete, "epsilon")
    assert set(TARGETS) == set(PREDICTIONS)


def test_guidance_is_one_call_of_both_rows():
    calls = []

    def net(x, timesteps, y):
        calls.append(y)
        return x * y.view(-1, 1, 1, 1)

    denoiser = Denoiser(net, make_schedule("vp_linear"), "eps", "999t")
    x, y, t = torch.randn(2, 1, 2, 2), torch.tensor([1, 2]), torch.tensor(0.5).double()
    out = guided(denoiser, 3.0, {"y": torch.tensor([0, 0])})(x, t, {"y": y})
    assert [call.tolist() for call in calls] == [[1, 2, 0, 0]]
    assert torch.allclose(out.eps, 3 * x * y.view(-1, 1, 1, 1))  # uncond 0 + 3 (cond - 0)
    alpha, sigma = denoiser.alpha_sigma(t, x)
    assert torch.allclose(alpha * out.x_0 + sigma * out.eps, x, atol=1e-4)
    per_row = guided(denoiser, 3.0, {"y": torch.tensor([0, 0])})(x, torch.tensor([0.5, 0.5]).double(), {"y": y})
    assert torch.allclose(per_row.eps, out.eps)


def test_thresholds():
    schedule, t = make_schedule("vp_linear"), torch.tensor(0.5).double()
    x_0 = torch.tensor([[0.5, -3.0, 0.2, 4.0], [0.1, 0.2, -0.3, 0.4]]).view(2, 1, 2, 2)
    eps = torch.randn_like(x_0)
    denoiser = Denoiser(lambda x, timesteps: eps, schedule, "eps", "999t")
    x_t = denoiser.diffuse(x_0, eps, t)
    static = thresholded(denoiser, schedule, "static", 1.0)(x_t, t)
    assert torch.allclose(static.x_0, x_0.clamp(-1, 1), atol=1e-4)
    dynamic = thresholded(denoiser, schedule, "dynamic", 0.5)(x_t, t)
    s = torch.quantile(torch.tensor([0.5, 3.0, 0.2, 4.0]), 0.5)
    assert torch.allclose(dynamic.x_0[0], x_0[0].clamp(-s, s) / s, atol=1e-4)
    assert torch.allclose(dynamic.x_0[1], x_0[1], atol=1e-4)  # s is at least 1
    for out in (static, dynamic):  # the pair stays consistent with x_t
        alpha, sigma = denoiser.alpha_sigma(t, x_t)
        assert torch.allclose(alpha * out.x_0 + sigma * out.eps, x_t, atol=1e-5)
    with pytest.raises(UserError, match="sampler.threshold='hard' is unknown; choose from static, dynamic"):
        thresholded(denoiser, schedule, "hard", 1.0)


def test_autocast_runs_the_network_alone_in_low_precision():
    linear = torch.nn.Linear(4, 4)
    seen = []

    def net(x, timesteps):
        out = linear(x)
        seen.append(out.dtype)
        return out

    autocast = lambda: torch.autocast("cpu", dtype=torch.bfloat16)  # noqa: E731
    out = Denoiser(net, make_schedule("vp_linear"), "eps", "999t", autocast)(torch.randn(2, 4), torch.tensor(0.5))
    assert seen == [torch.bfloat16]
    assert out.eps.dtype == out.x_0.dtype == torch.float32
    assert math.isfinite(float(out.x_0.detach().sum()))

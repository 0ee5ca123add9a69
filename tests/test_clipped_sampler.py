"""DDIM with x_0 and eps clipped: the formula again, its limit, and the chain that ends inside the bounds."""

import math

import pytest
import torch

from libs import config as config_files
from libs.build import describe, make_chain
from libs.checkpoint import build_backbone
from libs.denoiser import Prediction, rows
from libs.samplers import make_sampler
from libs.samplers.ddim import clipped, ddim
from libs.schedule import make_schedule, time_grid

GRIDS = [("squared_cosine", {"steps": 1024}, "trailing"), ("vp_linear", {}, "uniform"), ("cosine", {}, "uniform")]


def network(schedule, dtype):
    """A smooth prediction whose x_0 and eps leave +-1.2 now and then."""
    def denoise(x_t, t):
        x_t = x_t.to(dtype)
        v = 2 * torch.sin(2 * x_t + float(t.mean()))
        alpha, sigma = rows(schedule.alpha(t), x_t), rows(schedule.sigma(t), x_t)
        return Prediction(alpha * x_t - sigma * v, sigma * x_t + alpha * v)

    return denoise


@pytest.mark.parametrize("eta", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("value", [0.5, 1.2])
@pytest.mark.parametrize(("name", "options", "grid"), GRIDS)
def test_equals_the_formula(name, options, grid, value, eta):
    """Clip x_0, eps follows from x_t, clip eps; then equations 12 and 16 of 2010.02502 (its alphas are our squares)."""
    schedule = make_schedule(name, **options)
    ts, denoise = time_grid(grid, 8, schedule), network(schedule, torch.float64)
    x_T, z = torch.randn(2, 3, 5, dtype=torch.float64), torch.randn(8, 2, 3, 5, dtype=torch.float64)
    x, moved = x_T, 0
    for i in range(8):
        a, a_next = schedule.alpha(ts[i]) ** 2, schedule.alpha(ts[i + 1]) ** 2 if ts[i + 1] else torch.tensor(1.0)
        free = denoise(x, ts[i])
        x_0 = free.x_0.clamp(-value, value)
        eps = ((x - a.sqrt() * x_0) / (1 - a).sqrt()).clamp(-value, value)
        moved += ((eps - free.eps.clamp(-value, value)).abs() > 0.01).sum()
        std = eta * ((1 - a_next) / (1 - a) * (1 - a / a_next)).sqrt()
        x = a_next.sqrt() * x_0 + (1 - a_next - std**2).clamp(min=0).sqrt() * eps + std * z[i]
    out = clipped(denoise, x_T, ts, schedule, noise=lambda k: z[k], clipping_value=value, eta=eta)
    torch.testing.assert_close(out, x, rtol=1e-9, atol=1e-9)
    assert moved > 0  # it matters that eps follows x_0 before it is clipped
    plain = ddim(denoise, x_T, ts, schedule, noise=lambda k: z[k], eta=eta)
    assert not torch.allclose(out, plain, atol=1e-2)


@pytest.mark.parametrize("eta", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("name", "options", "grid"), GRIDS)
def test_bit_equal_to_ddim_where_nothing_is_clipped(name, options, grid, dtype, eta):
    schedule = make_schedule(name, **options)
    ts, denoise = time_grid(grid, 16, schedule), network(schedule, dtype)
    x_T, z = torch.randn(2, 3, 5, dtype=dtype), torch.randn(16, 2, 3, 5, dtype=dtype)
    plain = ddim(denoise, x_T, ts, schedule, noise=lambda k: z[k], eta=eta)
    for value in (math.inf, 100.0):
        out = clipped(denoise, x_T, ts, schedule, noise=lambda k: z[k], clipping_value=value, eta=eta)
        assert torch.equal(out, plain)


def test_the_chain_takes_its_options_and_ends_on_the_clipped_x_0():
    config = config_files.load("configs/digits_uvit.py").unlock()
    config.backbone.update(embed_dim=24, depth=2)
    config.compute.rows = 4
    config.sampler.update(name="clipped", clipping_value=0.3, threshold="none", steps=4)
    net = build_backbone(config.backbone).eval()

    def x_0(**fields):
        config.sampler.update(fields)
        return make_chain(config, net, describe(config), torch.device("cpu")).sample([0, 1, 2], [0, 1, 2])

    low, high = x_0(), x_0(clipping_value=0.4)
    assert low.abs().max() == torch.tensor(0.3)  # at the bound, to the last bit
    assert high.abs().max() == torch.tensor(0.4)
    assert not torch.equal(x_0(eta=1.0), high)
    assert torch.equal(x_0(clipping_value=math.inf, eta=0.0), x_0(name="ddim"))


def test_the_default_is_1_2():
    schedule = make_schedule("squared_cosine", steps=64)
    ts, x_T = time_grid("trailing", 8, schedule), torch.randn(50)
    outs = [make_sampler("clipped", **options)(network(schedule, torch.float32), x_T, ts, schedule)
            for options in ({}, {"clipping_value": 1.2}, {"clipping_value": 1.1})]
    assert torch.equal(outs[0], outs[1])
    assert not torch.equal(outs[0], outs[2])

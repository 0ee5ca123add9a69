"""Sampling of students that jump onto data, and the times at which they learnt to."""

import pytest
import torch

from libs.denoiser import Denoiser, Prediction, rows
from libs.distillation.flash import student_sampler
from libs.distillation.flash_stages import start_probabilities
from libs.distillation.progressive import grid_of
from libs.samplers import make_sampler
from libs.schedule import make_schedule, time_grid

MEAN, STD = 0.3, 0.5
SCHEDULES = [{"name": "scaled_linear"}, {"name": "vp_linear"}, {"name": "cosine"}, {"name": "flow_matching"}]


def jump(schedule):
    """The ODE's solution for data from N(MEAN, STD^2): where it carries x from t to clean data."""
    def denoise(x, t):
        alpha, sigma = rows(schedule.alpha(t), x), rows(schedule.sigma(t), x)
        x_0 = MEAN + STD * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2).sqrt()
        return Prediction(x_0, (x - alpha * x_0) / sigma)

    return denoise


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: options["name"])
@pytest.mark.parametrize("steps", [1, 2, 4])
def test_a_perfect_student_draws_the_data(options, steps):
    schedule, b = make_schedule(**options), 20_000
    generator = torch.Generator().manual_seed(0)
    draw = lambda k=0: torch.randn(b, generator=generator, dtype=torch.float64)  # noqa: E731
    fields = student_sampler(steps, schedule)
    ts = time_grid(fields["grid"], fields["steps"], schedule, fields["t_start"], fields["t_end"])
    out = make_sampler(fields["name"])(jump(schedule), draw(), ts, schedule, noise=draw)
    # pure noise stands for x at t = 1, which on scaled_linear keeps 0.068 of the data
    assert abs(out.mean() - MEAN) < 0.06
    assert abs(out.std() - STD) < 0.02


def test_new_noise_at_every_step_and_none_at_the_last():
    schedule = make_schedule("flow_matching")
    ts = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=torch.float64)
    x, z = torch.randn(2, 3, dtype=torch.float64), torch.randn(3, 2, 3, dtype=torch.float64)
    calls, asked = [], []

    def denoise(x_t, t):
        calls.append(float(t))
        return Prediction(2 * x_t + t, None)

    def noise(k):
        asked.append(k)
        return z[k]

    out = make_sampler("lcm")(denoise, x, ts, schedule, noise=noise)
    x = 0.25 * (2 * x + 1) + 0.75 * z[0]
    x = 0.5 * (2 * x + 0.75) + 0.5 * z[1]
    torch.testing.assert_close(out, 2 * x + 0.5)
    assert calls == [1, 0.75, 0.5]
    assert asked == [0, 1]


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: options["name"])
@pytest.mark.parametrize("steps", [16, 32, 64])
def test_trained_and_sampled_times_coincide(options, steps):
    schedule = make_schedule(**options)
    taught = time_grid(grid_of(schedule), steps, schedule)
    modes = [int(start_probabilities(steps, [float(each == m) for each in range(4)], 0.5).argmax()) for m in range(4)]
    fields = student_sampler(4, schedule)
    ts = time_grid(fields["grid"], 4, schedule, fields["t_start"], fields["t_end"])
    assert torch.equal(taught[modes], ts[:-1])


def test_a_discrete_student_is_called_at_its_modes():
    schedule, seen = make_schedule("scaled_linear"), []

    def net(x, timesteps):
        seen.append(float(timesteps[0]))
        return x

    for steps, wanted in ((4, [999, 749, 499, 249]), (2, [999, 499]), (1, [999])):
        seen.clear()
        ts = time_grid("trailing", steps, schedule)
        make_sampler(**student_sampler(steps, schedule))(Denoiser(net, schedule, "eps", "index"), torch.randn(2, 1),
                                                         ts, schedule, noise=lambda k: torch.randn(2, 1))
        assert seen == wanted

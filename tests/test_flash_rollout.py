"""The teacher's solutions from every image's own start: equal to running the samplers image by image."""

from functools import partial

import pytest
import torch

from libs.backbones import UNet2D
from libs.denoiser import Denoiser, Prediction, guided, rows
from libs.distillation.flash_rollout import SOLVER_ORDERS, Teacher, cached, teacher_rollout
from libs.distillation.progressive import grid_of
from libs.samplers import make_sampler
from libs.schedule import make_schedule, time_grid

SCHEDULES = [{"name": "scaled_linear"}, {"name": "squared_cosine"}, {"name": "vp_linear"}, {"name": "flow_matching"}]
MEAN, STD = 0.3, 0.5


def gaussian(schedule, called=None):
    """The exact denoiser of data from N(y MEAN, STD^2), y the label; `called` takes the number of rows of each call."""
    def denoise(x, t, cond=None):
        if called is not None:
            called.append((float(t), len(x)))
        mean = MEAN if cond is None else MEAN * cond["y"].double()[:, None]
        alpha, sigma = rows(schedule.alpha(t), x), rows(schedule.sigma(t), x)
        x_0 = mean + alpha * STD**2 * (x - alpha * mean) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(x_0, (x - alpha * x_0) / sigma)

    return denoise


def alone(denoise, x, start, ts, schedule, solver):
    """One row by the sampler itself, from its own step on."""
    return make_sampler(solver, order=2)(denoise, x[None], ts[start:], schedule)[0]


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: options["name"])
@pytest.mark.parametrize("solver", SOLVER_ORDERS)
@pytest.mark.parametrize("starts", [[3, 0, 31, 8, 8, 24, 16, 0, 30], [9] * 9, list(range(9))])
def test_equals_the_sampler_image_by_image(options, solver, starts):
    schedule = make_schedule(**options)
    ts = time_grid(grid_of(schedule), 32, schedule)
    x, calls = torch.randn(9, 5, dtype=torch.float64), []
    given = x.clone()
    y = teacher_rollout(Teacher(gaussian(schedule, calls), None), x, torch.tensor(starts), ts, schedule,
                        SOLVER_ORDERS[solver])
    for row, start in enumerate(starts):
        expected = alone(gaussian(schedule), x[row], start, ts, schedule, solver)
        torch.testing.assert_close(y[row], expected, atol=1e-10, rtol=0)
    assert torch.equal(x, given)
    # every row is called from its start on, and no row more
    steps = range(min(starts), 32)
    assert calls == [(float(ts[i]), sum(start <= i for start in starts)) for i in steps]
    assert sum(count for _, count in calls) == sum(32 - start for start in starts)


def test_the_last_step_is_of_first_order_where_log_snr_ends():
    schedule = make_schedule("cosine")  # finite at t = 0, so that the sampler by itself would extrapolate
    ts, x = time_grid("uniform", 32, schedule), torch.randn(1, 5, dtype=torch.float64)
    y = teacher_rollout(Teacher(gaussian(schedule), None), x, torch.tensor([4]), ts, schedule)
    last = make_sampler("dpm_solver_pp", order=2)(gaussian(schedule), x, ts[4:-1], schedule)
    torch.testing.assert_close(y, make_sampler("ddim")(gaussian(schedule), last, ts[-2:], schedule), atol=1e-10, rtol=0)


@pytest.mark.parametrize("solver", SOLVER_ORDERS)
def test_guided_rows_by_their_own_scale_in_one_call(solver):
    schedule, calls = make_schedule("scaled_linear"), []
    ts = time_grid("trailing", 16, schedule)
    starts, x = torch.tensor([12, 0, 5, 5]), torch.randn(4, 3, dtype=torch.float64)
    y, w = torch.tensor([2, -1, 3, 4]), torch.tensor([3.0, 13.0, 1.0, 7.5], dtype=torch.float64)
    teacher = Teacher(gaussian(schedule, calls), {"y": y}, {"y": torch.zeros_like(y)}, w)
    out = teacher_rollout(teacher, x, starts, ts, schedule, SOLVER_ORDERS[solver])
    for row in range(4):
        own = guided(gaussian(schedule), float(w[row]), {"y": torch.zeros(1, dtype=torch.int64)})
        one = alone(lambda x_t, t, row=row, own=own: own(x_t, t, {"y": y[row:row + 1]}), x[row], int(starts[row]), ts,
                    schedule, solver)
        torch.testing.assert_close(out[row], one, atol=1e-10, rtol=0)
    assert [count for _, count in calls] == [2] * 5 + [6] * 7 + [8] * 4


def test_second_order_is_nearer_to_the_odes_solution():
    schedule = make_schedule("cosine")
    std = lambda t: (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt()  # noqa: E731
    ts = time_grid("uniform", 32, schedule)
    starts, x = torch.tensor([0, 4, 8, 12]), torch.ones(4, 1, dtype=torch.float64)
    begin = ts[starts][:, None]
    exact = MEAN + STD / std(begin) * (x - schedule.alpha(begin) * MEAN)
    errors = {order: (teacher_rollout(Teacher(gaussian(schedule), None), x, starts, ts, schedule, order) - exact).abs()
              for order in (1, 2)}
    assert (errors[2] < 0.3 * errors[1]).all()


def tiny_teacher():
    net = UNet2D(sample_size=8, in_channels=3, out_channels=3, block_out_channels=(16, 32, 32), layers_per_block=1,
                 down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"), attention_head_dim=8,
                 up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"), num_class_embeds=11,
                 norm_num_groups=8).eval().requires_grad_(False)
    return Denoiser(net, make_schedule("scaled_linear"), "eps", "index")


def solutions(denoiser, starts, policy=None):
    x, y = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0)), torch.arange(4)
    teacher = Teacher(denoiser, {"y": y}, {"y": torch.full_like(y, 10)}, torch.tensor([2.0, 3.0, 4.0, 5.0]))
    ts = time_grid("trailing", 8, denoiser.schedule)
    rollout = partial(teacher_rollout, teacher, x, torch.tensor(starts), ts, denoiser.schedule)
    if policy is None:
        return rollout()
    with cached(denoiser.net, policy, denoiser.time_input(ts[min(starts):-1]), 2):
        return rollout()


def clockwork(clock):
    return {"name": "clockwork", "clock": clock, "depth": 0, "adaptor": "identity", "protect_first": 0,
            "protect_last": 0, "cut": "auto"}


def test_a_cached_rollout_and_the_network_after_it():
    denoiser = tiny_teacher()
    x, timesteps, y = torch.randn(2, 3, 8, 8), torch.tensor([10.0, 500.0]), torch.tensor([1, 2])
    before = denoiser.net(x, timesteps, y=y)
    plain = solutions(denoiser, [0] * 4)
    fast = solutions(denoiser, [0] * 4, clockwork(4))
    assert 1e-4 < (fast - plain).norm() / plain.norm() < 0.2
    assert torch.equal(solutions(denoiser, [0] * 4, clockwork(1)), plain)
    # steps that rows join have nothing to reuse: with one at each of the first steps, those run in full
    assert torch.equal(solutions(denoiser, [4, 5, 6, 7], clockwork(4)), solutions(denoiser, [4, 5, 6, 7]))
    for policy in (clockwork(4), {"name": "encoder_propagation", "key_steps": "every:2", "parallel": False}):
        assert not torch.equal(solutions(denoiser, [1, 1, 4, 4], policy), solutions(denoiser, [1, 1, 4, 4]))
        assert torch.equal(denoiser.net(x, timesteps, y=y), before)

"""Solvers on data whose denoiser has a closed form: their orders are measured; then diffusers on equal grids."""

import math

import pytest
import torch

from libs.denoiser import Denoiser, Prediction, rows
from libs.errors import UserError
from libs.samplers import SAMPLERS, evaluation_times, grid_orders, make_sampler, state_times
from libs.samplers.after_step import watched
from libs.samplers.ddim import ddim, ddpm
from libs.samplers.dpm_solver import singlestep_orders
from libs.schedule import make_schedule, time_grid

MEAN, STD = 0.3, 0.5


def gaussian(schedule):
    """The exact denoiser of data from N(MEAN, STD^2)."""
    def denoise(x, t):
        alpha, sigma = rows(schedule.alpha(t), x), rows(schedule.sigma(t), x)
        x_0 = MEAN + alpha * STD**2 * (x - alpha * MEAN) / (alpha**2 * STD**2 + sigma**2)
        return Prediction(x_0, (x - alpha * x_0) / sigma)

    return denoise


def exact_flow(schedule, x, s, t):
    """Where the probability-flow ODE carries x from time s to time t."""
    std = lambda t: (schedule.alpha(t) ** 2 * STD**2 + schedule.sigma(t) ** 2).sqrt()  # noqa: E731
    return schedule.alpha(t) * MEAN + std(t) / std(s) * (x - schedule.alpha(s) * MEAN)


SINGLESTEP = ("dpm_solver", "dpm_solver_pp_singlestep")
# sampler, its options, the order of its global error
ORDERS = [
    ("ddim", {}, 1), ("euler_ode", {}, 1), ("dpm_solver", {"order": 1}, 1), ("dpm_solver", {"order": 2}, 2),
    ("dpm_solver", {"order": 3}, 3), ("dpm_solver_pp_singlestep", {"order": 1}, 1),
    ("dpm_solver_pp_singlestep", {"order": 2}, 2), ("dpm_solver_pp_singlestep", {"order": 3}, 3),
    ("dpm_solver_pp", {"order": 1}, 1), ("dpm_solver_pp", {"order": 2}, 2),
    ("dpm_solver_pp", {"order": 3}, 2), ("dpm_solver_pp", {"order": 3, "exact_third": True}, 3),
]


@pytest.mark.parametrize("name", ["vp_linear", "cosine", "flow_matching"])
@pytest.mark.parametrize(("sampler", "options", "expect"), ORDERS)
def test_order_of_convergence(name, sampler, options, expect):
    """Halving the size of the steps divides the error by 2^order."""
    schedule = make_schedule(name)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)
    errors = []
    for steps in (96, 192):
        options = dict(options)
        if sampler in SINGLESTEP:
            options["orders"] = [options["order"]] * (steps // options["order"])  # no lower-order tail
        ts = time_grid("logsnr", steps, schedule, 0.9, 0.05, options.get("orders"))
        if sampler == "dpm_solver_pp":
            # The first steps have a lower order; short ones keep their error out of the measurement.
            lam = schedule.lambda_(ts[:2])
            start = lam[0] + torch.tensor([0.25, 0.5, 0.75]).double() * (lam[1] - lam[0]) ** 2 / 4
            ts = torch.cat([ts[:1], schedule.t_of_lambda(start), ts[1:]])
        out = SAMPLERS[sampler](gaussian(schedule), x, ts, schedule, **options)
        errors.append((out - exact_flow(schedule, x, ts[0], ts[-1])).abs().max().item())
    assert errors[1] < 0.02
    assert abs(math.log2(errors[0] / errors[1]) - expect) < 0.25, errors


@pytest.mark.parametrize("sampler", [name for name in SAMPLERS if name != "lcm"])  # lcm is for students: test_lcm.py
def test_onto_clean_data_with_the_right_moments(sampler):
    """From N(0, 1) at t = 1 to t = 0: mean and spread of the data come out."""
    schedule, b = make_schedule("vp_linear"), 20_000
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(b, generator=generator, dtype=torch.float64)
    ts = time_grid("uniform", 200, schedule)
    noise = lambda k: torch.randn(b, generator=generator, dtype=torch.float64)  # noqa: E731
    out = make_sampler(sampler, order=2, clipping_value=math.inf)(gaussian(schedule), x, ts, schedule, noise=noise)
    assert abs(out.mean() - MEAN) < 0.02
    assert abs(out.std() - STD) < 0.02


@pytest.mark.parametrize("name", ["ddim", "ddpm", "clipped", "dpm_solver_pp", "lcm"])
@pytest.mark.parametrize("schedule", ["vp_linear", "cosine"])
def test_the_last_step_returns_x_0(schedule, name):
    """Of a schedule whose log SNR is truncated too, and whatever eps is."""
    schedule = make_schedule(schedule)
    ts = torch.tensor([0.5, 0.0], dtype=torch.float64)
    x_0 = torch.linspace(-1, 1, 5, dtype=torch.float64)
    out = make_sampler(name)(lambda x_t, t: Prediction(x_0, x_0 + 3), x_0 + 1, ts, schedule, noise=lambda k: x_0 + 7)
    assert torch.equal(out, x_0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_evaluation_times_are_the_times_of_the_calls(sampler):
    schedule, seen = make_schedule("vp_linear"), []
    ts = time_grid("uniform", 8, schedule)
    function = make_sampler(sampler, order=3)

    def denoise(x, t):
        seen.append(float(t))
        return gaussian(schedule)(x, t)

    function(denoise, torch.zeros(2, 3), ts, schedule, noise=lambda k: torch.zeros(2, 3))
    assert evaluation_times(function, ts, schedule).tolist() == seen == ts[:-1].tolist()


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_state_times_are_the_times_of_the_states(sampler):
    """Of every sampler the watch sees x_T, all states in between and, as the last one, what is returned."""
    schedule, seen = make_schedule("vp_linear"), []
    ts = time_grid("uniform", 8, schedule)
    function, x = make_sampler(sampler, order=3, eta=0.5), torch.randn(2, 3)
    call = {"schedule": schedule, "noise": lambda k: torch.ones(2, 3)}
    out = watched(function, lambda x_t, t: seen.append((x_t, float(t))))(gaussian(schedule), x, ts, **call)
    assert torch.equal(out, function(gaussian(schedule), x, ts, **call))
    assert torch.equal(seen[0][0], x)
    assert torch.equal(seen[-1][0], out)
    times = state_times(function, ts, schedule).tolist()
    assert times == [t for _, t in seen]
    orders = grid_orders(sampler, 8, 3) or [1] * 8
    assert times == [float(ts[sum(orders[:i])]) for i in range(len(orders) + 1)]


@pytest.mark.parametrize("sampler", ["ddim", "ddpm", "clipped"])
def test_skipping_steps_keeps_the_labels_of_the_base_model(sampler):
    """A base model of 1,024 steps run with 16 of them is called at the noise levels it was trained on, each with its
    own index. (diffusion_distiller's sample.py --time_scale=64 labels these steps 0, 64, ..., 960: 63 too low.)
    """
    schedule, calls = make_schedule("squared_cosine", steps=1024), []

    def net(x, timesteps):
        calls.append((len(timesteps), float(timesteps.unique())))
        return x

    denoiser = Denoiser(net, schedule, prediction="v", time_input="index")
    ts = time_grid("trailing", 16, schedule)
    SAMPLERS[sampler](denoiser, torch.randn(2, 1, 4, 4), ts, schedule, noise=lambda k: torch.randn(2, 1, 4, 4))
    assert calls == [(2, float(n)) for n in range(1023, 0, -64)]
    assert calls[-1] == (2, 63.0)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_grid_a_row_equals_each_row_by_itself(sampler):
    schedule = make_schedule("vp_linear")
    grids = [time_grid("uniform", 8, schedule, 1.0, end) for end in (0.0, 0.0)]
    grids[1] = grids[1] ** 1.5
    x, z = torch.randn(2, 5, dtype=torch.float64), torch.randn(2, 8, 5, dtype=torch.float64)
    function = make_sampler(sampler, order=3, eta=0.5)
    together = function(gaussian(schedule), x, torch.stack(grids, 1), schedule, noise=lambda k: z[:, k])
    for i, ts in enumerate(grids):
        alone = function(gaussian(schedule), x[i], ts, schedule, noise=lambda k, i=i: z[i, k])
        assert torch.allclose(together[i], alone, atol=1e-9)


def test_ddim_at_eta_one_is_ancestral_sampling():
    schedule = make_schedule("squared_cosine", steps=100)
    x, z = torch.randn(3, 4, dtype=torch.float64), torch.randn(20, 3, 4, dtype=torch.float64)
    ts = time_grid("trailing", 20, schedule)
    outs = [f(gaussian(schedule), x, ts, schedule, noise=lambda k: z[k], **option)
            for f, option in ((ddim, {"eta": 1.0}), (ddpm, {"variance": "small"}), (ddpm, {"variance": "large"}))]
    assert torch.allclose(outs[0], outs[1], atol=1e-9)
    assert not torch.allclose(outs[1], outs[2], atol=1e-3)


def test_deterministic_samplers_draw_no_noise():
    schedule = make_schedule("vp_linear")
    ts = time_grid("uniform", 6, schedule)
    for sampler in ("ddim", "euler_ode", "dpm_solver", "dpm_solver_pp", "dpm_solver_pp_singlestep"):
        make_sampler(sampler, order=2)(gaussian(schedule), torch.zeros(2), ts, schedule, noise=None)


def test_singlestep_orders_spend_the_steps():
    for order in (1, 2, 3):
        for steps in range(1, 40):
            orders = singlestep_orders(steps, order)
            assert sum(orders) == steps
            assert max(orders) <= order
    assert singlestep_orders(50, 3) == [3] * 16 + [2]
    assert grid_orders("ddim", 50, 3) is None


def test_make_sampler_refuses():
    with pytest.raises(UserError, match="sampler.name='plms' is unknown; choose from ddim, ddpm"):
        make_sampler("plms")
    with pytest.raises(UserError, match="sampler.order=4 is unknown; choose from 1, 2, 3"):
        make_sampler("dpm_solver", order=4)
    for value in (0.0, -1.2, math.nan):
        with pytest.raises(UserError, match=f"sampler.clipping_value={value} must be above 0"):
            make_sampler("clipped", clipping_value=value)


# --- against diffusers' schedulers on the same grid -------------------------------------------------------

N = 1000


def network(x, n):
    """Some smooth eps prediction at the integer step n."""
    return 0.8 * x + 0.1 * torch.sin(3 * x + n / N)


def ours(sampler, x, timesteps, noise=None, **options):
    """Our sampler through `network`, at diffusers' timesteps and on to clean data (or options["end"])."""
    schedule = make_schedule("ddpm_linear", steps=N)
    end = options.pop("end", 0.0)
    ts = torch.tensor([*((timesteps.double() + 1) / N).tolist(), end], dtype=torch.float64)

    def denoise(x_t, t):
        eps = network(x_t, N * float(t) - 1)
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        return Prediction((x_t - sigma * eps) / alpha, eps)

    return SAMPLERS[sampler](denoise, x, ts, schedule, noise=noise, **options)


def theirs(scheduler, x, **options):
    for n in scheduler.timesteps:
        x = scheduler.step(network(x, int(n)), n, x, **options).prev_sample
    return x


X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(a, b):
    assert (a - b).abs().max() <= 1e-4 * max(1, b.abs().max())


@pytest.mark.parametrize("eta", [0.0, 1.0])
def test_ddim_equals_diffusers(eta):
    from diffusers import DDIMScheduler

    scheduler = DDIMScheduler(N, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(20)
    z = torch.randn(20, *X.shape, dtype=torch.float64)
    x = X
    for k, n in enumerate(scheduler.timesteps):
        x = scheduler.step(network(x, int(n)), n, x, eta=eta, variance_noise=z[k]).prev_sample
    close(ours("ddim", X, scheduler.timesteps, noise=lambda k: z[k], eta=eta), x)


def test_ddpm_equals_diffusers():
    from diffusers import DDPMScheduler

    scheduler = DDPMScheduler(N, timestep_spacing="trailing", clip_sample=False)
    scheduler.set_timesteps(20)
    expect = theirs(scheduler, X, generator=torch.Generator().manual_seed(3))
    generator = torch.Generator().manual_seed(3)
    got = ours("ddpm", X, scheduler.timesteps,
               noise=lambda k: torch.randn(X.shape, generator=generator, dtype=X.dtype))
    close(got, expect)


@pytest.mark.parametrize("order", [1, 2, 3])
@pytest.mark.parametrize("steps", [8, 20])
def test_dpm_solver_pp_multistep_equals_diffusers(order, steps):
    from diffusers import DPMSolverMultistepScheduler

    scheduler = DPMSolverMultistepScheduler(N, solver_order=order, timestep_spacing="trailing")
    scheduler.set_timesteps(steps)
    close(ours("dpm_solver_pp", X, scheduler.timesteps, order=order), theirs(scheduler, X))


@pytest.mark.parametrize("order", [1, 2])  # diffusers' third order has another second stage than the paper's
@pytest.mark.parametrize(("sampler", "algorithm", "final"), [
    ("dpm_solver_pp_singlestep", "dpmsolver++", "zero"),
    ("dpm_solver_pp_singlestep", "dpmsolver++", "sigma_min"),
    ("dpm_solver", "dpmsolver", "sigma_min"),
])
def test_dpm_solver_singlestep_equals_diffusers(sampler, algorithm, final, order):
    from diffusers import DPMSolverSinglestepScheduler

    steps = 15  # the last interval has order 1
    scheduler = DPMSolverSinglestepScheduler(N, solver_order=order, algorithm_type=algorithm,
                                             final_sigmas_type=final, lower_order_final=True)
    scheduler.set_timesteps(steps)
    end = 0.0 if final == "zero" else 1 / N
    assert len(scheduler.timesteps.unique()) == steps
    close(ours(sampler, X, scheduler.timesteps, order=order, end=end), theirs(scheduler, X))

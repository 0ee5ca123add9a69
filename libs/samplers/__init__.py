"""Samplers: plain functions in the papers' symbols.

    sampler(denoise, x_T, ts, schedule, noise=None, after_step=keep, **options) -> x_0

denoise(x_t, t) -> Prediction; x_T (b, ...); ts decreasing times on the host in float64, (steps + 1,) or
(steps + 1, b); noise(k) -> (b, ...) standard normal of step k, for stochastic samplers; after_step(x_t, t) -> x_t
may change the state between steps. A sampler knows nothing of networks, guidance or caches. All make one
evaluation a step, at ts[:-1]; a step onto clean data (t = 0) returns x_0.
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from ..denoiser import Prediction
from ..errors import UserError, choose
from ..schedule import Schedule
from .after_step import watched
from .ddim import clipped, ddim, ddpm
from .dpm_solver import dpm_solver, singlestep_orders
from .dpm_solver_pp import dpm_solver_pp_multistep, dpm_solver_pp_singlestep
from .euler import euler_ode, euler_sde
from .lcm import lcm

SAMPLERS = {
    "ddim": ddim,
    "ddpm": ddpm,
    "clipped": clipped,
    "euler_sde": euler_sde,
    "euler_ode": euler_ode,
    "dpm_solver": dpm_solver,
    "dpm_solver_pp_singlestep": dpm_solver_pp_singlestep,
    "dpm_solver_pp": dpm_solver_pp_multistep,
    "lcm": lcm,
}
SINGLESTEP = ("dpm_solver", "dpm_solver_pp_singlestep")  # their grid follows their orders
OPTIONS = {  # of the config's sampler section: which sampler takes which
    "ddim": ("eta",),
    "ddpm": ("variance",),
    "clipped": ("clipping_value", "eta"),
    "dpm_solver": ("order",),
    "dpm_solver_pp_singlestep": ("order",),
    "dpm_solver_pp": ("order", "lower_order_final", "exact_third"),
}


def make_sampler(name: str, **options) -> Callable:
    """The sampler called `name`, its own options bound; options of other samplers are left out."""
    function = choose("sampler.name", name, SAMPLERS)
    if options.get("order") not in (None, 1, 2, 3):
        raise UserError(f"sampler.order={options['order']} is unknown; choose from 1, 2, 3")
    if not options.get("clipping_value", 1) > 0:
        raise UserError(f"sampler.clipping_value={options['clipping_value']} must be above 0")
    return partial(function, **{key: options[key] for key in OPTIONS.get(name, ()) if key in options})


def grid_orders(name: str, steps: int, order: int) -> list[int] | None:
    """The orders of a singlestep solver's intervals, which its logSNR grid follows; None for the others."""
    return singlestep_orders(steps, order) if name in SINGLESTEP else None


def evaluation_times(sampler: Callable, ts: Tensor, schedule: Schedule) -> Tensor:
    """The times at which `sampler` will call the network, in order: (nfe,) or (nfe, b) float64.

    Found by running it on one number a row, so that what it says is what it does.
    """
    times = []

    def record(x_t: Tensor, t: Tensor) -> Prediction:
        times.append(t)
        return Prediction(x_t, x_t)

    _rehearse(sampler, record, ts, schedule)
    return torch.stack(times)


def state_times(sampler: Callable, ts: Tensor, schedule: Schedule) -> Tensor:
    """The times at which `sampler`'s state stands, x_T and x_0 included: (n,) or (n, b) float64, found likewise.

    Those of ts, less the points inside the intervals of a singlestep solver.
    """
    times = []
    _rehearse(watched(sampler, lambda x_t, t: times.append(t)), lambda x_t, t: Prediction(x_t, x_t), ts, schedule)
    return torch.stack(times)


def _rehearse(sampler: Callable, denoise: Callable, ts: Tensor, schedule: Schedule) -> None:
    x = torch.zeros(ts.shape[1:] or (1,), dtype=torch.float64)
    sampler(denoise, x, ts, schedule, noise=lambda k: x)

"""DPM-Solver++ (2211.01095): the same integrators for the data prediction, singlestep and multistep."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Denoise, rows
from ..schedule import Schedule
from .after_step import AfterStep, keep
from .dpm_solver import singlestep_orders


class _Coefficients:
    """sigma_t / sigma_s and alpha_t phi_k(h) of every step, in float64 on the host.

    At clean data h is infinite and phi_1 = alpha_t.
    """

    def __init__(self, ts: Tensor, schedule: Schedule):
        self.alphas, self.sigmas, self.lambdas = schedule.on_grid(ts)

    def h(self, s: int, t: int) -> Tensor:
        return self.lambdas[t] - self.lambdas[s]

    def keep(self, s: int, t: int) -> Tensor:
        return self.sigmas[t] / self.sigmas[s]

    def phi_1(self, s: int, t: int) -> Tensor:
        """-alpha_t (e^-h - 1)."""
        return -self.alphas[t] * torch.expm1(-self.h(s, t))

    def phi_2(self, s: int, t: int) -> Tensor:
        """alpha_t ((e^-h - 1) / h + 1)."""
        h = self.h(s, t)
        return self.alphas[t] * (torch.expm1(-h) / h + 1)

    def phi_3(self, s: int, t: int) -> Tensor:
        """alpha_t (((e^-h - 1) / h + 1) / h - 1/2)."""
        return self.phi_2(s, t) / self.h(s, t) - 0.5 * self.alphas[t]


def _combine(x: Tensor, keep: Tensor, *terms: tuple[Tensor, Tensor]) -> Tensor:
    out = rows(keep, x) * x
    for coefficient, value in terms:
        out = out + rows(coefficient, x) * value
    return out


def dpm_solver_pp_singlestep(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule,
                             noise: Callable | None = None, after_step: AfterStep = keep, order: int = 3,
                             orders: list[int] | None = None) -> Tensor:
    """DPM-Solver++ singlestep (2S, algorithm 1, and its third order), orders as in DPM-Solver-fast.

    The points inside an interval are those of ts. An interval that ends on clean data runs at first order.
    """
    c = _Coefficients(ts, schedule)
    x, s = x_T, 0
    for k in orders or singlestep_orders(len(ts) - 1, order):
        d_s = denoise(x, ts[s]).x_0
        if torch.isinf(c.lambdas[s + k]).any():
            for i in range(s, s + k):
                d_i = d_s if i == s else denoise(x, ts[i]).x_0
                x = _combine(x, c.keep(i, i + 1), (c.phi_1(i, i + 1), d_i))
        elif k == 1:
            x = _combine(x, c.keep(s, s + 1), (c.phi_1(s, s + 1), d_s))
        elif k == 2:
            r_1 = c.h(s, s + 1) / c.h(s, s + 2)
            d_1 = denoise(_combine(x, c.keep(s, s + 1), (c.phi_1(s, s + 1), d_s)), ts[s + 1]).x_0
            phi_1 = c.phi_1(s, s + 2)
            x = _combine(x, c.keep(s, s + 2), (phi_1, d_s), (phi_1 / (2 * r_1), d_1 - d_s))
        else:
            r_1, r_2 = c.h(s, s + 1) / c.h(s, s + 3), c.h(s, s + 2) / c.h(s, s + 3)
            d_1 = denoise(_combine(x, c.keep(s, s + 1), (c.phi_1(s, s + 1), d_s)), ts[s + 1]).x_0
            u_2 = _combine(x, c.keep(s, s + 2), (c.phi_1(s, s + 2), d_s),
                           (r_2 / r_1 * c.phi_2(s, s + 2), d_1 - d_s))
            d_2 = denoise(u_2, ts[s + 2]).x_0
            x = _combine(x, c.keep(s, s + 3), (c.phi_1(s, s + 3), d_s),
                         (c.phi_2(s, s + 3) / r_2, d_2 - d_s))
        s += k
        x = after_step(x, ts[s])
    return x


def dpm_solver_pp_multistep(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule,
                            noise: Callable | None = None, after_step: AfterStep = keep, order: int = 2,
                            lower_order_final: bool = True, exact_third: bool = False) -> Tensor:
    """DPM-Solver++ multistep (2M, algorithm 2, and 3M).

    The first steps have a lower order, as there is no history yet; with lower_order_final so do the last ones
    of fewer than 15 steps, which keeps few-step samples stable. A step onto clean data has first order.

    3M as released, which everybody runs, halves the second derivative's term: measured, its error falls with
    the square of the step. exact_third=True gives the term its Taylor weight, and the error the third power.
    """
    c = _Coefficients(ts, schedule)
    steps = len(ts) - 1
    x, history = x_T, []  # history: predictions, the newest first
    for i in range(steps):
        history = [denoise(x, ts[i]).x_0, *history[:2]]
        k = min(order, i + 1)
        if lower_order_final and steps < 15:
            k = min(k, steps - i)
        if torch.isinf(c.lambdas[i + 1]).any():
            k = 1
        remaining, phi_1, d_0 = c.keep(i, i + 1), c.phi_1(i, i + 1), history[0]
        terms = [(phi_1, d_0)]
        if k >= 2:
            h, h_0 = c.h(i, i + 1), c.h(i - 1, i)
            first_0 = rows(h / h_0, x) * (d_0 - history[1])
        if k == 2:
            terms.append((0.5 * phi_1, first_0))
        elif k == 3:
            h_1 = c.h(i - 2, i - 1)
            first_1 = rows(h / h_1, x) * (history[1] - history[2])
            change = rows(h / (h_0 + h_1), x) * (first_0 - first_1)
            first = first_0 + rows(h_0 / h, x) * change  # D_1 and D_2 of the paper
            phi_3 = c.phi_3(i, i + 1) * (2 if exact_third else 1)
            terms += [(c.phi_2(i, i + 1), first), (-phi_3, change)]
        x = after_step(_combine(x, remaining, *terms), ts[i + 1])
    return x

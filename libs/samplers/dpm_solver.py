"""DPM-Solver (2206.00927): exponential integrators in lambda for the noise prediction, singlestep."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Denoise, rows
from ..schedule import Schedule
from .after_step import AfterStep, keep


def singlestep_orders(steps: int, order: int) -> list[int]:
    """DPM-Solver-fast: the orders of the intervals that spend exactly `steps` evaluations (section 3.4).

    >>> singlestep_orders(50, 3) == [3] * 16 + [2]
    True
    >>> singlestep_orders(9, 3), singlestep_orders(7, 3), singlestep_orders(5, 2)
    ([3, 3, 2, 1], [3, 3, 1], [2, 2, 1])
    """
    if order == 1 or steps == 1:
        return [1] * steps
    if order == 2:
        return [2] * (steps // 2) + [1] * (steps % 2)
    if steps % 3 == 0:
        return [3] * (steps // 3 - 1) + [2, 1]
    return [3] * (steps // 3) + [steps % 3]


def dpm_solver(denoise: Denoise, x_T: Tensor, ts: Tensor, schedule: Schedule,
               noise: Callable | None = None, after_step: AfterStep = keep, order: int = 3,
               orders: list[int] | None = None) -> Tensor:
    """DPM-Solver-1, 2 and 3 (algorithms 1 to 3), one interval for each of `orders` (which sum to the steps).

    orders defaults to DPM-Solver-fast's for this highest `order`, `singlestep_orders`.

    The points inside an interval are those of ts, so r_1 and r_2 follow from the grid (1/3 and 2/3, or 1/2,
    on the logSNR grid). An interval that ends on clean data (lambda infinite) runs at first order.
    """
    lambdas, log_alphas, sigmas = schedule.lambda_(ts), schedule.log_alpha(ts), schedule.sigma(ts)

    def step(x: Tensor, s: int, t: int, *terms: tuple[Tensor, Tensor]) -> Tensor:
        """alpha_t / alpha_s x - sigma_t sum of coefficient * difference."""
        out = rows(torch.exp(log_alphas[t] - log_alphas[s]), x) * x
        for coefficient, value in terms:
            out = out - rows(coefficient, x) * value
        return out

    def phi_1(s: int, t: int) -> Tensor:
        """sigma_t (e^h - 1), written so that it is finite where h is not."""
        return torch.exp(log_alphas[t] - log_alphas[s]) * sigmas[s] - sigmas[t]

    x, s = x_T, 0
    for k in orders or singlestep_orders(len(ts) - 1, order):
        e_s = denoise(x, ts[s]).eps
        h = lambdas[s + k] - lambdas[s]
        if torch.isinf(h).any():
            for i in range(s, s + k):
                e_i = e_s if i == s else denoise(x, ts[i]).eps
                x = step(x, i, i + 1, (phi_1(i, i + 1), e_i))
        elif k == 1:
            x = step(x, s, s + 1, (phi_1(s, s + 1), e_s))
        elif k == 2:
            r_1 = (lambdas[s + 1] - lambdas[s]) / h
            e_1 = denoise(step(x, s, s + 1, (phi_1(s, s + 1), e_s)), ts[s + 1]).eps
            x = step(x, s, s + 2, (phi_1(s, s + 2), e_s), (phi_1(s, s + 2) / (2 * r_1), e_1 - e_s))
        else:
            h_1, h_2 = lambdas[s + 1] - lambdas[s], lambdas[s + 2] - lambdas[s]
            r_1, r_2 = h_1 / h, h_2 / h
            e_1 = denoise(step(x, s, s + 1, (phi_1(s, s + 1), e_s)), ts[s + 1]).eps
            phi_2_inner = phi_1(s, s + 2) / h_2 - sigmas[s + 2]
            u_2 = step(x, s, s + 2, (phi_1(s, s + 2), e_s), (r_2 / r_1 * phi_2_inner, e_1 - e_s))
            e_2 = denoise(u_2, ts[s + 2]).eps
            phi_2 = phi_1(s, s + 3) / h - sigmas[s + 3]
            x = step(x, s, s + 3, (phi_1(s, s + 3), e_s), (phi_2 / r_2, e_2 - e_s))
        s += k
        x = after_step(x, ts[s])
    return x

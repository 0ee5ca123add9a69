"""What Flash Diffusion's student learns to reach at once: the teacher's ODE solution from every image's own start."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..denoiser import Denoise, Prediction, guided, rows
from ..policies import make_policy
from ..schedule import Schedule

SOLVER_ORDERS = {"dpm_solver_pp": 2, "ddim": 1}  # ddim under flow matching is Euler's method


@dataclass(frozen=True)
class Teacher:
    """`teacher(x_t, t) -> Prediction` for b given rows: the conditions that they are guided by come with it.

    cond    of the network, or None
    null    the unconditional one of the same shapes, None where there is no guidance
    w       (b,) its scales, likewise
    """

    denoise: Denoise
    cond: dict[str, Tensor] | None
    null: dict[str, Tensor] | None = None
    w: Tensor | None = None

    def __call__(self, x_t: Tensor, t: Tensor) -> Prediction:
        denoise = self.denoise if self.w is None else guided(self.denoise, self.w, self.null)
        return denoise(x_t, t, self.cond)

    def of(self, index: Tensor | slice) -> "Teacher":
        """The same for some of the rows."""
        def chosen(cond: dict[str, Tensor] | None) -> dict[str, Tensor] | None:
            return cond and {name: value[index] for name, value in cond.items()}

        return Teacher(self.denoise, chosen(self.cond), chosen(self.null), None if self.w is None else self.w[index])


def teacher_rollout(teacher: Teacher, x: Tensor, starts: Tensor, ts: Tensor, schedule: Schedule,
                    order: int = 2) -> Tensor:
    """y (b, ...): where the teacher's solver ends that starts row r with x[r] at ts[starts[r]].

    starts: (b,) int64 on the host. ts: (K + 1,) float64 falling to clean data. order: 2 for DPM-Solver++ 2M
    (2211.01095, algorithm 2), 1 for DDIM, which is its first order.

    A row joins at its own step and runs it at first order, as it has no estimate before; so does the step onto clean
    data. Rows stand in the order of their starts: the teacher is called with those that have begun, and no other.
    """
    ranks = starts.argsort(stable=True)
    index = ranks.to(x.device, non_blocking=True)
    x, teacher, starts = x[index], teacher.of(index), starts[ranks]
    before = x[:0]  # the teacher's last estimates of x_0, of the rows that had begun by then
    alphas, sigmas, lambdas = schedule.on_grid(ts)
    for i in range(int(starts[0]), len(ts) - 1):
        begun, known = int(torch.searchsorted(starts, i, right=True)), len(before)
        x_t = x[:begun]
        x_0 = estimate = teacher.of(slice(begun))(x_t, ts[i]).x_0
        h = lambdas[i + 1] - lambdas[i]
        if order == 2 and known and ts[i + 1] > 0:
            ratio = h / (2 * (lambdas[i] - lambdas[i - 1]))
            estimate = torch.cat([x_0[:known] + rows(ratio, x) * (x_0[:known] - before), x_0[known:]])
        x[:begun] = rows(sigmas[i + 1] / sigmas[i], x) * x_t - rows(alphas[i + 1] * torch.expm1(-h), x) * estimate
        before = x_0
    return x[index.argsort()]


@contextmanager
def cached(net: nn.Module, policy: Mapping[str, Any], times: Tensor, rows_per_image: int) -> Iterator[None]:
    """A caching policy of the network `net` for one roll-out, after which the network is what it was.

    policy: a config's `policy` section. times, rows_per_image: see `policies.full.Full.start`. A step that rows join
    runs in full, since what is cached has fewer rows.
    """
    running = make_policy(policy, net)
    try:
        running.start(times, rows_per_image)
        yield
    finally:
        running.disable()

"""Progressive distillation (2202.00512): one DDIM step of a student learns two of its teacher's.

The student of N steps stands at u = (i + 1) / N, i = 0 ... N - 1; its teacher steps from u to
u' = u - 1 / (2N) and on to u'' = u - 1 / N (algorithm 2).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoise, Denoiser, rows
from ..errors import UserError, choose
from ..schedule import Schedule, time_grid
from ..training.batches import Batch

WEIGHTINGS = {  # of ||x^ - x~||^2, by the signal-to-noise ratio (section 4)
    "const": torch.ones_like,
    "snr": lambda snr: snr,  # the squared error of eps
    "snr_trunc": lambda snr: snr.clamp(min=1),  # the larger of the errors of x_0 and of eps
    "snr+1": lambda snr: snr + 1,  # the squared error of v
}


def two_step_target(teacher: Denoise, schedule: Schedule, z: Tensor, ts: Tensor, cond: dict | None = None) -> Tensor:
    """x~ (b, ...), the x_0 from which one DDIM step from ts[0] to ts[2] ends where the teacher's two end.

    z: x_t at ts[0]. ts: (3, b) float64 on the host, times u > u' > u''.

    The paper solves z'' = alpha'' x~ + (sigma'' / sigma) (z - alpha x~) for x~, a quotient of differences that
    nearly cancel when steps are small. With x_1, x_2 the teacher's two estimates it equals the mean

        x~ = x_2 + w (x_1 - x_2),    w = (r' - r) / (r'' - r),    r = alpha / sigma,

    which is stable in float32. Onto clean data (u'' = 0), where the sampler
    returns x_0 itself, w = 0 and x~ = x_2.
    """
    r = schedule.lambda_(ts).exp()
    w = torch.where(ts[2] == 0, 0.0, (r[1] - r[0]) / (r[2] - r[0]))
    x_1, eps_1 = teacher(z, ts[0], cond)
    alpha, sigma = (rows(each, z) for each in (schedule.alpha(ts[1]), schedule.sigma(ts[1])))
    x_2, _ = teacher(alpha * x_1 + sigma * eps_1, ts[1], cond)
    return x_2 + rows(w, z) * (x_1 - x_2)


@dataclass(frozen=True)
class Halving:
    """The objective `halving(student, batch) -> (b,)` by which a student of `steps` steps learns its teacher's 2 x
    `steps`.

    teacher     a denoiser in eval mode, on the student's schedule; it is not clipped
    weighting   a name of `WEIGHTINGS`
    """

    teacher: Denoiser
    steps: int
    weighting: str = "snr_trunc"
    ts: Tensor = field(init=False, repr=False)  # (2 steps + 1,) rising: ts[2 i + 2], ts[2 i + 1], ts[2 i] of index i

    def __post_init__(self):
        choose("distill.weighting", self.weighting, WEIGHTINGS)
        if self.steps < 1:
            raise UserError(f"distill.steps={self.steps} must be at least 1")
        schedule = self.teacher.schedule
        if schedule.steps is not None and 2 * self.steps > schedule.steps:
            raise UserError(f"distill.steps={self.steps}: its teacher would make {2 * self.steps} steps, the schedule "
                            f"has {schedule.steps}")
        object.__setattr__(self, "ts", time_grid(grid_of(schedule), 2 * self.steps, schedule).flip(0))

    def __call__(self, student: Denoiser, batch: Batch) -> Tensor:
        """Weighted mean squared error of the student's x_0, one value an image."""
        i = torch.floor(batch.uniform() * self.steps).long()
        return self.loss_at(i, student, batch)

    def loss_at(self, i: Tensor, student: Denoiser, batch: Batch) -> Tensor:
        """The same at given step indices i (b,) int64, 0 is the step onto clean data."""
        ts = self.ts[torch.stack([2 * i + 2, 2 * i + 1, 2 * i])]  # 3 b
        with torch.no_grad():
            z = student.diffuse(batch.x_0, batch.noise(), ts[0])
            target = two_step_target(self.teacher, self.teacher.schedule, z, ts, batch.cond)
        error = (student(z, ts[0], batch.cond).x_0 - target).float().square().flatten(1).mean(dim=1)
        weight = WEIGHTINGS[self.weighting](self.teacher.schedule.logsnr(ts[0]).exp())
        return weight.to(error.device, error.dtype) * error


def grid_of(schedule: Schedule) -> str:
    """The sampler's grid with times (i + 1) / N: a discrete schedule needs its own steps."""
    return "uniform" if schedule.steps is None else "trailing"


def student_sampler(steps: int, schedule: Schedule) -> dict[str, Any]:
    """The `sampler` fields by which a student of `steps` steps samples; its checkpoint carries them."""
    return {"name": "ddim", "steps": steps, "grid": grid_of(schedule), "eta": 0.0, "t_start": 1.0, "t_end": 0.0}


def refuse_other_steps(teacher: Mapping[str, Any], steps: int) -> None:
    """A teacher that is itself a student has a number of steps, which must be twice its student's.

    teacher: the description of its checkpoint.
    """
    held = teacher.get("sampler", {}).get("steps")
    if held not in (None, 2 * steps):
        raise UserError(f"--config.distill.steps={steps}: the teacher was itself distilled, to {held} steps; a halving "
                        f"makes {held / 2:g} of them")

"""Progressive distillation (2202.00512): one DDIM step of a student learns two of its teacher's.

The student of N steps stands at u = (i + 1) / N, i = 0 ... N - 1; its teacher steps from u to
u' = u - 1 / (2N) and on to u'' = u - 1 / N (algorithm 2).
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..denoiser import Denoise, Denoiser, guided, rows, thresholded
from ..errors import UserError, choose
from ..random import Stream
from ..schedule import Schedule, time_grid
from ..training.batches import Batch

WEIGHTINGS = {  # of ||x^ - x~||^2, by the signal-to-noise ratio (section 4)
    "const": lambda snr, gamma: torch.ones_like(snr),
    "snr": lambda snr, gamma: snr,  # the squared error of eps
    "snr_trunc": lambda snr, gamma: snr.clamp(min=1),  # the larger of the errors of x_0 and of eps
    "snr+1": lambda snr, gamma: snr + 1,  # the squared error of v
    # The squared error of v, both sides times (1 + alpha / sigma)^gamma: diffusion_distiller's.
    "gamma": lambda snr, gamma: (snr + 1) * (1 + snr.sqrt()) ** (2 * gamma),
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
    x_1, x_2 = two_estimates(teacher, schedule, z, ts, cond)
    return x_2 + rows(w, z) * (x_1 - x_2)


def second_estimate(teacher: Denoise, schedule: Schedule, z: Tensor, ts: Tensor, cond: dict | None = None) -> Tensor:
    """x_2 (b, ...), the teacher's estimate after its first step: what diffusion_distiller's students learn.

    One student step on it does not end where the teacher's two end, save onto clean data.
    """
    return two_estimates(teacher, schedule, z, ts, cond)[1]


def two_estimates(teacher: Denoise, schedule: Schedule, z: Tensor, ts: Tensor,
                  cond: dict | None = None) -> tuple[Tensor, Tensor]:
    """x_1 and x_2, the teacher's x_0 at ts[0] and, a DDIM step further, at ts[1]."""
    x_1, eps_1 = teacher(z, ts[0], cond)
    alpha, sigma = (rows(each, z) for each in (schedule.alpha(ts[1]), schedule.sigma(ts[1])))
    x_2, _ = teacher(alpha * x_1 + sigma * eps_1, ts[1], cond)
    return x_1, x_2


TARGETS = {"ddim2": two_step_target, "x2": second_estimate}


@dataclass(frozen=True)
class Guidance:
    """Classifier-free guidance of a teacher, to be distilled into a student that needs one call a step (2210.03142).

    low, high   the scale w, drawn uniformly for each image; a fixed one where both are equal
    null_label  the class against which the teacher is guided; None where it takes w as an input itself
    as_input    whether the student takes w as an input
    """

    low: float
    high: float
    null_label: int | None
    as_input: bool

    def draw(self, batch: Batch) -> Tensor:
        """w (b,) float32 on the device."""
        w = self.low + (self.high - self.low) * batch.uniform(Stream.TRAIN_GUIDANCE)
        return w.float().to(batch.x_0.device)

    def teacher(self, denoise: Denoise, w: Tensor, cond: dict) -> tuple[Denoise, dict]:
        """(the teacher that is guided by w, its condition)."""
        if self.null_label is None:
            return denoise, cond | {"guidance": w}
        return guided(denoise, w, {"y": torch.full_like(cond["y"], self.null_label)}), cond


def check_halving(weighting: str, target: str, schedule: Schedule, steps: int) -> None:
    """Refuse a loss that is not known, and more steps of the teacher, 2 x `steps`, than its schedule has."""
    choose("distill.weighting", weighting, WEIGHTINGS)
    choose("distill.target", target, TARGETS)
    if schedule.steps is not None and 2 * steps > schedule.steps:
        raise UserError(f"distill.start_steps={2 * steps}: the teacher's schedule has {schedule.steps} steps")


@dataclass(frozen=True)
class Halving:
    """The objective `halving(student, batch) -> (b,)` by which a student of `steps` steps learns its teacher's 2 x
    `steps`.

    teacher       a denoiser in eval mode
    weighting     a name of `WEIGHTINGS`; `gamma` is the exponent of the one of that name
    target        a name of `TARGETS`
    clip_teacher  whether the teacher's estimates are clipped to -1 ... 1
    guidance      of the teacher, or None
    """

    teacher: Denoiser
    steps: int
    weighting: str = "snr_trunc"
    gamma: float = 0.0
    target: str = "ddim2"
    clip_teacher: bool = False
    guidance: Guidance | None = None
    ts: Tensor = field(init=False, repr=False)  # (2 steps + 1,) rising: ts[2 i + 2], ts[2 i + 1], ts[2 i] of index i

    def __post_init__(self):
        schedule = self.teacher.schedule
        check_halving(self.weighting, self.target, schedule, self.steps)
        object.__setattr__(self, "ts", time_grid(grid_of(schedule), 2 * self.steps, schedule).flip(0))

    def __call__(self, student: Denoiser, batch: Batch) -> Tensor:
        """Weighted mean squared error of the student's x_0, one value an image."""
        i = torch.floor(batch.uniform() * self.steps).long()
        return self.loss_at(i, student, batch)

    def parts(self, batch: Batch) -> tuple[Denoise, dict | None, dict | None]:
        """(the teacher, guided and clipped as it teaches, its condition, the student's)."""
        teacher, taught, cond = self.teacher, batch.cond, batch.cond
        if self.guidance is not None:
            w = self.guidance.draw(batch)
            teacher, taught = self.guidance.teacher(teacher, w, cond)
            cond = cond | {"guidance": w} if self.guidance.as_input else cond
        if self.clip_teacher:
            teacher = thresholded(teacher, self.teacher.schedule, "static", 1.0)
        return teacher, taught, cond

    def loss_at(self, i: Tensor, student: Denoiser, batch: Batch) -> Tensor:
        """The same at given step indices i (b,) int64, 0 is the step onto clean data."""
        ts = self.ts[torch.stack([2 * i + 2, 2 * i + 1, 2 * i])]  # 3 b
        schedule = self.teacher.schedule
        with torch.no_grad():
            teacher, taught, cond = self.parts(batch)
            z = self.teacher.diffuse(batch.x_0, batch.noise(), ts[0])
            target = TARGETS[self.target](teacher, schedule, z, ts, taught)
        error = (student(z, ts[0], cond).x_0 - target).float().square().flatten(1).mean(dim=1)
        weight = WEIGHTINGS[self.weighting](student.schedule.logsnr(ts[0]).exp(), self.gamma)
        return weight.to(error.device, error.dtype) * error


def grid_of(schedule: Schedule) -> str:
    """The sampler's grid with times (i + 1) / N: a discrete schedule needs its own steps."""
    return "uniform" if schedule.steps is None else "trailing"


def student_sampler(steps: int, schedule: Schedule, name: str = "ddim") -> dict[str, Any]:
    """The `sampler` fields by which a student of `steps` steps samples; its checkpoint carries them.

    name: ddim, for which the student is made, or ddpm, the ancestral sampler of diffusion_distiller.
    """
    choose("distill.sampler", name, ("ddim", "ddpm"))
    fields = {"name": name, "steps": steps, "grid": grid_of(schedule), "eta": 0.0, "t_start": 1.0, "t_end": 0.0}
    return fields | ({"variance": "small", "threshold": "static", "threshold_value": 1.0} if name == "ddpm" else {})

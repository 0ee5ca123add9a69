"""Flash Diffusion (2406.02347): a student jumps at once to where its teacher's ODE solver ends.

An update starts each image at a step i ~ pi_s(i) of the teacher's grid, x = alpha_i x_0 + sigma_i z, and minimizes

    L = a_s L_distil(f, y) + b_s L_DMD(f) + g_s L_adv(f)

f being the student's estimate of x_0 from x, and y the teacher's solution from x. Stages s: `flash_stages`.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from ..denoiser import Denoiser, rows
from ..errors import UserError, choose
from ..random import Stream, uniform
from ..schedule import Schedule, time_grid
from ..training.batches import Batch
from ..training.objective import training_times
from .flash_losses import GAN, dmd_loss, make_distance
from .flash_rollout import SOLVER_ORDERS, Teacher, teacher_rollout
from .flash_stages import Stage, stage_at
from .progressive import grid_of

THOUSAND = 1000  # steps by which boundary scalings and `adversarial_times` count, for any schedule
DATA_STD, TIMESTEP_SCALING = 0.5, 10  # of the boundary scalings: those of latent consistency models


def boundary_scalings(t: Tensor) -> tuple[Tensor, Tensor]:
    """(c_skip, c_out) of f = c_skip x_t + c_out x_0 (2303.01469, section 3; 2310.04378): float64, of t's shape.

    With s = 0.5 and u = 10 * 1000 t: c_skip = s^2 / (u^2 + s^2), c_out = u / sqrt(u^2 + s^2). At t = 0 f is x_t, and
    from t = 1/4 on it is x_0 to 4e-8, so that a sampler may take x_0 for f.
    """
    u = TIMESTEP_SCALING * THOUSAND * t.double()
    total = u**2 + DATA_STD**2
    return DATA_STD**2 / total, u / total.sqrt()


def student_estimate(student: Denoiser, x_t: Tensor, t: Tensor, cond: dict | None = None) -> Tensor:
    """f(x_t, t) = c_skip(t) x_t + c_out(t) x_0(x_t, t), from one call of the student."""
    c_skip, c_out = boundary_scalings(t)
    return rows(c_skip, x_t) * x_t + rows(c_out, x_t) * student(x_t, t, cond).x_0


def draw_starts(stage: Stage, batch: Batch, per: str = "image") -> Tensor:
    """i ~ pi_s, steps of the teacher's grid: (b,) int64 on the host.

    per: image, or batch for one start of all the images of an update, on all processes.
    """
    if per == "image":
        u = batch.uniform(Stream.FLASH_START)
    else:
        u = uniform(torch.tensor([batch.seed]), batch.step, (), Stream.FLASH_START).expand(len(batch.positions))
    cumulative = stage.start_probabilities.cumsum(0)
    return torch.searchsorted(cumulative / cumulative[-1], u.contiguous(), right=True)


class Flash:
    """The objective `flash(student, batch) -> (b,)`: the student's loss L and the discriminator's, added.

    One backward gives each of the two its own gradient and nothing of the other's. A loss whose scale is 0 is not
    computed. All randomness is the batch's.

    stages         of `flash_stages.read_stages`
    teacher        frozen, in eval mode; also the real score of L_DMD, whose fake score is the student itself
    null           null(cond) -> the unconditional cond of the same shapes, None where nothing is guided
    features       features(x_t, t, cond) -> (b, c, h, w) of the teacher, frozen but differentiable in x_t
    discriminator  of such features, (b, c, h, w) -> logits (b, n)
    section        the config's `distill` section
    pixels         the model space decoded for LPIPS, see `flash_losses.lpips_distance`
    cached         what surrounds a roll-out, `cached(times, rows_per_image)`: `flash_rollout.cached` of a network

    alone     what surrounds a roll-out, whose calls are as many as the process's own images need
    modules   what learns beside the student: the discriminator, or None
    terms     {name: sum over the rows} of the losses of the last call, before their scales; detached on the device
    """

    def __init__(self, stages: Sequence[Stage], teacher: Denoiser, null: Callable[[dict], dict] | None,
                 features: Callable[..., Tensor] | None, discriminator: nn.Module | None, section: Mapping[str, Any],
                 pixels: Callable[[Tensor], Tensor] | None = None,
                 cached: Callable[[Tensor, int], contextlib.AbstractContextManager] | None = None):
        self.stages, self.teacher, self.null, self.features = stages, teacher, null, features
        self.alone: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
        self.cached = cached or (lambda times, rows_per_image: contextlib.nullcontext())
        self.grids = _grids(stages, teacher.schedule, section)
        self.distance = make_distance(section["distance"], pixels)
        self.discriminator_loss, self.generator_loss = choose("--config.distill.gan", section["gan"], GAN)
        self.order = choose("--config.distill.teacher_solver", section["teacher_solver"], SOLVER_ORDERS)
        self.real = choose("--config.distill.real", section["real"], ("data", "teacher"))
        self.start_per = choose("--config.distill.start_per", section["start_per"], ("image", "batch"))
        self.adversarial_times = _adversarial_times(section)
        if null is None and any(stage.guidance != (1, 1) for stage in stages):
            raise UserError(f"--config.distill.guidance={section['guidance']}: this teacher has nothing to be guided "
                            "against; use 1")
        adversarial = any(stage.adversarial for stage in stages)
        if adversarial and (features is None or discriminator is None):
            raise UserError(f"--config.distill.adversarial_scale={section['adversarial_scale']}: there is no "
                            "discriminator of the teacher's features; use 0")
        self.modules = discriminator if adversarial else None
        self.terms: dict[str, Tensor] = {}

    def __call__(self, student: Denoiser, batch: Batch) -> Tensor:
        _, stage = stage_at(self.stages, batch.step)
        return self.loss_at(draw_starts(stage, batch, self.start_per), student, batch)

    def loss_at(self, i: Tensor, student: Denoiser, batch: Batch) -> Tensor:
        """The same at given steps i (b,) int64 of the teacher's grid."""
        _, stage = stage_at(self.stages, batch.step)
        ts = self.grids[stage.steps]
        x = self._start(i, ts[i], batch)
        teacher, real = self._guided(stage, batch), batch.x_0
        if stage.distil or (stage.adversarial and self.real == "teacher"):  # before the student's activations are held
            y = self._rollout(teacher, x, i, ts)
            real = y if self.real == "teacher" else real
        f = student_estimate(student, x, ts[i], batch.cond)
        losses = {}
        if stage.distil:
            losses["distil"] = self.distance(f, y)
        if stage.dmd:
            losses["dmd"] = self._dmd(student, teacher, f, batch)
        if stage.adversarial:
            losses["adversarial"], losses["discriminator"] = self._adversarial(f, real, batch)
        self.terms = {name: loss.detach().sum() for name, loss in losses.items()}
        scales = {"distil": stage.distil, "dmd": stage.dmd, "adversarial": stage.adversarial, "discriminator": 1.0}
        return sum(scales[name] * loss for name, loss in losses.items())

    def _start(self, i: Tensor, t: Tensor, batch: Batch) -> Tensor:
        """x_t of the images; on the first step of the grid pure noise, from which sampling starts."""
        noise = batch.noise(Stream.FLASH_START_NOISE)
        first = (i == 0).to(noise.device, non_blocking=True).view(-1, *[1] * (noise.dim() - 1))
        return torch.where(first, noise, self.teacher.diffuse(batch.x_0, noise, t))

    def _guided(self, stage: Stage, batch: Batch) -> Teacher:
        """The teacher, each image by a scale w of its own from the stage's range."""
        low, high = stage.guidance
        if low == high == 1:
            return Teacher(self.teacher, batch.cond)
        w = low + (high - low) * batch.uniform(Stream.TRAIN_GUIDANCE)
        return Teacher(self.teacher, batch.cond, self.null(batch.cond), w.to(batch.x_0.device, batch.x_0.dtype))

    @torch.no_grad()
    def _rollout(self, teacher: Teacher, x: Tensor, i: Tensor, ts: Tensor) -> Tensor:
        with self.alone(), self.cached(self.teacher.time_input(ts[int(i.min()):-1]), 1 if teacher.w is None else 2):
            return teacher_rollout(teacher, x, i, ts, self.teacher.schedule, self.order)

    def _dmd(self, student: Denoiser, teacher: Teacher, f: Tensor, batch: Batch) -> Tensor:
        """L_DMD at a time uniform on the schedule."""
        t = training_times(self.teacher, batch, Stream.FLASH_DMD_TIME)
        with torch.no_grad():
            x_t = self.teacher.diffuse(f, batch.noise(Stream.FLASH_DMD_NOISE), t)
            fake, real = student(x_t, t, batch.cond).x_0, teacher(x_t, t).x_0
        return dmd_loss(f, fake, real)

    def _adversarial(self, f: Tensor, real: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """(the generator's loss, the discriminator's) on the teacher's features of f and of `real`, noised anew."""
        u = batch.uniform(Stream.FLASH_ADV_TIME)
        t = self.adversarial_times[torch.floor(u * len(self.adversarial_times)).long()]
        fake = self._features(self.teacher.diffuse(f, batch.noise(Stream.FLASH_ADV_NOISE), t), t, batch.cond)
        with torch.no_grad():
            real = self._features(self.teacher.diffuse(real, batch.noise(Stream.FLASH_REAL_NOISE), t), t, batch.cond)
        held = {name: each.detach() for name, each in self.modules.named_parameters()}
        generator = self.generator_loss(functional_call(self.modules, held, (fake,)))
        return generator, self.discriminator_loss(*self.modules(torch.cat([real, fake.detach()])).chunk(2))

    def _features(self, x_t: Tensor, t: Tensor, cond: dict | None) -> Tensor:
        """In x_t's precision, whatever the network's."""
        return self.features(x_t, t, cond).to(x_t.dtype)


def student_sampler(steps: int, schedule: Schedule) -> dict[str, Any]:
    """The `sampler` fields by which a student samples, at the times of its modes; its checkpoint carries them."""
    return {"name": "lcm", "steps": steps, "grid": grid_of(schedule), "t_start": 1.0, "t_end": 0.0}


def _grids(stages: Sequence[Stage], schedule: Schedule, section: Mapping) -> dict[int, Tensor]:
    """The teacher's times for each K: (K + 1,) float64."""
    counts = {stage.steps for stage in stages}
    if schedule.steps is not None and max(counts) > schedule.steps:
        raise UserError(f"--config.distill.teacher_steps={section['teacher_steps']}: the teacher's schedule has "
                        f"{schedule.steps} steps")
    return {count: time_grid(grid_of(schedule), count, schedule) for count in counts}


def _adversarial_times(section: Mapping) -> Tensor:
    """t = (n + 1) / 1000 of the steps n in `adversarial_times`: float64."""
    try:
        steps = [int(part) for part in str(section["adversarial_times"]).split(",")]
    except ValueError:
        steps = [-1]
    if not all(0 <= n < THOUSAND for n in steps):
        raise UserError(f"--config.distill.adversarial_times={section['adversarial_times']}: want steps from 0 to "
                        f"{THOUSAND - 1}, parted by commas")
    return (torch.tensor(steps, dtype=torch.float64) + 1) / THOUSAND

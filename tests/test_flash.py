"""Flash Diffusion's objective: whom each loss teaches, what it is worth, and how many rows the teacher sees."""

import dataclasses

import pytest
import torch
from test_flash_stages import SECTION
from torch import nn
from torch.func import functional_call

from libs.denoiser import TARGETS, Denoiser, guided, rows
from libs.distillation.flash import Flash, draw_starts, student_estimate
from libs.distillation.flash_losses import GAN
from libs.distillation.flash_stages import read_stages
from libs.errors import UserError
from libs.random import Stream
from libs.samplers import make_sampler
from libs.schedule import make_schedule, time_grid
from libs.training.batches import Batch

PREDICTIONS = [("eps", "scaled_linear", "index"), ("v", "cosine", "1000t"), ("v", "squared_cosine", "index"),
               ("flow", "flow_matching", "1000t")]
OPTIONS = SECTION | {"distance": "l2", "gan": "lsgan", "adversarial_times": "10,250,500,750", "real": "data",
                     "teacher_solver": "dpm_solver_pp", "start_per": "image"}
ONE_STAGE = {"stage_updates": "9", "mode_weights": "1,1,1,1", "adversarial_scale": "0", "dmd_scale": "0"}
ALL = {"stage_updates": "9", "mode_weights": "1,1,1,1", "adversarial_scale": ".3", "dmd_scale": ".7",
       "distil_scale": "2"}


class Linear(nn.Module):
    """A network whose output is a channel's weight times a bounded input, and its label; it counts its rows."""

    def __init__(self, scale=0.3):
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([scale, 2 * scale]).view(2, 1, 1))
        self.rows, self.seen = 0, []

    def forward(self, x, timesteps, y=None):
        self.rows += len(x)
        self.seen.append((timesteps, y, torch.is_grad_enabled()))
        out = self.scale * torch.sin(x)
        return out if y is None else out + 0.01 * y.to(x.dtype).view(-1, 1, 1, 1)


def batch_of(n=12, step=0, **fields):
    return Batch(**{"x_0": torch.randn(n, 2, 4, 4), "cond": {"y": torch.arange(n) % 5}, "seed": 0,
                    "positions": torch.arange(100, 100 + n), "step": step} | fields)


def flash_of(prediction="eps", schedule="scaled_linear", time_input="index", guided_by=True, **options):
    """(objective, student)"""
    section = OPTIONS | options
    schedule = make_schedule(schedule)
    student, teacher = (Denoiser(Linear(scale), schedule, prediction, time_input) for scale in (0.2, 0.3))
    teacher.net.requires_grad_(False)

    def features(x_t, t, cond):
        assert torch.equal(cond["y"].cpu(), torch.arange(len(x_t)) % 5)
        teacher.net.rows += len(x_t)
        return torch.cat([torch.tanh(teacher.net.scale * x_t), x_t * rows(t, x_t)], dim=1)

    discriminator = nn.Sequential(nn.Conv2d(4, 3, 3), nn.Tanh(), nn.Flatten(1), nn.Linear(12, 5))
    null = (lambda cond: {"y": torch.full_like(cond["y"], 7)}) if guided_by else None
    return Flash(read_stages(section), teacher, null, features, discriminator, section), student


@pytest.mark.parametrize("kind", PREDICTIONS, ids=lambda kind: "-".join(kind[:2]))
def test_distillation_loss_is_the_distance_to_the_samplers_solution(kind):
    flash, student = flash_of(*kind, **ONE_STAGE)
    batch = batch_of(x_0=torch.randn(12, 2, 4, 4, dtype=torch.float64))
    losses = flash(student, batch)
    assert losses.shape == (12,)
    i = draw_starts(flash.stages[0], batch)
    ts = time_grid("trailing" if flash.teacher.schedule.steps else "uniform", 32, flash.teacher.schedule)
    w = 3 + 10 * batch.uniform(Stream.TRAIN_GUIDANCE)
    for row in range(12):
        x_0, noise = batch.x_0[row:row + 1], batch.noise(Stream.FLASH_START_NOISE)[row:row + 1].double()
        cond, t = {"y": batch.cond["y"][row:row + 1]}, ts[i[row]]
        x = noise if i[row] == 0 else flash.teacher.diffuse(x_0, noise, t)
        denoise = guided(flash.teacher, float(w[row]), {"y": torch.tensor([7])})
        last = make_sampler("dpm_solver_pp", order=2, lower_order_final=False)(
            lambda x_t, t, denoise=denoise, cond=cond: denoise(x_t, t, cond), x, ts[i[row]:-1], flash.teacher.schedule)
        y = make_sampler("ddim")(lambda x_t, t, denoise=denoise, cond=cond: denoise(x_t, t, cond), last, ts[-2:],
                                 flash.teacher.schedule)
        f = student_estimate(student, x, t, cond)
        torch.testing.assert_close(losses[row], (f - y).square().mean(), rtol=1e-8, atol=0)
    assert flash.terms.keys() == {"distil"}
    torch.testing.assert_close(flash.terms["distil"], losses.detach().sum())
    assert not flash.terms["distil"].requires_grad
    assert (i == 0).any()
    assert len(i.unique()) > 3


class Gaussian(nn.Module):
    """What a network puts out for data from N(0.3, 0.5^2): the mean of x_0, or (`jump`) where the ODE ends."""

    def __init__(self, prediction, schedule, time_of, jump):
        super().__init__()
        self.prediction, self.schedule, self.time_of, self.jump = prediction, schedule, time_of, jump

    def forward(self, x, timesteps):
        t = self.time_of(timesteps.double())
        alpha, sigma = rows(self.schedule.alpha(t), x), rows(self.schedule.sigma(t), x)
        total = alpha**2 * 0.5**2 + sigma**2
        pull = 0.5 / total.sqrt() if self.jump else alpha * 0.5**2 / total
        x_0 = 0.3 + pull * (x - alpha * 0.3)
        return TARGETS[self.prediction](x_0, (x - alpha * x_0) / sigma, alpha, sigma)


@pytest.mark.parametrize(("prediction", "name", "time_input"), PREDICTIONS)
def test_a_student_that_jumps_to_the_odes_end_has_no_distillation_loss(prediction, name, time_input):
    schedule = make_schedule(name)
    time_of = (lambda n: (n + 1) / 1000) if time_input == "index" else lambda n: n / 1000
    teacher, student = (Denoiser(Gaussian(prediction, schedule, time_of, jump), schedule, prediction, time_input)
                        for jump in (False, True))
    section = OPTIONS | ONE_STAGE | {"guidance": "1", "teacher_steps": "64"}
    flash = Flash(read_stages(section), teacher, None, None, None, section)
    data = batch_of(64, x_0=0.3 + 0.5 * torch.randn(64, 2, 4, 4, dtype=torch.float64), cond=None)
    perfect, untaught = flash(student, data), flash(teacher, data)
    assert perfect.mean() < 2e-3
    assert untaught.mean() > 20 * perfect.mean()


def test_each_learns_from_its_own_loss_alone():
    flash, student = flash_of(**ALL)
    flash.teacher.net.requires_grad_(True)  # gets no gradient of what it is called for without one
    flash.features = lambda x_t, t, cond: torch.cat([torch.tanh(x_t), x_t * rows(t, x_t)], dim=1)
    batch, D = batch_of(), flash.modules
    losses = flash(student, batch)
    losses.sum().backward()
    assert flash.teacher.net.scale.grad is None
    terms, taught, judged = dict(flash.terms), student.net.scale.grad, [each.grad for each in D.parameters()]
    assert terms.keys() == {"distil", "dmd", "adversarial", "discriminator"}
    torch.testing.assert_close(losses.sum().detach(), 2 * terms["distil"] + 0.7 * terms["dmd"]
                               + 0.3 * terms["adversarial"] + terms["discriminator"])

    # the discriminator's loss written out
    i = draw_starts(flash.stages[0], batch)
    ts = flash.grids[32]
    noise = batch.noise(Stream.FLASH_START_NOISE)
    x = torch.where((i == 0).view(-1, 1, 1, 1), noise, student.diffuse(batch.x_0, noise, ts[i]))
    f = student_estimate(student, x, ts[i], batch.cond)
    steps = torch.tensor([10, 250, 500, 750])[torch.floor(4 * batch.uniform(Stream.FLASH_ADV_TIME)).long()]
    t = (steps.double() + 1) / 1000
    fake = flash.features(student.diffuse(f, batch.noise(Stream.FLASH_ADV_NOISE), t), t, batch.cond)
    real = flash.features(student.diffuse(batch.x_0, batch.noise(Stream.FLASH_REAL_NOISE), t), t, batch.cond)
    discriminator, generator = GAN["lsgan"]
    own = discriminator(D(real), D(fake.detach()))
    torch.testing.assert_close(own.sum().detach(), terms["discriminator"])
    for grad, expected in zip(judged, torch.autograd.grad(own.sum(), D.parameters()), strict=True):
        torch.testing.assert_close(grad, expected)

    # the student's gradient: that of the three losses, a scale of 0 for the others
    parts = {}
    for name, scales in (("distil", ("2", "0", "0")), ("dmd", ("0", ".7", "0")), ("adversarial", ("0", "0", ".3"))):
        fields = dict(zip(("distil_scale", "dmd_scale", "adversarial_scale"), scales, strict=True))
        single, _ = flash_of(**ALL | fields)
        parts[name] = torch.autograd.grad(single(student, batch).sum(), student.net.scale)[0]
    single, _ = flash_of(**ALL | {"distil_scale": "0", "dmd_scale": "0"})
    with_same = functional_call(D, {name: each.detach() for name, each in D.named_parameters()}, (fake,))
    expected = torch.autograd.grad(0.3 * generator(with_same).sum(), student.net.scale)[0]
    torch.testing.assert_close(taught, parts["distil"] + parts["dmd"] + expected)
    assert all(each.abs().min() > 1e-6 for each in (*parts.values(), expected))


def test_the_students_estimate_is_bound_to_the_data():
    _, student = flash_of("flow", "flow_matching", "1000t")
    x = torch.randn(3, 2, 4, 4, dtype=torch.float64)
    assert torch.equal(student_estimate(student, x, torch.tensor(0.0)), x)
    t = torch.tensor([1e-4, 0.25, 1.0], dtype=torch.float64)  # u = 1: a fifth of x_t
    x_0, f = student(x, t).x_0, student_estimate(student, x, t)
    torch.testing.assert_close(f[0], 0.2 * x[0] + x_0[0] / 1.25**0.5)
    torch.testing.assert_close(f[1:], x_0[1:], atol=1e-6, rtol=0)
    assert not torch.equal(f[1], x_0[1])


def test_dmd_with_the_student_as_its_own_fake_score():
    flash, student = flash_of(**ALL | {"distil_scale": "0", "adversarial_scale": "0"})
    batch, f = batch_of(), torch.randn(12, 2, 4, 4, requires_grad=True)
    teacher = flash._guided(flash.stages[0], batch)
    loss = flash._dmd(student, teacher, f, batch)
    loss.sum().backward()
    t = (torch.floor(1000 * batch.uniform(Stream.FLASH_DMD_TIME)) + 1) / 1000
    x_t = student.diffuse(f.detach(), batch.noise(Stream.FLASH_DMD_NOISE), t)
    w = 3 + 10 * batch.uniform(Stream.TRAIN_GUIDANCE)
    fake = student(x_t, t, batch.cond).x_0
    real = guided(flash.teacher, w, {"y": torch.full((12,), 7)})(x_t, t, batch.cond).x_0
    weight = 1 / ((f - real).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(f.grad, 2 * weight * (fake - real).detach() / 32)
    assert student.net.scale.grad is None
    (_, _, grad), *_ = student.net.seen
    assert not grad


def test_stages_by_the_optimizers_step():
    flash, student = flash_of()
    for step, terms, scales in ((0, 1, (1, 0, 0)), (4, 1, (1, 0, 0)), (5, 4, (1, 0.3, 0.1)), (9, 4, (1, 0.5, 0.2)),
                                (12, 4, (1, 0.7, 0.3)), (500, 4, (1, 0.7, 0.3))):
        loss = flash(student, batch_of(step=step)).sum().detach()
        assert len(flash.terms) == terms
        values = [flash.terms.get(name, 0) for name in ("distil", "dmd", "adversarial")]
        total = sum(scale * value for scale, value in zip(scales, values, strict=True))
        torch.testing.assert_close(loss, total + flash.terms.get("discriminator", 0))


def test_starts_follow_the_stages_probabilities():
    stages = read_stages(SECTION)
    for stage in stages:
        starts = draw_starts(stage, batch_of(4000))
        counts = torch.bincount(starts, minlength=32) / 4000
        assert (counts - stage.start_probabilities).abs().max() < 0.03
        one = draw_starts(stage, batch_of(4000), "batch")
        assert len(one.unique()) == 1
        assert torch.equal(one[:3], draw_starts(stage, batch_of(3, positions=torch.arange(7, 10)), "batch"))
    several = {int(draw_starts(stages[-1], batch_of(1, step=step), "batch")) for step in range(40)}
    assert len(several) > 5


@pytest.mark.parametrize("start_per", ["image", "batch"])
def test_a_batch_in_parts_is_the_same(start_per):
    flash, student = flash_of(**ALL, start_per=start_per)
    batch = batch_of(15)
    whole = flash(student, batch)
    parts = []
    for cut in (slice(0, 5), slice(5, 15)):
        part = dataclasses.replace(batch, x_0=batch.x_0[cut], cond={"y": batch.cond["y"][cut]},
                                   positions=batch.positions[cut])
        parts.append(flash(student, part))
    torch.testing.assert_close(torch.cat(parts), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("step", [5, 9, 12])
def test_rows_through_the_teacher(step):
    """At most 0.55 of the reference's, which computes everything once for each of the two optimizers."""
    flash, student = flash_of()
    batch = batch_of(20, step=step)
    flash(student, batch)
    _, stage = (step, flash.stages[(5, 9, 12).index(step) + 1])
    solved = int((32 - draw_starts(stage, batch)).sum())
    assert flash.teacher.net.rows == 2 * solved + 2 * 20 + 2 * 20  # roll-out and real score guided, features
    # of the reference: roll-out and real score twice, features of the student's images twice and of real ones once
    reference = 2 * (2 * solved + 2 * 20) + 3 * 20
    assert flash.teacher.net.rows <= 0.55 * reference
    assert student.net.rows == 2 * 20  # once as the student, once as the fake score
    assert len(student.net.seen) == 2


def test_a_scale_of_zero_costs_nothing():
    for fields, rows_seen in (({"distil_scale": "0", "adversarial_scale": "0"}, 24),  # the real score, guided
                              ({"distil_scale": "0", "dmd_scale": "0"}, 24)):  # features of fake and real
        flash, student = flash_of(**ALL | fields)
        flash(student, batch_of())
        assert flash.teacher.net.rows == rows_seen
    flash, student = flash_of(**ALL | {"distil_scale": "0", "dmd_scale": "0", "real": "teacher", "guidance": "1"})
    flash(student, batch_of())
    assert flash.teacher.net.rows == 24 + int((32 - draw_starts(flash.stages[0], batch_of())).sum())
    assert flash_of(**ONE_STAGE)[0].modules is None


def test_what_surrounds_the_rollout():
    flash, student = flash_of(**ALL)
    seen = []

    class Around:
        def __init__(self, times, rows_per_image):
            seen.append((times.tolist(), rows_per_image))

        def __enter__(self):
            self.before = flash.teacher.net.rows

        def __exit__(self, *exception):
            seen.append(flash.teacher.net.rows - self.before)

    flash.cached = Around
    batch = batch_of()
    i = draw_starts(flash.stages[0], batch)
    flash(student, batch)
    (times, rows_per_image), solved = seen
    assert times == [float(round(1000 * (1 - k / 32)) - 1) for k in range(int(i.min()), 32)]
    assert rows_per_image == 2
    assert solved == 2 * int((32 - i).sum())


def test_the_discriminator_may_take_the_teachers_solution_for_real():
    flash, student = flash_of(**ALL | {"real": "teacher"})
    data, _ = flash_of(**ALL)
    data.modules = flash.modules
    batch = batch_of()
    for each in (flash, data):
        each(student, batch)
    assert flash.terms["discriminator"] != data.terms["discriminator"]
    for name in ("distil", "dmd", "adversarial"):
        assert torch.equal(flash.terms[name], data.terms[name])


@pytest.mark.parametrize(("fields", "says"), [
    ({"gan": "gan"}, "--config.distill.gan='gan' is unknown; choose from hinge, vanilla, non_saturating, wgan, lsgan"),
    ({"teacher_solver": "heun"}, "--config.distill.teacher_solver='heun' is unknown; choose from dpm_solver_pp, ddim"),
    ({"real": "x"}, "--config.distill.real='x' is unknown; choose from data, teacher"),
    ({"start_per": "row"}, "--config.distill.start_per='row' is unknown; choose from image, batch"),
    ({"adversarial_times": "10,1000"}, "--config.distill.adversarial_times=10,1000: want steps from 0 to 999"),
    ({"adversarial_times": ""}, "--config.distill.adversarial_times=: want steps"),
    ({"teacher_steps": "1004"}, "--config.distill.teacher_steps=1004: the teacher's schedule has 1000 steps"),
    ({"guided_by": False}, "--config.distill.guidance=3,13: this teacher has nothing to be guided against; use 1"),
])
def test_mistakes(fields, says):
    with pytest.raises(UserError) as caught:
        flash_of(**fields)
    assert str(caught.value).startswith(says)


def test_no_discriminator():
    flash, _ = flash_of()
    with pytest.raises(UserError, match="adversarial_scale=0,.1,.2,.3: there is no discriminator of the teacher's fea"):
        Flash(flash.stages, flash.teacher, flash.null, flash.features, None, OPTIONS)

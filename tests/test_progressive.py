"""Progressive distillation: one step of the student is two of the teacher's, exactly."""

import dataclasses

import pytest
import torch

from libs.denoiser import PREDICTIONS, TARGETS, Denoiser, Prediction, guided
from libs.distillation import WEIGHTINGS, Guidance, Halving, second_estimate, student_sampler, two_step_target
from libs.errors import UserError
from libs.samplers.ddim import ddim
from libs.schedule import make_schedule, time_grid
from libs.training.batches import Batch

SCHEDULES = [{"name": "vp_linear"}, {"name": "cosine"}, {"name": "squared_cosine", "steps": 1024},
             {"name": "flow_matching"}]
STD = 0.5  # of the data


def gaussian_denoiser(schedule):
    """The best estimate of x_0 ~ N(0, STD^2) from x_t, in float64."""
    def denoise(x_t, t, cond=None):
        alpha, sigma = (c if c.dim() == 0 else c[:, None] for c in (schedule.alpha(t), schedule.sigma(t)))
        total = alpha**2 * STD**2 + sigma**2
        return Prediction(alpha * STD**2 * x_t / total, sigma * x_t / total)

    return denoise


@pytest.mark.parametrize("options", SCHEDULES, ids=lambda options: options["name"])
@pytest.mark.parametrize("steps", [1, 2, 8, 64, 512])
def test_target_equals_two_teacher_steps_at_every_index(options, steps):
    schedule = make_schedule(**options)
    teacher = gaussian_denoiser(schedule)
    grid = "trailing" if schedule.steps else "uniform"
    ts = time_grid(grid, 2 * steps, schedule)
    z = torch.randn(5, 3, dtype=torch.float64)
    for i in range(steps):
        start = len(ts) - 1 - 2 * (i + 1)
        three = ts[start:start + 3]
        target = two_step_target(teacher, schedule, z, three[:, None].expand(3, 5))

        def student(x_t, t, cond=None, target=target):
            return Prediction(target, (x_t - schedule.alpha(t) * target) / schedule.sigma(t))

        expected, reached = ddim(teacher, z, three, schedule), ddim(student, z, three[::2], schedule)
        torch.testing.assert_close(reached, expected, atol=1e-10, rtol=0)


def test_target_is_the_papers_quotient():
    schedule = make_schedule("vp_linear")
    teacher = gaussian_denoiser(schedule)
    z, ts = torch.randn(5, 3, dtype=torch.float64), torch.tensor([0.5, 0.375, 0.25], dtype=torch.float64)
    (alpha, *_, alpha_2), (sigma, *_, sigma_2) = schedule.alpha(ts), schedule.sigma(ts)
    z_2 = ddim(teacher, z, ts, schedule)
    quotient = (z_2 - sigma_2 / sigma * z) / (alpha_2 - sigma_2 / sigma * alpha)
    torch.testing.assert_close(two_step_target(teacher, schedule, z, ts), quotient)
    x_2 = teacher(ddim(teacher, z, ts[:2], schedule), ts[1]).x_0
    assert (quotient - x_2).abs().max() > 0.01  # the teacher's second estimate is another target


def last_std(steps, target):
    """Standard deviation of what a student of `steps` steps draws from Gaussian data, perfect in its target."""
    schedule = make_schedule("cosine")
    teacher = gaussian_denoiser(schedule)
    ts = time_grid("uniform", 2 * steps, schedule)
    x = torch.ones(1, 1, dtype=torch.float64)
    for i in range(0, 2 * steps, 2):
        x_0 = target(teacher, schedule, x, ts[i:i + 3][:, None])
        eps = (x - schedule.alpha(ts[i]) * x_0) / schedule.sigma(ts[i])
        x = schedule.alpha(ts[i + 2]) * x_0 + schedule.sigma(ts[i + 2]) * eps if ts[i + 2] else x_0
    return float(x)


@pytest.mark.parametrize(("steps", "exact", "second"), [(8, 0.4539, 0.4729), (4, 0.4114, 0.4306)])
def test_the_second_estimate_misses_by_the_known_amount(steps, exact, second):
    # The data have 0.5; what a teacher of twice the steps draws, its student must draw too.
    schedule = make_schedule("cosine")
    ts = time_grid("uniform", 2 * steps, schedule)
    teacher = gaussian_denoiser(schedule)
    last = ddim(teacher, torch.ones(1, 1, dtype=torch.float64), ts[:-1], schedule)
    taught = teacher(last, ts[-2]).x_0
    assert last_std(steps, two_step_target) == pytest.approx(float(taught), abs=1e-10)
    assert float(taught) == pytest.approx(exact, abs=5e-5)
    assert last_std(steps, second_estimate) == pytest.approx(second, abs=5e-5)


def test_target_is_stable_in_float32():
    schedule = make_schedule("squared_cosine", steps=1024)
    teacher = gaussian_denoiser(schedule)
    ts = time_grid("trailing", 1024, schedule)
    i = torch.arange(512)
    three = torch.stack([ts[1024 - 2 * i - 2], ts[1024 - 2 * i - 1], ts[1024 - 2 * i]])
    z = torch.randn(512, 3)

    def single(x_t, t, cond=None):
        return Prediction(*(each.float() for each in teacher(x_t, t)))

    exact = two_step_target(teacher, schedule, z.double(), three)
    torch.testing.assert_close(two_step_target(single, schedule, z, three).double(), exact, atol=1e-5, rtol=0)


class Linear(torch.nn.Module):
    """A network whose output is `scale` times its input, which notes the times it sees."""

    def __init__(self, scale=0.3):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.seen = []

    def forward(self, x, timesteps, y=None):
        self.seen.append((timesteps, y, torch.is_grad_enabled()))
        return self.scale * x


def halving_of(steps, weighting="snr_trunc", prediction="v", **schedule):
    schedule = make_schedule(**(schedule or {"name": "squared_cosine", "steps": 1024}))
    time_input = "index" if schedule.steps else "999t"
    teacher, student = (Denoiser(Linear(scale), schedule, prediction, time_input) for scale in (0.3, 0.2))
    return Halving(teacher, steps, weighting), student


def batch_of(n=64):
    return Batch(torch.randn(n, 1, 4, 4), {"y": torch.arange(n)}, torch.arange(n), seed=0, step=0)


def test_times_labels_and_gradients():
    halving, student = halving_of(8)
    batch = batch_of()
    losses = halving(student, batch)
    assert losses.shape == (64,)
    losses.mean().backward()
    assert student.net.scale.grad is not None
    assert halving.teacher.net.scale.grad is None
    (own, labels, grad), = student.net.seen
    i = torch.floor(batch.uniform() * 8)
    assert torch.equal(own.double(), 1024 * (i + 1) / 8 - 1)  # the step index of u = (i + 1) / N
    assert len(own.unique()) == 8
    assert grad
    first, second = halving.teacher.net.seen
    assert torch.equal(first[0], own)
    assert torch.equal(second[0], own - 64)
    assert not first[2]
    assert not second[2]
    assert all(torch.equal(each, batch.cond["y"]) for each in (labels, first[1], second[1]))


def test_a_student_that_is_its_targets_source_has_no_loss():
    halving, _ = halving_of(4)
    loss = halving.loss_at(torch.zeros(64, dtype=torch.int64), halving.teacher, batch_of())
    assert loss.max() > 1e-4  # one step of a linear network is not two
    perfect = Denoiser(Linear(), halving.teacher.schedule, "v", "index")
    perfect._predict = lambda x_t, out, alpha, sigma: Prediction(target + 0 * out, None)
    batch, i = batch_of(), torch.arange(64) % 4
    z = perfect.diffuse(batch.x_0, batch.noise(), halving.ts[2 * i + 2])
    target = two_step_target(halving.teacher, perfect.schedule, z,
                             halving.ts[torch.stack([2 * i + 2, 2 * i + 1, 2 * i])], batch.cond)
    assert torch.equal(halving.loss_at(i, perfect, batch), torch.zeros(64))


def test_weightings():
    batch, i = batch_of(), torch.arange(64) % 8
    losses = {}
    for weighting in WEIGHTINGS:
        halving, student = halving_of(8, weighting)
        losses[weighting] = halving.loss_at(i, student, batch)
        snr = halving.teacher.schedule.logsnr((i + 1) / 8).exp().float()
    for weighting, weight in (("snr", snr), ("snr+1", snr + 1), ("snr_trunc", snr.clamp(min=1))):
        torch.testing.assert_close(losses[weighting], weight * losses["const"])
    assert snr.min() < 1 < snr.max()

    # snr+1 is the squared error of v, snr that of eps
    z = student.diffuse(batch.x_0, batch.noise(), (i + 1) / 8)
    ts = halving.ts[torch.stack([2 * i + 2, 2 * i + 1, 2 * i])]
    target = two_step_target(halving.teacher, student.schedule, z, ts, batch.cond)
    alpha, sigma = student.alpha_sigma(ts[0], z)
    eps = (z - alpha * target) / sigma
    with torch.no_grad():
        estimate = student(z, ts[0], batch.cond)
        v = student.output(z, ts[0], batch.cond)
    for name, error in (("snr", estimate.eps - eps), ("snr+1", v - (alpha * eps - sigma * target))):
        expected = error.square().flatten(1).mean(1)
        torch.testing.assert_close(losses[name].detach(), expected, rtol=1e-3, atol=1e-6)


def test_distillers_loss():
    """Target, labels, clipping and weight of diffusion_distiller, written down from its formulas."""
    steps, gamma, batch = 8, 0.3, batch_of()
    batch = dataclasses.replace(batch, x_0=2 * batch.x_0, cond={})  # far enough out that estimates are clipped
    taught, own = (make_schedule("squared_cosine", steps=count) for count in (2 * steps, steps))
    teacher = Denoiser(Linear(0.3), taught, "v", "index", time_scale=64)
    student = Denoiser(Linear(0.2), own, "v", "index", time_scale=128)
    halving = Halving(teacher, steps, "gamma", gamma, "x2", clip_teacher=True)
    i = torch.arange(64) % steps
    losses = halving.loss_at(i, student, batch)

    def amplitudes(schedule, index):
        t = (index + 1).double() / schedule.steps
        return (each.float().view(-1, 1, 1, 1) for each in (schedule.alpha(t), schedule.sigma(t)))

    (alpha, sigma), (alpha_1, sigma_1), (alpha_s, sigma_s) = (
        amplitudes(taught, 2 * i + 1), amplitudes(taught, 2 * i), amplitudes(own, i))
    z = alpha * batch.x_0 + sigma * batch.noise()
    rec = (alpha * z - sigma * 0.3 * z).clamp(-1, 1)
    assert (rec.abs() == 1).any()
    z_1 = alpha_1 * rec + sigma_1 / sigma * (z - alpha * rec)
    x_2 = (alpha_1 * z_1 - sigma_1 * 0.3 * z_1).clamp(-1, 1)
    v_2 = alpha_s * (z - alpha_s * x_2) / sigma_s - sigma_s * x_2
    w = (1 + alpha_s / sigma_s) ** gamma
    expected = (w * (0.2 * z - v_2)).square().flatten(1).mean(1)
    torch.testing.assert_close(losses.detach(), expected, rtol=1e-3, atol=1e-6)
    (labels, _, _), = student.net.seen
    assert torch.equal(labels, 128.0 * i)
    first, second = (seen[0] for seen in teacher.net.seen)
    assert torch.equal(first, 64.0 * (2 * i + 1))
    assert torch.equal(second, 64.0 * 2 * i)
    assert (first - labels == 64).all()  # the student starts with labels that are behind its teacher's


def test_both_predictions_are_one():
    """A network that is right in x_0 and in eps is right in their mean; one wrong answer counts where it is weak."""
    schedule = make_schedule("cosine")
    t = torch.tensor([0.02, 0.5, 0.98], dtype=torch.float64)
    alpha, sigma = (each.view(-1, 1, 1, 1) for each in (schedule.alpha(t), schedule.sigma(t)))
    x_0, eps = torch.randn(2, 3, 1, 4, 4, dtype=torch.float64)
    x_t = alpha * x_0 + sigma * eps
    out = TARGETS["both"](x_0, eps, alpha, sigma)
    assert out.shape == (3, 2, 4, 4)
    prediction = PREDICTIONS["both"](x_t, out, alpha, sigma)
    torch.testing.assert_close(prediction.x_0, x_0)
    torch.testing.assert_close(prediction.eps, eps)
    wrong_x_0 = PREDICTIONS["both"](x_t, torch.cat([x_0 + 1, eps], 1), alpha, sigma).x_0 - x_0
    torch.testing.assert_close(wrong_x_0, (sigma**2).expand_as(x_0))
    wrong_eps = PREDICTIONS["both"](x_t, torch.cat([x_0, eps + 1], 1), alpha, sigma).x_0 - x_0
    torch.testing.assert_close(wrong_eps, (-alpha * sigma).expand_as(x_0))


class Labelled(torch.nn.Module):
    """Answers with its label; a network with `scales` adds the guidance that it is given."""

    def __init__(self, scales=False):
        super().__init__()
        self.scales, self.seen = scales, []

    def forward(self, x, timesteps, y, guidance=None):
        assert (guidance is not None) == self.scales
        self.seen.append((y, guidance))
        out = torch.sin(x) * (1 + y.float()).view(-1, 1, 1, 1)
        return out + guidance.view(-1, 1, 1, 1) if self.scales else out


def guided_halving(guidance, scales=False):
    schedule = make_schedule("squared_cosine", steps=1024)
    return Halving(Denoiser(Labelled(scales), schedule, "v", "index"), 8, guidance=guidance)


def test_guided_teacher():
    batch, i = batch_of(8), torch.arange(8)
    batch = dataclasses.replace(batch, cond={"y": torch.arange(8) % 3})
    fixed = guided_halving(Guidance(2.5, 2.5, null_label=10, as_input=False))
    student = Denoiser(Labelled(), fixed.teacher.schedule, "v", "index")
    losses = fixed.loss_at(i, student, batch)
    pairs = [y.tolist() for y, _ in fixed.teacher.net.seen]
    assert pairs == [[*batch.cond["y"].tolist(), *[10] * 8]] * 2  # both teacher steps are guided
    ts = fixed.ts[torch.stack([2 * i + 2, 2 * i + 1, 2 * i])]
    z = student.diffuse(batch.x_0, batch.noise(), ts[0])
    teacher = guided(fixed.teacher, 2.5, {"y": torch.full((8,), 10)})
    target = two_step_target(teacher, student.schedule, z, ts, batch.cond)
    expected = (student(z, ts[0], batch.cond).x_0 - target).square().flatten(1).mean(1)
    torch.testing.assert_close(losses, expected * student.schedule.logsnr(ts[0]).exp().clamp(min=1).float())


def test_scale_as_an_input():
    batch, i = batch_of(64), torch.arange(64) % 8
    first = guided_halving(Guidance(1.0, 4.0, null_label=70, as_input=True))
    student = Denoiser(Labelled(scales=True), first.teacher.schedule, "v", "index")
    losses = first.loss_at(i, student, batch)
    (_, w), = student.net.seen
    assert (w.dtype, w.shape) == (torch.float32, (64,))
    assert 1 <= w.min() < 1.5 < 3.5 < w.max() <= 4
    # one image at a time, each with its own scale, gives the same
    for k in (0, 5, 63):
        alone = guided_halving(Guidance(float(w[k]), float(w[k]), null_label=70, as_input=True))
        one = Batch(batch.x_0[k:k + 1], {"y": batch.cond["y"][k:k + 1]}, batch.positions[k:k + 1], seed=0, step=0)
        torch.testing.assert_close(alone.loss_at(i[k:k + 1], student, one)[0], losses[k])
    # the next teacher takes the scale as its student does, in one row an image
    later = guided_halving(Guidance(1.0, 4.0, null_label=None, as_input=True), scales=True)
    later.loss_at(i, student, batch)
    assert all(torch.equal(given, w) and len(y) == 64 for y, given in later.teacher.net.seen)


def test_mistakes():
    with pytest.raises(UserError, match="distill.weighting='snr2' is unknown; choose from const, snr, snr_trunc, snr"):
        halving_of(8, "snr2")
    with pytest.raises(UserError, match="distill.start_steps=1026: the teacher's schedule has 1024 steps"):
        halving_of(513)
    halving_of(513, name="vp_linear")
    with pytest.raises(UserError, match="distill.target='x3' is unknown; choose from ddim2, x2"):
        Halving(halving_of(8)[0].teacher, 8, target="x3")
    with pytest.raises(UserError, match="distill.sampler='euler_sde' is unknown; choose from ddim, ddpm"):
        student_sampler(8, make_schedule("cosine"), "euler_sde")


def test_student_samples_on_its_training_times():
    for options in SCHEDULES:
        schedule = make_schedule(**options)
        sampler = student_sampler(8, schedule)
        ts = time_grid(sampler["grid"], sampler["steps"], schedule, sampler["t_start"], sampler["t_end"])
        torch.testing.assert_close(ts, torch.arange(8, -1, -1, dtype=torch.float64) / 8)

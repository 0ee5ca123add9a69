"""Progressive distillation: one step of the student is two of the teacher's, exactly."""

import json

import pytest
import torch

import distillate
import train
from libs import config as config_files
from libs.build import adopt_sampler
from libs.checkpoint import load_described
from libs.denoiser import Denoiser, Prediction
from libs.distillation import WEIGHTINGS, Halving, student_sampler, two_step_target
from libs.distillation.progressive import refuse_other_steps
from libs.errors import UserError
from libs.samplers.ddim import ddim
from libs.schedule import make_schedule, time_grid
from libs.training.batches import Batch
from libs.training.state import Checkpoints

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
@pytest.mark.parametrize("steps", [1, 2, 8, 64])
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

        if i == 0:  # onto clean data, where the sampler returns x_0
            middle = ddim(teacher, z, three[:2], schedule)
            expected, reached = teacher(middle, three[1]).x_0, target
        else:
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


def test_mistakes():
    with pytest.raises(UserError, match="distill.weighting='snr2' is unknown; choose from const, snr, snr_trunc, snr"):
        halving_of(8, "snr2")
    with pytest.raises(UserError, match="distill.steps=0 must be at least 1"):
        halving_of(0)
    with pytest.raises(UserError, match="distill.steps=513: its teacher would make 1026 steps, the schedule has 1024"):
        halving_of(513)
    halving_of(513, name="vp_linear")
    refuse_other_steps({}, 8)
    refuse_other_steps({"sampler": {"steps": 16}}, 8)
    for held in (8, 15, 32):
        with pytest.raises(UserError, match=f"distill.steps=8: the teacher was itself distilled, to {held} steps"):
            refuse_other_steps({"sampler": {"steps": held}}, 8)


def test_student_samples_on_its_training_times():
    for options in SCHEDULES:
        schedule = make_schedule(**options)
        sampler = student_sampler(8, schedule)
        ts = time_grid(sampler["grid"], sampler["steps"], schedule, sampler["t_start"], sampler["t_end"])
        torch.testing.assert_close(ts, torch.arange(8, -1, -1, dtype=torch.float64) / 8)


# distillate.py

TINY = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.patch_size=4",
        "--config.backbone.embed_dim=16", "--config.backbone.depth=2", "--config.backbone.num_heads=2",
        "--config.train.steps=6", "--config.train.batch_size=8", "--config.train.log_every=1",
        "--config.train.save_every=2", "--config.train.preview_every=0")
PLAIN, STUDENT = "--config=configs/digits_uvit.py", "--config=configs/digits_uvit.py:progressive"


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Networks this small are slower on two."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("teacher")
    assert train.main([PLAIN, *TINY, f"--workdir={workdir}"]) == 0
    return workdir


@pytest.fixture(scope="module")
def student(teacher, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("student")
    argv = [STUDENT, *TINY, "--config.distill.steps=4", f"--checkpoint={teacher}", f"--workdir={workdir}"]
    assert distillate.main(argv) == 0
    return workdir


def test_student_knows_its_sampler(teacher, student):
    weights = Checkpoints(student / "ckpts").path(6) / "backbone_ema.safetensors"
    net, description = load_described(weights)
    _, taught = load_described(Checkpoints(teacher / "ckpts").path(6) / "backbone_ema.safetensors")
    assert description["sampler"] == {"name": "ddim", "steps": 4, "grid": "trailing", "eta": 0.0, "t_start": 1.0,
                                      "t_end": 0.0}
    assert all(description[name] == taught[name] for name in ("backbone", "schedule", "denoiser", "cond", "codec"))
    assert net(torch.zeros(1, 1, 8, 8), torch.zeros(1), y=torch.zeros(1, dtype=torch.int64)).shape == (1, 1, 8, 8)
    config = config_files.load("configs/digits_uvit.py")
    adopt_sampler(config, description)
    assert (config.sampler.name, config.sampler.steps, config.sampler.grid) == ("ddim", 4, "trailing")
    held = json.loads((student / "config.json").read_text())
    assert (held["start"], held["distill"]["steps"]) == (str(teacher), 4)


def test_student_starts_from_its_teacher(teacher, tmp_path, run_main):
    argv = [STUDENT, *TINY, "--config.distill.steps=4", f"--checkpoint={teacher}", f"--workdir={tmp_path}",
            "--config.train.steps=1", "--config.train.lr=1e-12"]
    assert run_main(distillate.main, *argv).status == 0
    taught, learnt = (Checkpoints(folder / "ckpts").load(step) for folder, step in ((teacher, 6), (tmp_path, 1)))
    for name, tensor in taught.ema.items():
        torch.testing.assert_close(learnt.weights[name], tensor, atol=1e-9, rtol=0)


def test_killed_distillation_goes_on_bit_for_bit(teacher, student, tmp_path, run_main, monkeypatch):
    argv = [STUDENT, *TINY, "--config.distill.steps=4", f"--checkpoint={teacher}", f"--workdir={tmp_path}"]
    with monkeypatch.context() as patch:
        def loss(self, learner, batch):
            if batch.step == 5:
                raise KeyboardInterrupt
            return plain(self, learner, batch)

        plain = Halving.__call__
        patch.setattr(Halving, "__call__", loss)
        assert run_main(distillate.main, *argv).status == 130
    ran = run_main(distillate.main, *argv)
    assert ran.status == 0
    assert "going on from step 4" in ran.stderr
    one, other = (Checkpoints(folder / "ckpts").load(6) for folder in (student, tmp_path))
    assert all(torch.equal(one.weights[name], other.weights[name]) for name in one.weights)
    for index, held in one.state["optimizer"].items():
        assert all(torch.equal(held[name], other.state["optimizer"][index][name]) for name in held)
    assert "is finished: 6 steps" in run_main(distillate.main, *argv).stderr


def test_student_becomes_a_teacher_of_half_its_steps(student, tmp_path, run_main):
    argv = [STUDENT, *TINY, f"--checkpoint={student}", f"--workdir={tmp_path}", "--config.train.steps=1"]
    ran = run_main(distillate.main, *argv, "--config.distill.steps=3")
    assert (ran.status, ran.stderr) == (2, "error: --config.distill.steps=3: the teacher was itself distilled, to 4 "
                                           "steps; a halving makes 2 of them\n")
    assert run_main(distillate.main, *argv, "--config.distill.steps=2").status == 0


def test_config_without_distillation(tmp_path, run_main):
    ran = run_main(distillate.main, PLAIN, f"--workdir={tmp_path}")
    assert (ran.status, ran.stderr) == (2, f"error: {PLAIN} names no distillation; write {STUDENT}\n")

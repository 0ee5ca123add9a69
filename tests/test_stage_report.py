"""Reports of the stages of a progressive distillation: each is sampled as it should be, scored once, and drawn."""

import copy
import json

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from libs import config as config_files
from libs.build import describe, make_chain
from libs.checkpoint import save_backbone
from libs.distillation import stage_report, student_sampler
from libs.distillation.stage_report import StageReport, base_samplings, reference_steps, sample_student, sample_teacher
from libs.distillation.student import legacy_labels, prepare_conversion, prepare_halving
from libs.errors import UserError
from libs.evaluation import Metrics, Request, score_seeds
from libs.processes import Processes
from libs.schedule import make_schedule
from libs.training import new_network

CPU = torch.device("cpu")
IMAGES = 4


def tiny_config(name="cifar10_uvit_tiny", images=IMAGES, **sampler):
    config = config_files.load(f"configs/{name}.py:progressive")
    with config.unlocked():
        config.compute.update(device="cpu", rows=8)
        if config.backbone.name == "uvit":
            config.backbone.update(patch_size=config.backbone.img_size // 2, embed_dim=16, depth=2, num_heads=2)
        config.distill.report_images = images
        config.sampler.update(**sampler)
    return config


def first_teacher(config):
    net, description = new_network(config)
    return net.eval(), description


def student_of(config, teacher, steps):
    """A student that was moved a little from where it starts."""
    own = config.copy_and_resolve_references()
    with own.unlocked():
        own.distill.steps = steps
    net, description, _ = prepare_halving(own, *teacher, "fp32", CPU)
    with torch.no_grad():
        for each in net.parameters():
            each.add_(0.02 * torch.randn_like(each))
    return net.eval(), description


def report_of(config, workdir):
    return StageReport(config, workdir, Processes(CPU), "fp32")


def add(report, teacher, student, steps):
    report.add(f"steps_{steps:04d}", (f"teacher, {2 * steps} steps", teacher, 2 * steps),
               (f"student, {steps} steps", student, steps))


class Reported:
    """A finished report of students of 4 and 2 steps."""

    def __init__(self, workdir):
        self.workdir, self.config = workdir, tiny_config()
        self.base = first_teacher(self.config)
        self.students = {}
        teacher = self.base
        for steps in (4, 2):
            teacher = self.students[steps] = student_of(self.config, teacher, steps)
        self.report = self.again()

    def again(self):
        report, teacher = report_of(self.config, self.workdir), self.base
        for steps, student in self.students.items():
            add(report, teacher, student, steps)
            teacher = student
        report.finish(self.base, list(self.students))
        return report


@pytest.fixture(scope="module")
def reported(tmp_path_factory):
    torch.manual_seed(0)
    return Reported(tmp_path_factory.mktemp("reported"))


def files(workdir):
    return sorted(str(path.relative_to(workdir)) for path in workdir.rglob("*")
                  if path.is_file() and "tensorboard" not in path.parts)


def chain_by_hand(config, model, sampler):
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.sampler.update(**sampler)
    return make_chain(config, model[0], model[1], CPU)


def test_files_and_scores(reported):
    assert files(reported.workdir) == ["pairs/steps_0002.png", "pairs/steps_0004.png", "quality.md", "quality.png",
                                       "report.json"]
    scores = json.loads((reported.workdir / "report.json").read_text())["scores"]
    assert sorted(scores) == ["ddim_0002", "ddim_0004", "ddim_0050", "dpm_solver_pp_0002", "dpm_solver_pp_0004",
                              "steps_0002", "steps_0004"]
    assert all(score["steps"] == score["calls"] == int(name[-4:]) for name, score in scores.items())
    values = {name: score["metrics"]["frechet_cifar10"]["value"] for name, score in scores.items()}
    assert len(set(values.values())) == 7
    sampled = {"steps_0004": (reported.students[4], {"grid": "uniform", "steps": 4}),
               "ddim_0002": (reported.base, {"grid": "uniform", "steps": 2}),
               "dpm_solver_pp_0004": (reported.base, {"name": "dpm_solver_pp", "order": 2, "grid": "logsnr", "steps": 4,
                                                      "t_end": 1e-4})}
    for name, (model, sampler) in sampled.items():
        metrics = Metrics(Request(reported.config.eval, IMAGES, (32, 32, 3), CPU, reported.config.data))
        chain = chain_by_hand(reported.config, model, sampler)
        score_seeds(metrics, chain, list(range(IMAGES)), bar=False)
        expected = metrics.compute(Processes(CPU))["frechet_cifar10"]
        assert values[name] == pytest.approx(expected["value"], rel=1e-6)
        assert scores[name]["metrics"]["frechet_cifar10"]["samples"] == IMAGES == scores[name]["images"]
    assert reported.report.values("steps_0004") == {
        "quality": {"frechet_cifar10": values["steps_0004"], "images": IMAGES}}
    assert reported.report.values("steps_0001") == {}


def test_pictures_show_the_teacher_above_its_student(reported):
    picture = np.array(Image.open(reported.workdir / "pairs/steps_0002.png"))
    assert picture.shape[0] == 4 + 2 * (64 + 4)  # 32 pixels a side are enlarged twice
    grid = picture[:, -(4 + 16 * (64 + 4)):]
    for top, model, steps in ((4, reported.students[4], 4), (4 + 68, reported.students[2], 2)):
        chain = chain_by_hand(reported.config, model, model[1]["sampler"])
        assert chain.nfe == steps
        images = torch.cat([images for _, images in chain.images(list(range(16)))])
        for i in (0, 15):
            shown = grid[top:top + 64:2, 4 + 68 * i:4 + 68 * i + 64:2]
            assert np.array_equal(shown, images[i].numpy())


def test_students_of_a_converted_model(tmp_path):
    """The base goes on sampling by its own prediction, beside students of another one."""
    config = tiny_config(images=2)
    base = first_teacher(config)
    net, description, _ = prepare_conversion(config, *base)
    student = student_of(config, (net.eval(), description), 4)
    assert (base[1]["denoiser"]["prediction"], student[1]["denoiser"]["prediction"]) == ("eps", "v")
    report = report_of(config, tmp_path)
    add(report, (net, description), student, 4)
    report.finish(base, [4])
    scores = report.held["scores"]
    assert sorted(scores) == ["ddim_0004", "ddim_0050", "dpm_solver_pp_0004", "steps_0004"]
    for name, model in (("ddim_0004", base), ("dpm_solver_pp_0004", base), ("steps_0004", student)):
        metrics = Metrics(Request(config.eval, 2, (32, 32, 3), CPU, config.data))
        score_seeds(metrics, chain_by_hand(config, model, scores[name]["sampler"]), [0, 1], bar=False)
        assert scores[name]["metrics"]["frechet_cifar10"]["value"] == pytest.approx(
            metrics.compute(Processes(CPU))["frechet_cifar10"]["value"], rel=1e-6)
    assert "\n| 4 | " in (tmp_path / "quality.md").read_text()


def test_table(reported):
    text = (reported.workdir / "quality.md").read_text()
    scores = reported.report.held["scores"]
    four = [f"{scores[name]['metrics']['frechet_cifar10']['value']:.4g}"
            for name in ("steps_0004", "ddim_0004", "dpm_solver_pp_0004")]
    assert "\n| steps | student | DDIM | DPM-Solver++ |\n" in text
    assert f"\n| 4 | {' | '.join(four)} |\n| 2 | " in text
    assert f"## frechet_cifar10, {IMAGES} images a number" in text
    assert "two calls" not in text
    with Image.open(reported.workdir / "quality.png") as image:
        assert image.size == (900, 576)


def test_tensorboard(reported):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(reported.workdir / "tensorboard")).Reload()
    curve = {event.step: event.value for event in events.Scalars("frechet_cifar10/student")}
    assert curve == {n: pytest.approx(reported.report.values(f"steps_{n:04d}")["quality"]["frechet_cifar10"])
                     for n in (4, 2)}
    assert [event.step for event in events.Images("teacher above student")] == [4, 2]


def test_what_is_there_is_not_made_again(reported, monkeypatch):
    made, times = [], {name: (reported.workdir / name).stat().st_mtime_ns for name in files(reported.workdir)}
    chain = stage_report.Sampling.chain
    monkeypatch.setattr(stage_report.Sampling, "chain", lambda self, device: made.append(self) or chain(self, device))
    assert reported.again().values("steps_0004") == reported.report.values("steps_0004")
    assert made == []
    unchanged = ("pairs/steps_0002.png", "pairs/steps_0004.png", "report.json")
    assert all((reported.workdir / name).stat().st_mtime_ns == times[name] for name in unchanged)


def test_what_changed_is_made_again(reported, tmp_path, monkeypatch):
    made = []
    chain = stage_report.Sampling.chain
    monkeypatch.setattr(stage_report.Sampling, "chain", lambda self, device: made.append(self) or chain(self, device))
    config = tiny_config(images=2)
    student, report = reported.students[2], report_of(config, tmp_path)
    add(report, reported.students[4], student, 2)
    assert len(made) == 3  # teacher and student of the picture, and the student to be scored
    before = report.values("steps_0002")
    moved = copy.deepcopy(student)
    with torch.no_grad():
        moved[0].pos_embed.add_(0.5)
    add(report, reported.students[4], moved, 2)
    assert len(made) == 6
    assert report.values("steps_0002") != before
    more = report_of(tiny_config(images=3), tmp_path)
    add(more, reported.students[4], moved, 2)
    assert len(made) == 7  # the picture is the same
    assert more.values("steps_0002")["quality"]["images"] == 3
    (tmp_path / "pairs/steps_0002.png").unlink()
    add(more, reported.students[4], moved, 2)
    assert len(made) == 9
    add(more, (moved[0], reported.students[4][1]), moved, 2)  # another teacher, of the same settings
    assert len(made) == 11


@pytest.mark.parametrize("metrics", [(), ("fid", "precision_recall")])
def test_pictures_alone(tmp_path, metrics):
    """Without images to score: the references of these metrics are missing."""
    config = tiny_config("digits_uvit", 0)
    config.eval.metrics = metrics
    base = first_teacher(config)
    student = student_of(config, base, 4)
    report = report_of(config, tmp_path)
    add(report, base, student, 4)
    report.finish(base, [4])
    assert files(tmp_path) == ["pairs/steps_0004.png", "report.json"]
    assert report.values("steps_0004") == {}
    with Image.open(tmp_path / "pairs/steps_0004.png") as image:
        assert (image.mode, image.size[1]) == ("L", 4 + 2 * (64 + 4))


class Watched(nn.Module):
    """Answers with a third of its input, and notes the times it sees; copies of it note them in the same list."""

    def __init__(self, seen):
        super().__init__()
        self.bias, self.seen = nn.Parameter(torch.zeros(())), seen

    def __deepcopy__(self, memo):
        return Watched(self.seen)

    def forward(self, x, timesteps, y=None, context=None):
        self.seen.append((float(timesteps[0]), len(x)))
        return 0.3 * x + self.bias


def test_legacy_students_are_sampled_at_their_own_labels(tmp_path):
    config = tiny_config("digits_uvit", 0, cfg_scale=1.0)
    with config.unlocked():
        config.compute.rows = 16
    description = describe(config)
    description["schedule"] = {"name": "squared_cosine", "steps": 16}
    description["denoiser"] = {"prediction": "v", "time_input": "index", "time_scale": 64}
    models, seen = [description], []
    for steps in (8, 4):
        _, student = legacy_labels(copy.deepcopy(models[-1]), steps)
        models.append(student | {"sampler": student_sampler(steps, make_schedule(**student["schedule"]), "ddpm")})
    models = [(Watched(seen), each) for each in models]
    report = report_of(config, tmp_path)
    add(report, models[0], models[1], 8)
    add(report, models[1], models[2], 4)
    labels = {steps: [1024 // steps * k for k in range(steps - 1, -1, -1)] for steps in (16, 8, 4)}
    assert [time for time, _ in seen] == labels[16] + labels[8] + labels[8] + labels[4]


def test_first_teacher_is_guided_as_it_was_distilled(tmp_path):
    config = tiny_config("digits_uvit", 0, cfg_scale=2.5)
    config.distill.cfg_scale = 3.0
    base = first_teacher(config)
    student = student_of(config, base, 4)
    second = student_of(config, student, 2)
    assert student[1]["distilled"] == {"cfg_scale": 3.0}

    def scale(sampling):
        chain = sampling.chain(CPU)
        return chain.cfg_scale, chain.nfe

    assert scale(sample_teacher(config, base, 8, student[1])) == (3.0, 8)
    assert scale(sample_student(config, student, 4)) == (1.0, 4)
    assert scale(sample_teacher(config, student, 4, second[1])) == (1.0, 4)
    assert {each: scale(sampling) for each, sampling in base_samplings(config, base, [4, 2]).items()} == {
        ("ddim", 4): (3.0, 4), ("dpm_solver_pp", 4): (3.0, 4), ("ddim", 2): (3.0, 2), ("dpm_solver_pp", 2): (3.0, 2),
        ("ddim", 50): (3.0, 50)}
    # without distilled guidance, teacher and student are both guided as the config says
    config.distill.cfg_scale = 1.0
    student = student_of(config, base, 4)
    assert scale(sample_teacher(config, base, 8, student[1])) == (2.5, 8)
    assert scale(sample_student(config, student, 4)) == (2.5, 4)


def test_calls_of_a_guided_pair_are_counted(tmp_path):
    seen = []
    config = tiny_config("cifar10_unet", 2, cfg_scale=2.0)
    with config.unlocked():
        config.distill.cfg_scale = 2.0
        config.compute.rows = 2
    description = describe(config)
    student = copy.deepcopy(description)
    student["cond"].update(null_label=-1)
    student |= {"sampler": student_sampler(2, make_schedule(**student["schedule"])) | {"cfg_scale": 1.0},
                "distilled": {"cfg_scale": 2.0}}
    report = report_of(config, tmp_path)
    base = (Watched(seen), description)
    add(report, base, (Watched(seen), student), 2)
    assert [rows for _, rows in seen[-2:]] == [2, 2]
    seen.clear()
    report.finish(base, [2])
    assert {rows for _, rows in seen} == {4}
    calls = {name: score["calls"] for name, score in report.held["scores"].items()}
    assert calls == {"steps_0002": 2, "ddim_0002": 4, "dpm_solver_pp_0002": 4, "ddim_0050": 100}
    text = (tmp_path / "quality.md").read_text()
    assert "A step takes two calls of the network, for guidance, in the columns DDIM, DPM-Solver++." in text


def test_how_a_first_teacher_is_measured():
    config = tiny_config()
    base = first_teacher(config)
    sections = {each: sampling.config.sampler for each, sampling in base_samplings(config, base, [50, 2]).items()}
    assert list(sections) == [("ddim", 50), ("dpm_solver_pp", 50), ("ddim", 2), ("dpm_solver_pp", 2)]
    assert all(section.steps == steps for (_, steps), section in sections.items())
    last = {"grid": "logsnr", "t_end": 1e-4, "order": 2, "threshold": "static", "threshold_value": 1.0}
    assert sections["dpm_solver_pp", 2].to_dict().items() >= last.items()
    discrete = (base[0], base[1] | {"schedule": {"name": "squared_cosine", "steps": 1024}})
    assert base_samplings(config, discrete, [2])["dpm_solver_pp", 2].config.sampler.t_end == 1 / 1024
    assert base_samplings(config, discrete, [2])["ddim", 2].config.sampler.grid == "trailing"
    # a straight path starts at a log SNR that no grid reaches
    straight = (base[0], base[1] | {"schedule": {"name": "flow_matching"}})
    assert list(base_samplings(config, straight, [2])) == [("ddim", 2), ("ddim", 50)]
    assert reference_steps(base[1]) == 50
    assert reference_steps(base[1] | {"sampler": {"steps": 16}}) == 16
    assert reference_steps(base[1] | {"schedule": {"name": "squared_cosine", "steps": 32}}) == 32


def test_mistakes_are_told_before_any_stage(tmp_path):
    for images, metrics, message in (
            (-1, ("frechet_cifar10",), "--config.distill.report_images=-1 must be at least 0"),
            (500, (), "--config.distill.report_images=500: eval.metrics names nothing to measure"),
            (1, ("frechet_cifar10",), "a Frechet distance needs at least 2 images, not 1"),
            (8, ("frechet",), "eval.metrics='frechet' is unknown; choose from frechet_cifar10"),
            (8, ("class_accuracy",), "class_accuracy needs the seeds of a class-conditional")):
        config = tiny_config(images=images)
        config.eval.metrics = metrics
        with pytest.raises(UserError, match=message):
            report_of(config, tmp_path)
    (tmp_path / "report.json").write_text('{"scores": {"steps_')
    with pytest.raises(UserError, match=r"report.json cannot be read \(.*\); remove it, and the stages are reported"):
        report_of(tiny_config(images=0), tmp_path)


def test_report_again_with_more_images(reported, tmp_path, run_main):
    base, config = tmp_path / "base.safetensors", tiny_config(images=0)
    save_backbone(base, reported.base[0].state_dict(), reported.base[1])
    run, rows, teacher = tmp_path / "run", [], reported.base
    report = report_of(config, run)
    for steps, student in reported.students.items():
        name = f"steps_{steps:04d}"
        save_backbone(run / name / "ckpts/00000001/backbone_ema.safetensors", student[0].state_dict(), student[1])
        add(report, teacher, student, steps)
        rows.append({"name": name, "steps": steps, "finished": True})
        teacher = student
    rows.append({"name": "steps_0001", "steps": 1, "finished": False})
    (run / "stages.json").write_text(json.dumps({"start": str(base), "stages": rows}))
    ran = run_main(stage_report.main, f"--workdir={run}", f"--images={IMAGES}")
    assert ran.status == 0, ran.stderr
    told = {row["name"]: row.get("quality") for row in json.loads((run / "stages.json").read_text())["stages"]}
    assert told == {f"steps_{n:04d}": pytest.approx(reported.report.values(f"steps_{n:04d}")["quality"])
                    for n in (4, 2)} | {"steps_0001": None}
    assert files(run)[:4] == ["pairs/steps_0002.png", "pairs/steps_0004.png", "quality.md", "quality.png"]

    ran = run_main(stage_report.main, f"--workdir={tmp_path}")
    assert ran.status == 2
    assert ran.stderr.strip().endswith(f"{tmp_path / 'stages.json'} cannot be read (No such file or directory); name a "
                                       "folder that distillate.py has made with :progressive")

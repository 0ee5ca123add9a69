"""All stages of progressive distillation in one resumable run (2202.00512, algorithm 2's outer loop).

WORKDIR gets a training folder a stage (convert, steps_0512, steps_0256, ...), each student the next one's teacher, and
stages.json: what each stage is, how far it is, and what its student scored.
"""

import gc
import json
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import nn

from ..backbones.guidance import refuse_without_guidance_input
from ..build import adopt_places, load_model
from ..checkpoint import STAGES
from ..errors import UserError
from ..files import write_json
from ..processes import Processes
from ..training import Run, Trainer, choose_precision, load_training_data, validate
from ..training.run import read_config
from ..training.setup import without_heads
from ..training.state import Checkpoints
from ..weights import weights_digest
from .stage_report import StageReport
from .student import (
    describe_converted,
    describe_first_teacher,
    describe_halving,
    make_guidance,
    prepare_conversion,
    prepare_halving,
    refuse_other_schedule,
    student_prediction,
)

CONVERT = "convert"  # folder of stage 0
LONGER_FROM, LONGER = 2, 2  # students of so few steps learn twice as long, as in the paper
OF_A_STAGE = ("start_steps", "end_steps", "stages", "updates", "lr", "ema", "convert_updates", "convert_lr",
              "convert_ema", "pair_images", "report_images")  # fields of the distill section that plan and report
Model = tuple[nn.Module, dict[str, Any]]  # a network and the description of its checkpoint


@dataclass(frozen=True)
class Stage:
    """One student. steps 0 is the model itself in another prediction, from which the first halving starts."""

    steps: int
    updates: int
    lr: float
    ema: float

    @property
    def name(self) -> str:
        return f"steps_{self.steps:04d}" if self.steps else CONVERT


def is_stage(name: str) -> bool:
    """Whether a stage's folder can have that name."""
    return name == CONVERT or re.fullmatch(r"steps_\d{4,}", name) is not None


def halvings(section: Mapping, teacher_steps: int | None, sampler_steps: int) -> list[int]:
    """The students' numbers of steps, falling, by the `distill` section's start_steps, end_steps and stages.

    Any of the three may be 0, not given. teacher_steps: of a teacher that was itself distilled, else None.
    sampler_steps: the config's, where nothing else says from how many steps to start.

    >>> halvings({"start_steps": 64, "end_steps": 8, "stages": 0}, None, 50)
    [32, 16, 8]
    >>> halvings({"start_steps": 0, "end_steps": 0, "stages": 0}, None, 50)
    [25]
    """
    start, end, stages = section["start_steps"], section["end_steps"], section["stages"]
    for name in ("start_steps", "end_steps", "stages"):
        if section[name] < 0:
            raise UserError(f"--config.distill.{name}={section[name]} must be at least 1, or 0 for what the others say")
    if teacher_steps and start not in (0, teacher_steps):
        raise UserError(f"--config.distill.start_steps={start}: the teacher was itself distilled, to {teacher_steps} "
                        "steps; start there")
    start = start or teacher_steps or (end * 2**stages if end and stages else sampler_steps)
    if not end and not stages and start % 2:
        name = f"--config.{'distill.start_steps' if section['start_steps'] else 'sampler.steps'}={start}"
        if teacher_steps:
            raise UserError(f"--checkpoint: the teacher was itself distilled, to {start} steps, an odd number, which "
                            "cannot be halved")
        raise UserError(f"{name}: an odd number of steps cannot be halved; choose an even --config.distill.start_steps")
    if not end:
        stages = stages or 1
        if start % 2**stages:
            raise UserError(f"--config.distill.stages={stages}: {start} steps cannot be halved so often; "
                            f"at most {len(reachable(start))} times")
        return [start // 2**k for k in range(1, stages + 1)]
    count = (start // end).bit_length() - 1
    if count < 1 or start != end * 2**count:
        raise UserError(f"--config.distill.end_steps={end}: {start} steps, halved again and again, are never {end}; "
                        f"choose from {', '.join(map(str, reachable(start))) or 'none'}")
    if stages not in (0, count):
        raise UserError(f"--config.distill.stages={stages}: from {start} to {end} steps are {count} halvings; leave "
                        "one of start_steps, end_steps and stages out")
    return [start // 2**k for k in range(1, count + 1)]


def reachable(start: int) -> list[int]:
    """Numbers of steps that halving `start` gives.

    >>> reachable(48)
    [24, 12, 6, 3]
    """
    return [start // 2**k for k in range(1, start.bit_length()) if start % 2**k == 0]


def plan(config: ConfigDict, teacher: Mapping[str, Any]) -> list[Stage]:
    """The stages of a run. teacher: the description of its checkpoint."""
    section, train = config.distill, config.train
    steps = halvings(section, distilled_steps(teacher), teacher.get("sampler", config.sampler)["steps"])
    usual = [train.steps * (LONGER if n <= LONGER_FROM else 1) for n in steps]
    columns = zip(steps, _each(section, "updates", usual, int), _each(section, "lr", [train.lr] * len(steps), float),
                  _each(section, "ema", [train.ema] * len(steps), float), strict=True)
    stages = [Stage(*row) for row in columns]
    if student_prediction(section, teacher) != teacher["denoiser"]["prediction"]:
        stages.insert(0, Stage(0, section.convert_updates, section.convert_lr, section.convert_ema))
    for stage in stages:
        for name, fits, want in (("updates", stage.updates >= 1, "be at least 1"), ("lr", stage.lr > 0, "be positive"),
                                 ("ema", 0 <= stage.ema < 1, "lie from 0 to below 1")):
            if not fits:
                raise UserError(f"{flag_of(stage, name, section)}={getattr(stage, name)} must {want}")
    return stages


def distilled_steps(teacher: Mapping[str, Any]) -> int | None:
    """To how many steps a teacher was distilled; None for a model that was not, which can start anywhere."""
    steps = teacher.get("sampler", {}).get("steps")
    untouched = steps == teacher["schedule"].get("steps") and teacher["denoiser"].get("time_scale", 1) == 1
    return None if untouched else steps


def _each(section: Mapping, field: str, usual: Sequence, kind: type) -> Sequence:
    """A value for every stage: those of the field, its only one for all, or the usual ones where it is empty."""
    values = section[field]
    if not all(isinstance(each, int | kind) for each in values):
        raise UserError(f"--config.distill.{field}={values}: want {'whole numbers' if kind is int else 'numbers'}")
    if len(values) not in (0, 1, len(usual)):
        raise UserError(f"--config.distill.{field}={values}: want one value, or one for each of {len(usual)} stages")
    return list(values) * len(usual) if len(values) == 1 else values or usual


def flag_of(stage: Stage, name: str, section: Mapping) -> str:
    """The flag that a stage has its updates, lr or ema from, by the distill section."""
    if not stage.steps:
        return f"--config.distill.convert_{name}"
    return f"--config.distill.{name}" if section[name] else f"--config.train.{'steps' if name == 'updates' else name}"


def stage_config(config: ConfigDict, stage: Stage) -> ConfigDict:
    """The config by which a stage's training folder knows itself: what another stage sets is not in it."""
    own = ConfigDict(config.to_dict())
    own.train.update(steps=stage.updates, lr=stage.lr, ema=stage.ema)
    own.distill = {name: value for name, value in config.distill.items() if name not in OF_A_STAGE}
    own.distill.steps = stage.steps
    return own


class Stages:
    """The run in `workdir`, from the checkpoint `start`. overrides: see `adopt_places`."""

    def __init__(self, config: ConfigDict, workdir: Path, start: str, processes: Processes,
                 overrides: Collection[str] = ()):
        self.config, self.workdir, self.start, self.processes = config, workdir, start, processes
        if Checkpoints(workdir / "ckpts").steps():
            raise UserError(f"--workdir={workdir} is the folder of a training; choose another one for its students")
        self.precision = choose_precision(config)
        self.base: Model = without_heads(*load_model(config, start))
        adopt_places(config, self.base[1], overrides)
        refuse_other_schedule(config, self.base[1], overrides)
        guidance = make_guidance(config, self.base[1])
        if guidance is not None and guidance.as_input and guidance.null_label is not None:
            refuse_without_guidance_input(self.base[0])
        self.teacher: Model = (self.base[0], describe_first_teacher(config.distill, self.base[1]))
        self.stages = plan(config, self.teacher[1])
        self.runs = self._open()
        self.report = StageReport(config, workdir, processes, self.precision)
        self.data = None

    def run(self, began: float) -> int:
        """Every stage that is not finished yet. Returns the exit status as Trainer.train does.

        began: `time.monotonic()` from which `train.max_minutes` counts, over all stages.
        """
        teacher = self.teacher
        for stage, run in zip(self.stages, self.runs, strict=True):
            self.write_manifest()
            student, status = self.run_stage(stage, run, teacher, began)
            self.write_manifest()  # before the report, which takes its time
            if student is None:
                return status
            if stage.steps:
                self.report.add(stage.name, (f"teacher, {2 * stage.steps} steps", teacher, 2 * stage.steps),
                                (f"student, {stage.steps} step{'s' * (stage.steps > 1)}", student, stage.steps))
            teacher = student
        students = [stage for stage in self.stages if stage.steps]
        self.report.finish(self.base, [stage.steps for stage in students])
        self.write_manifest()
        logging.info("finished: students of %s steps in %s", ", ".join(str(each.steps) for each in students),
                     self.workdir)
        return 0

    def _open(self) -> list[Run]:
        """The training folder of every stage. What would fail in a later one is told here, before the first."""
        runs, source, description = [], self.start, self.teacher[1]
        self._refuse_other_plan()
        for stage in self.stages:
            config = stage_config(self.config, stage)
            validate(config, self.processes.count)
            if stage.steps:
                _, description, _ = describe_halving(config, description)
            else:
                description = describe_converted(config, description)
            flags = {f"train.{name}": flag_of(stage, name, self.config.distill) for name in ("lr", "ema")}
            runs.append(Run(self.workdir / stage.name, config, source, self.processes, flags))
            source = stage.name
        for stage, run, later in zip(self.stages, runs, runs[1:], strict=False):
            done = max(run.checkpoints.steps(), default=0)
            if done < stage.updates and later.checkpoints.steps():
                raise UserError(f"{flag_of(stage, 'updates', self.config.distill)}={stage.updates}: {later.workdir} "
                                f"learned from {stage.name} after {done} updates; remove that folder and those of the "
                                "stages after it, or choose another --workdir")
        return runs

    def _refuse_other_plan(self) -> None:
        """A folder whose students came from other stages than the plan's is another run's."""
        planned = {stage.name: source for stage, source in
                   zip(self.stages, [self.start, *(each.name for each in self.stages)], strict=False)}
        begun = {path.parent.name: path.parent for path in sorted(self.workdir.glob("*/ckpts"))
                 if is_stage(path.parent.name) and Checkpoints(path).steps()}
        last = self.stages[-1].steps
        problem = None
        for name, folder in begun.items():
            if name not in planned and (name == CONVERT or int(name.removeprefix("steps_")) > last):
                problem = f"{folder} is a stage of the run there, and none of this one"
            elif name in planned:
                held = read_config(folder).get("start")
                if held != planned[name] and any(map(is_stage, (str(held), planned[name]))):
                    problem = f"{folder} learned from {held}, not from {planned[name]}"
            if problem:
                raise UserError(f"{self._flag_of_plan(CONVERT in begun)}: {problem}; go on with the settings of that "
                                "run, or choose another --workdir")

    def _flag_of_plan(self, converted: bool) -> str:
        """The flag by which the plan differs from the run in the folder. converted: whether that has a stage 0."""
        section = self.config.distill
        try:
            start = json.loads((self.workdir / STAGES).read_text())["start"]
        except (OSError, ValueError, KeyError, TypeError):
            start = self.start
        if start != self.start:
            return f"--checkpoint={self.start}"
        if converted != (self.stages[0].name == CONVERT):
            return f"--config.distill.prediction={section.prediction}"
        by_stages = not section.start_steps and section.end_steps and section.stages
        field = "stages" if by_stages else "start_steps"
        return f"--config.distill.{field}={section[field]}"

    def run_stage(self, stage: Stage, run: Run, teacher: Model, began: float) -> tuple[Model | None, int]:
        """(the stage's student, 0), or (None, the exit status) where it was stopped before its end."""
        config = run.config
        run.start_from(weights_digest(teacher[0]))
        saved = run.resume()
        if saved is None or saved.step < stage.updates:
            if stage.steps:
                net, description, objective = prepare_halving(config, *teacher, self.precision, self.processes.device)
            else:
                net, description, objective = prepare_conversion(config, *teacher)
            self.data = self.data or load_training_data(config.data, description, self.processes.device)
            logging.info("%s: %d updates at learning rate %g, teacher %s", stage.name, stage.updates, stage.lr,
                         run.start)
            trainer = Trainer(config, run, net, description, objective, self.precision)
            trainer.restore(saved)
            status = trainer.train(self.data, began)
            done = self.processes.agree(trainer.step)  # and wait until the main process has written the checkpoint
            del trainer, net, objective
            gc.collect()  # before the next stage's networks come
            if self.processes.device.type == "cuda":
                torch.cuda.empty_cache()
            if status or done < stage.updates:
                return None, status
        return load_model(config, str(run.workdir)), 0

    def write_manifest(self) -> None:
        """stages.json, by which --checkpoint=WORKDIR finds the last finished student."""
        if not self.processes.is_main:
            return
        rows = []
        for stage in self.stages:
            done = max(Checkpoints(self.workdir / stage.name / "ckpts").steps(), default=0)
            rows.append({"name": stage.name, **asdict(stage), "done": done, "finished": done >= stage.updates,
                         **self.report.values(stage.name)})
        write_json(self.workdir / STAGES, {"start": self.start, "stages": rows})

"""What every stage of progressive distillation is worth, in pictures and numbers.

WORKDIR gets pairs/steps_0008.png (the teacher's images above its student's, seed by seed), report.json (every score
with what it is of; what is there already is not made again), quality.png and quality.md (the students beside the model
that the run started from, at as many steps). Score a finished run anew with more images:

    python -m libs.distillation.stage_report --workdir=runs/students --images=4000
"""

import copy
import functools
import gc
import hashlib
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from absl import flags as absl_flags
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor, nn

from .. import cli
from ..build import MODEL_SECTIONS, adopt_sampler, load_model, make_chain, prepare_backbone
from ..checkpoint import STAGES
from ..data.images import save_png
from ..errors import UserError
from ..evaluation import Metrics, Request
from ..files import atomic_path, reason, write_json
from ..generate import Chain
from ..methods import dpm_solver_pp
from ..montage import montage
from ..processes import Processes
from ..schedule import make_schedule
from ..seeds import parse_labels
from ..training.batches import OF_DATA, load_training_data, show_data
from ..training.quality import score
from ..weights import weights_digest
from .progressive import student_sampler
from .quality_curve import DDIM, DPM_SOLVER_PP, LABELS, STUDENT, draw, report_text
from .student import make_guidance

REFERENCE = 50  # DDIM steps of the model itself, drawn as a line
FILE = "report.json"
MEASURED_BY = ("metrics", "reference", "fid_mode", "features")  # fields of the eval section that decide a score
Model = tuple[nn.Module, dict[str, Any]]  # a network on the CPU in float32, and the description of its checkpoint


class Sampling(NamedTuple):
    """One way to make images."""

    net: nn.Module
    description: dict[str, Any]
    config: ConfigDict  # its sampler section is this network's

    def chain(self, device: torch.device) -> Chain:
        net = prepare_backbone(copy.deepcopy(self.net), self.config.compute, device)
        return make_chain(self.config, net, self.description, device)

    def settings(self) -> dict[str, Any]:
        """All but the weights that decides the images."""
        described = {name: self.description[name] for name in MODEL_SECTIONS}
        return described | {"sampler": self.config.sampler.to_dict(), "policy": self.config.policy.to_dict(),
                            "precision": self.config.compute.precision}


def sample_student(config: ConfigDict, student: Model, steps: int) -> Sampling:
    """By its own sampler section."""
    own = ConfigDict(config.to_dict())
    adopt_sampler(own, student[1])
    own.sampler.steps = steps
    return Sampling(*student, own)


def sample_teacher(config: ConfigDict, teacher: Model, steps: int, student: Mapping[str, Any]) -> Sampling:
    """By its own sampler section, or else the student's (a description); with the guidance that the student learnt."""
    own = ConfigDict(config.to_dict())
    adopt_sampler(own, student)
    own.sampler.cfg_scale = student.get("distilled", {}).get("cfg_scale", config.sampler.cfg_scale)
    adopt_sampler(own, teacher[1])
    own.sampler.steps = steps
    return Sampling(*teacher, own)


def sample_base(config: ConfigDict, base: Model, solver: str, steps: int) -> Sampling:
    """By DDIM on the students' times, or DPM-Solver++ as the method of that name sets it; guided as a first teacher."""
    own, description = ConfigDict(config.to_dict()), base[1]
    guidance = make_guidance(config, description)
    if guidance is not None:
        own.sampler.cfg_scale = min(max(config.sampler.cfg_scale, guidance.low), guidance.high)
    adopt_sampler(own, description)
    own.schedule = description["schedule"]  # by which DPM-Solver++ knows where to end
    own.sampler.update(student_sampler(steps, make_schedule(**own.schedule)))
    if solver == DPM_SOLVER_PP:
        dpm_solver_pp(own)
    return Sampling(*base, own)


def base_samplings(config: ConfigDict, base: Model, steps: Sequence[int]) -> dict[tuple[str, int], Sampling]:
    """{(solver, steps): how the model itself is measured}, the reference last."""
    schedule = make_schedule(**base[1]["schedule"])
    solvers = [DDIM, DPM_SOLVER_PP]
    if schedule.lambda_(torch.ones((), dtype=torch.float64)).isinf():  # no grid in log SNR reaches t = 1
        solvers.remove(DPM_SOLVER_PP)
    wanted = [(solver, n) for n in steps for solver in solvers] + [(DDIM, reference_steps(base[1]))]
    return {each: sample_base(config, base, *each) for each in dict.fromkeys(wanted)}


def reference_steps(base: Mapping[str, Any]) -> int:
    """50, or as many as a model has that was itself distilled to fewer."""
    own = (base.get("sampler", {}).get("steps"), base["schedule"].get("steps"))
    return min([REFERENCE, *filter(None, own)])


class StageReport:
    """Reports into `workdir`; `distill.report_images` images are scored, seeds 0, 1, ..., and for 0 nothing is.

    config      its `eval` section names the metrics, `sampler` is what a model's description leaves open
    processes   they share the scored seeds; the main one writes
    precision   fp32, bf16 or fp16, of the networks' passes
    Raises UserError at once for what a metric misses, so that no stage is trained in vain.
    """

    def __init__(self, config: ConfigDict, workdir: Path, processes: Processes, precision: str):
        self.config = ConfigDict(config.to_dict())
        self.config.compute.precision = precision
        self.workdir, self.processes, self.device = workdir, processes, processes.device
        for name in ("pair_images", "report_images"):
            if config.distill[name] < 0:
                raise UserError(f"--config.distill.{name}={config.distill[name]} must be at least 0")
        if config.distill.report_images and not config.eval.metrics:
            raise UserError(f"--config.distill.report_images={config.distill.report_images}: eval.metrics names "
                            "nothing to measure; name metrics by --config.eval.metrics, or use 0")
        self.seeds = list(range(config.distill.report_images))
        self.held, self._data = self._read(), None
        if self.seeds:
            shape = (config.data.image_size, config.data.image_size, config.data.channels)
            self._fresh = Metrics(Request(config.eval, len(self.seeds), shape, self.device, config.data,
                                          config.cond.num_classes, with_reference=processes.is_main))

    def add(self, name: str, teacher: tuple[str, Model, int], student: tuple[str, Model, int]) -> None:
        """Report a finished stage, on every process: (caption, model, steps) of its teacher and its student."""
        (above, taught, double), (below, model, steps) = teacher, student
        sampling = sample_student(self.config, model, steps)
        weights = weights_digest(model[0]) if self.processes.is_main else ""
        if self.processes.is_main and self.config.distill.pair_images:
            self._picture(name, steps, (weights_digest(taught[0]), weights),
                          {above: sample_teacher(self.config, taught, double, model[1]), below: sampling})
        if self.seeds:
            self._score(name, STUDENT, steps, weights, sampling)

    def finish(self, base: Model, steps: list[int]) -> None:
        """Score the model that the run started from as often as the students, whose numbers of steps these are, and
        draw all of them; on every process.
        """
        if not self.seeds:
            return
        weights = weights_digest(base[0]) if self.processes.is_main else ""
        for (solver, n), sampling in base_samplings(self.config, base, steps).items():
            self._score(f"{solver}_{n:04d}", solver, n, weights, sampling)
        if self.processes.is_main:
            scores = [score for score in self.held["scores"].values() if score["steps"] in steps]
            reference = self.held["scores"][f"{DDIM}_{reference_steps(base[1]):04d}"]
            draw(scores, reference, self.workdir / "quality.png")
            with atomic_path(self.workdir / "quality.md") as temporary:
                temporary.write_text(report_text(scores, reference))

    def values(self, name: str) -> dict[str, Any]:
        """What stages.json shows of a stage: {} or {"quality": {metric: value, ..., "images": their number}}."""
        score = self.held["scores"].get(name)
        if score is None:
            return {}
        values = {metric: each["value"] for metric, each in score["metrics"].items()}
        return {"quality": values | {"images": score["images"]}}

    def _picture(self, name: str, steps: int, weights: tuple[str, str], rows: Mapping[str, Sampling]) -> None:
        path = self.workdir / "pairs" / f"{name}.png"
        of = _digest(weights, self.config.distill.pair_images, *(each.settings() for each in rows.values()))
        if path.exists() and self.held["pairs"].get(name) == of:
            return
        picture = montage([(caption, self._images(sampling)) for caption, sampling in rows.items()])
        save_png(path, picture)
        self.held["pairs"][name] = of
        self._write()
        self._board.add_image("teacher above student", picture, steps, dataformats="HWC")
        self._board.flush()
        logging.info("%s: %s", name, path)

    def _images(self, sampling: Sampling) -> Tensor:
        """uint8 (n, h, w, c) of the pictures' seeds."""
        chain, seeds = self._chain(sampling), list(range(self.config.distill.pair_images))
        batches = chain.images(seeds, parse_labels(None, seeds, chain.num_classes))
        images = torch.cat([images.cpu() for _, images in batches])
        del chain, batches
        self._free()
        return images

    def _score(self, key: str, kind: str, steps: int, weights: str, sampling: Sampling) -> None:
        """Measure one way to make images, unless report.json has its score. weights: the main process knows them."""
        of = _digest(weights, sampling.settings(), {name: self.config.eval[name] for name in MEASURED_BY},
                     self.config.data.name, len(self.seeds))
        known = self.processes.is_main and self.held["scores"].get(key, {}).get("of") == of
        if self.processes.agree(int(known)):
            return
        logging.info("scoring %s at %d step%s", LABELS[kind], steps, "s" * (steps > 1))
        chain = self._chain(sampling)
        measured = score(self._fresh, chain, self.seeds, self.processes)
        calls = chain.nfe * (2 if chain.num_classes and chain.cfg_scale != 1 and not chain.takes_scale else 1)
        del chain
        self._free()
        if not self.processes.is_main:
            return
        self.held["scores"][key] = {"kind": kind, "steps": steps, "calls": calls, "images": len(self.seeds),
                                    "metrics": measured, "sampler": sampling.config.sampler.to_dict(), "of": of}
        self._write()
        for metric, each in measured.items():
            self._board.add_scalar(f"{metric}/{kind}", each["value"], steps)
        self._board.flush()
        told = ", ".join(f"{metric} {each['value']:.4g}" for metric, each in measured.items())
        logging.info("%s at %d step%s, %d images: %s", LABELS[kind], steps, "s" * (steps > 1), len(self.seeds), told)

    def _chain(self, sampling: Sampling) -> Chain:
        chain = sampling.chain(self.device)
        if sampling.description["cond"]["kind"] in OF_DATA:
            self._data = self._data or load_training_data(self.config.data, sampling.description, self.device)
            show_data(chain, sampling.description, self._data)
        return chain

    @functools.cached_property
    def _board(self):
        from torch.utils.tensorboard import SummaryWriter

        return SummaryWriter(str(self.workdir / "tensorboard"))

    def _free(self) -> None:
        """What a chain held must be gone before the next one, or the next stage, needs the memory."""
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _read(self) -> dict[str, dict]:
        held = {"pairs": {}, "scores": {}}
        if (self.workdir / FILE).exists():
            held |= _read_json(self.workdir / FILE, "remove it, and the stages are reported anew")
        return held | {"config": self.config.to_dict()}

    def _write(self) -> None:
        write_json(self.workdir / FILE, self.held)


def _read_json(path: Path, advice: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        why = getattr(error, "strerror", None) or reason(error)
        raise UserError(f"{path} cannot be read ({why}); {advice}") from error


def _digest(*parts: Any) -> str:
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("workdir", None, "folder of the run", flag_values=fv)
    absl_flags.DEFINE_integer("images", None, "images a score; else as many as the run's", flag_values=fv)
    absl_flags.mark_flag_as_required("workdir", fv)


def report_again(_, flags) -> None:
    """Report the finished stages of a run."""
    workdir, advice = Path(flags.workdir), "name a folder that distillate.py has made with :progressive"
    manifest = _read_json(workdir / STAGES, advice)
    config = ConfigDict(_read_json(workdir / FILE, advice)["config"])
    if flags.images is not None:
        config.distill.report_images = flags.images
    processes = Processes(cli.choose_device(config.compute.device))
    report = StageReport(config, workdir, processes, config.compute.precision)
    base = teacher = load_model(config, manifest["start"])
    steps = []
    for stage in manifest["stages"]:
        if not stage["finished"]:
            break
        student = load_model(config, str(workdir / stage["name"]))
        if stage["steps"]:
            steps.append(stage["steps"])
            report.add(stage["name"], (f"teacher, {2 * steps[-1]} steps", teacher, 2 * steps[-1]),
                       (f"student, {steps[-1]} step{'s' * (steps[-1] > 1)}", student, steps[-1]))
        stage.update(report.values(stage["name"]))
        teacher = student
    report.finish(base, steps)
    if processes.is_main:
        write_json(workdir / STAGES, manifest)
    processes.close()


def main(argv: list[str] | None = None) -> int:
    return cli.run(report_again, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

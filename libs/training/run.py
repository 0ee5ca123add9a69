"""The folder of a training run: which run it is (config.json), and where it stands (ckpts)."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..checkpoint import STAGES
from ..defaults import base_config
from ..errors import UserError
from ..files import reason, write_json
from ..processes import Processes
from .state import Checkpoints, Saved

NEVER = 2**62  # the step of a failure that has not happened

# What may differ when a run goes on. Everything else decides what is learnt.
FREE_SECTIONS = ("checkpoint", "compute", "policy", "sampler", "eval")
FREE_FIELDS = tuple(f"train.{name}" for name in (
    "steps", "accumulate", "grad_checkpoint", "log_every", "save_every", "keep", "preview_every", "preview_images",
    "eval_every", "eval_images", "max_minutes")) + (
    "data.download", "data.shard_cache", "data.shard_cache_gb", "cond.text_encoder", "cond.tokens",
    "distill.text_encoder_device")

# What runs did before a field came that the base config does not have.
EARLIER = {"early_exit.prediction": "", "early_exit.ual_from": 0.0, "early_exit.angle_power": 0.0}
START_WEIGHTS = "start_weights"  # in config.json: the digest of the weights that `start` named


class Run:
    """The run in `workdir`: the one that is there already, or a new one.

    start: what --checkpoint named, the weights that the run starts from.
    flags: field -> the flag that set it, where that is not --config.FIELD.
    Raises UserError where the folder holds a run of another config, naming the first field that differs, or the stages
    of a distillation, beside whose students --checkpoint=WORKDIR would not find this run.
    """

    def __init__(self, workdir: Path, config: ConfigDict, start: str | None, processes: Processes,
                 flags: Mapping[str, str] | None = None):
        if (workdir / STAGES).exists():
            raise UserError(f"--workdir={workdir} holds the stages of a distillation ({STAGES}); choose another folder")
        self.workdir, self.start_weights, self.flags = workdir, None, {"start": "--checkpoint"} | dict(flags or {})
        self.checkpoints = Checkpoints(workdir / "ckpts", config.train.keep)
        self.processes = processes
        self.config, self.start = config, start or ""
        if self.checkpoints.steps():
            self._refuse_other()

    def claim(self) -> None:
        """Write config.json: from here on the folder is this run's."""
        if self.processes.is_main:
            write_json(self.workdir / "config.json", self._wanted())

    def start_from(self, weights: str) -> None:
        """Take down the digest of the weights that `start` names. Raises UserError where the run learned from others
        of that name; a run that began before digests were kept does not tell.
        """
        held = read_config(self.workdir).get(START_WEIGHTS) if self.checkpoints.steps() else None
        if held not in (None, weights):
            raise self.other_weights()
        self.start_weights = weights

    def other_weights(self) -> UserError:
        """What a run is told that learned from other weights than `start` names now."""
        return UserError(f"--workdir: {self.workdir} learned from other weights than {self.start} has now; remove that "
                         "folder (and those of stages after it), or choose another --workdir")

    def resume(self) -> Saved | None:
        """The newest whole checkpoint, the same one on every process; None for a new run."""
        saved = self.checkpoints.newest() if self.processes.is_main else None
        step = self.processes.agree(-1 if saved is None else saved.step)
        return self.checkpoints.load(step) if saved is None and step >= 0 else saved

    def _wanted(self) -> dict[str, Any]:
        weights = {START_WEIGHTS: self.start_weights} if self.start_weights else {}
        return json.loads(json.dumps(self.config.to_dict() | {"start": self.start} | weights))  # tuples become lists

    def _refuse_other(self) -> None:
        held, wanted = _flat(read_config(self.workdir)), _flat(self._wanted())
        usual = EARLIER | _flat(base_config().to_dict())
        for field in wanted.keys() - held.keys() & usual.keys():  # it came after the run, which had what is usual now
            held[field] = json.loads(json.dumps(usual[field]))
        kept = {"cond.tokens"} if held.get("cond.kind") == "image" else set()  # its texts are embedded in training
        for field in sorted({*held, *wanted}):
            free = field.split(".")[0] in FREE_SECTIONS or field in {*FREE_FIELDS, START_WEIGHTS} - kept
            if free or held.get(field) == wanted.get(field):
                continue
            name = self.flags.get(field, f"--config.{field}")
            raise UserError(f"{name}={wanted.get(field)!r}: the run in --workdir={self.workdir} has "
                            f"{held.get(field)!r}; go on with that, or choose another folder")


def read_config(workdir: Path) -> dict[str, Any]:
    """config.json of a folder that holds checkpoints."""
    try:
        return json.loads((workdir / "config.json").read_text())
    except (FileNotFoundError, ValueError) as error:
        raise UserError(f"--workdir={workdir} holds checkpoints, but its config.json cannot be read "
                        f"({reason(error)}); choose another folder") from error


def refuse_failure(run: Run, failed_step: int, parameters: Sequence[Tensor], step: int) -> None:
    """Stop, on every process, if a loss or a weight of any process is not finite.

    failed_step: of this process's first loss that was not finite, NEVER for none. step: updates done.
    """
    if failed_step == NEVER and not _all_finite(parameters):
        failed_step = step
    failed_step = -run.processes.agree(-failed_step)
    if failed_step == NEVER:
        return
    steps = run.checkpoints.steps()
    left = f"the last good checkpoint is {run.checkpoints.path(steps[-1])}" if steps else "nothing was saved"
    raise UserError(f"the loss is not finite at step {failed_step}; {left}; a lower train.lr, a longer train.warmup or "
                    "train.clip_norm may help")


def _all_finite(tensors: Sequence[Tensor]) -> bool:
    with torch.no_grad():
        return bool(torch.stack(torch._foreach_norm(list(tensors))).isfinite().all())


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {prefix + name: value}
    return flat

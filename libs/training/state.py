"""The checkpoints of a run: whole folders ckpts/{step:08d} with weights, their average, and the optimizer."""

import io
import os
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from absl import logging
from torch import Tensor

from ..checkpoint import read, save_backbone
from ..errors import UserError
from ..files import reason

WEIGHTS, AVERAGE, STATE = "backbone.safetensors", "backbone_ema.safetensors", "train_state.pt"


@dataclass(frozen=True)
class Saved:
    """A checkpoint in host memory: the updates done, two state dicts, what else the loop goes on from, and what the
    weights say of themselves.
    """

    step: int
    weights: dict[str, Tensor]
    ema: dict[str, Tensor]
    state: dict[str, Any]
    description: dict[str, Any]


class Checkpoints:
    """Those in `folder`; the `keep` newest stay when a new one is saved."""

    def __init__(self, folder: Path, keep: int = 2):
        self.folder, self.keep = folder, keep

    def path(self, step: int) -> Path:
        return self.folder / f"{step:08d}"

    def steps(self) -> list[int]:
        """Steps of the checkpoints, rising."""
        return sorted(int(path.name) for path in self.folder.glob("[0-9]*") if path.name.isdecimal())

    def save(self, step: int, weights: Mapping[str, Tensor], ema: Mapping[str, Tensor],
             description: Mapping[str, Any], state: Mapping[str, Any]) -> None:
        """Write a whole checkpoint beside the others, then remove the oldest.

        An existing one of the same step is replaced. Whatever stops this leaves the others as they were.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        for leftover in self.folder.glob(".*.tmp"):  # of a process that was killed while it wrote
            shutil.rmtree(leftover, ignore_errors=True)
        temporary = self.folder / f".{step:08d}.tmp"
        try:
            temporary.mkdir()
            save_backbone(temporary / WEIGHTS, weights, description)
            save_backbone(temporary / AVERAGE, ema, description)
            buffer = io.BytesIO()  # torch.save reports a full disk as an error of its own kind
            torch.save({"step": step, **state}, buffer)
            (temporary / STATE).write_bytes(buffer.getvalue())
            if self.path(step).exists():
                shutil.rmtree(self.path(step))
            os.replace(temporary, self.path(step))
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        for old in self.steps()[:-self.keep]:
            shutil.rmtree(self.path(old))

    def save_best(self, ema: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
        """Replace ckpts/best by these weights."""
        (self.folder / "best").mkdir(parents=True, exist_ok=True)
        save_backbone(self.folder / "best" / AVERAGE, ema, description)

    def load(self, step: int) -> Saved:
        """Raises UserError for a checkpoint that is not whole."""
        path = self.path(step)
        (weights, description), (ema, _) = (read(path / name, "ckpts") for name in (WEIGHTS, AVERAGE))
        try:
            state = torch.load(path / STATE, map_location="cpu", weights_only=True)
        except (FileNotFoundError, RuntimeError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
            raise UserError(f"{path / STATE} cannot be read ({reason(error)})") from error
        if not isinstance(state, dict) or state.get("step") != step:
            raise UserError(f"{path / STATE} is not the state of step {step}")
        return Saved(step, weights, ema, state, description)

    def newest(self) -> Saved | None:
        """The newest whole checkpoint; None where there is none at all.

        Newer ones that are damaged are set aside as damaged-{step}. Raises UserError if all are damaged.
        """
        damaged = []
        for step in reversed(self.steps()):
            try:
                saved = self.load(step)
            except UserError as error:
                logging.warning("checkpoint %s is damaged (%s)", self.path(step), reason(error))
                damaged.append(self.path(step))
                continue
            for path in damaged:
                aside = path.with_name(f"damaged-{path.name}")
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(path, aside)
            return saved
        if damaged:
            raise UserError(f"--workdir: no checkpoint in {self.folder} can be read; choose another folder, or remove "
                            "that one to start again")
        return None

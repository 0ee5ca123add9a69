"""The cells of a grid of checkpoint x policy x sampler x steps, as its file declares them and as they are planned."""

import fnmatch
import runpy
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from . import checkpoint as checkpoints
from . import config as config_files
from .errors import UserError
from .files import reason
from .methods import METHODS
from .tables import equal_steps, gmacs


@dataclass(frozen=True)
class Cell:
    """One point of a grid.

    config       file of --config, without methods
    sampler      a method of libs/methods.py, which brings its settings, or a name for config.sampler.name
    steps        of the sampler
    label        name of policy and settings in the cell's own name
    policy       method that names the policy
    settings     fields of config.policy
    checkpoint   "" is the config's own; while it is not there, the cell is left out
    needs        another file that the cell cannot do without; "" is none
    fixed        whether the model samples at its own number of steps only, as a distilled student does: then there is
                 no plain sampling with fewer steps beside it
    cost_images  over which GMACs are counted, for a policy that decides by the image; 0 is the config's number
    family       cells that differ in one setting alone: the picture joins them under this name; "" is none
    """

    config: str
    sampler: str
    steps: int
    label: str = "full"
    policy: str = "full"
    settings: Mapping[str, Any] = field(default_factory=dict)
    checkpoint: str = ""
    needs: str = ""
    fixed: bool = False
    cost_images: int = 0
    family: str = ""

    @property
    def name(self) -> str:
        return "_".join([Path(self.checkpoint or self.config).stem, self.label, self.sampler, str(self.steps)])

    @property
    def plain(self) -> "Cell":
        """Plain sampling with the same checkpoint, sampler and steps."""
        return Cell(self.config, self.sampler, self.steps, checkpoint=self.checkpoint, fixed=self.fixed)

    @property
    def missing(self) -> str:
        """What the cell needs and what is not there, or ""."""
        if self.needs and not Path(self.needs).is_file():
            return self.needs
        if self.checkpoint:
            try:
                checkpoints.resolve(self.checkpoint)
            except UserError:
                return f"checkpoint {self.checkpoint}"
        return ""

    @property
    def config_flag(self) -> str:
        return f"{self.config}:{','.join([self.policy, *([self.sampler] if self.sampler in METHODS else [])])}"

    @property
    def overrides(self) -> dict[str, str]:
        """Text of the config's fields that the cell sets."""
        fields = {f"policy.{name}": str(value) for name, value in self.settings.items()}
        if self.sampler not in METHODS:
            fields["sampler.name"] = self.sampler
        if self.cost_images:
            fields["eval.cost_images"] = str(self.cost_images)
        return fields | {"sampler.steps": str(self.steps)}


def load_grid(path: str) -> list[Cell]:
    """The cells that `get_grid()` of the file `path` lists as dicts of `Cell`'s fields."""
    place = config_files.find_file(path)
    if place is None:
        raise UserError(f"--grid={path}: no such file")
    try:
        cells = [Cell(**fields) for fields in runpy.run_path(str(place))["get_grid"]()]
        names = [cell.name for cell in cells]
    except Exception as error:  # whatever the file raises is a mistake in it, told in one line
        raise UserError(f"--grid={path}: {type(error).__name__}: {reason(error)}") from error
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"--grid={path}: two cells are called {name}")
    return cells


def select(cells: Iterable[Cell], pattern: str) -> list[Cell]:
    """The cells whose names match the shell pattern."""
    found = [cell for cell in cells if fnmatch.fnmatchcase(cell.name, pattern)]
    if not found:
        raise UserError(f"--cells={pattern} matches no cell; --list shows their names")
    return found


def equal_cell(cell: Cell, results: Mapping[str, Mapping]) -> Cell | None:
    """Plain sampling with the steps that cost what `cell` costs; None until its cost and the plain one's are known."""
    if cell.fixed or cell.name not in results or cell.plain.name not in results:
        return None
    ratio = gmacs(results[cell.name]) / gmacs(results[cell.plain.name])
    return replace(cell.plain, steps=equal_steps(cell.steps, ratio))


def plan(cells: Iterable[Cell], results: Mapping[str, Mapping]) -> list[Cell]:
    """Every cell after its plain one and, as far as `results` tell, before plain sampling of equal MACs; each once."""
    planned: dict[str, Cell] = {}
    for cell in cells:
        for each in (cell.plain, cell, equal_cell(cell, results)):
            if each is not None:
                planned.setdefault(each.name, each)
    return list(planned.values())

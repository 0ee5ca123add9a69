"""A grid of checkpoint x policy x sampler x steps: quality and cost of every cell by eval.py, one JSON a cell.

    python -m libs.compare --list
    python -m libs.compare --samples=500 --cells='*clockwork*' --max_minutes=60
    python -m libs.compare --time_only --cells='*_8'
    python -m libs.compare --plot

The cells are those of --grid (see configs/compare.py). Beside each method stands plain sampling (the whole network in
every call) at the same sampler and steps, and with as many steps as cost what the method costs: equal multiply-adds,
rounded to the nearest whole step, at least 1. A cell whose JSON is there is skipped, one that was interrupted goes on
with the images it has. Times are of whole loops, a method and plain sampling in turns, so that a busy machine slows
both; --benchmark=false leaves them for later, and --time_only takes those of all finished cells anew.
"""

import fnmatch
import hashlib
import json
import math
import runpy
import signal
import sys
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from absl import flags as absl_flags
from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from . import build, cli
from . import checkpoint as checkpoints
from . import config as config_files
from .benchmark import WARM_UP, timed_loop
from .errors import UserError
from .evaluation import BATCH
from .files import atomic_path, reason
from .generate import Chain
from .image_folder import ImageFolder, fingerprint, read_chain
from .markdown import markdown_table
from .methods import METHODS
from .plots import draw, points
from .provenance import file_sha256, machine
from .tables import equal_steps, gmacs, read_cells

PSNR = "psnr_to_plain"


@dataclass(frozen=True)
class Cell:
    """One point of a grid.

    config      file of --config, without methods
    sampler     a method of libs/methods.py, which brings its settings, or a name for config.sampler.name
    steps       of the sampler
    label       name of policy and settings in the cell's own name
    policy      method that names the policy
    settings    fields of config.policy
    checkpoint  "" is the config's own
    needs       a file that the cell cannot do without; "" is none
    fixed       whether the model samples at its own number of steps only, as a distilled student does: then there is no
                plain sampling with fewer steps beside it
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

    @property
    def name(self) -> str:
        return "_".join([Path(self.checkpoint or self.config).stem, self.label, self.sampler, str(self.steps)])

    @property
    def plain(self) -> "Cell":
        """Plain sampling with the same checkpoint, sampler and steps."""
        return Cell(self.config, self.sampler, self.steps, checkpoint=self.checkpoint, fixed=self.fixed)

    @property
    def missing(self) -> str:
        """The file that the cell needs and that is not there, or ""."""
        return "" if not self.needs or Path(self.needs).is_file() else self.needs

    @property
    def config_flag(self) -> str:
        return f"{self.config}:{','.join([self.policy, *([self.sampler] if self.sampler in METHODS else [])])}"

    @property
    def overrides(self) -> dict[str, str]:
        """Text of the config's fields that the cell sets."""
        fields = {f"policy.{name}": str(value) for name, value in self.settings.items()}
        if self.sampler not in METHODS:
            fields["sampler.name"] = self.sampler
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
    """Every cell after its plain one and, as far as `results` tell, before plain sampling of equal time; each once."""
    planned: dict[str, Cell] = {}
    for cell in cells:
        for each in (cell.plain, cell, equal_cell(cell, results)):
            if each is not None:
                planned.setdefault(each.name, each)
    return list(planned.values())


class Grid:
    """The cells, their results in `out` and their images in `images`.

    samples: seeds 0 to samples - 1 of every cell. rows: images in one call of the network, 0 is the config's own.
    precision: of the network, "" is the config's own.
    """

    def __init__(self, cells: list[Cell], out: Path, images: Path, samples: int, rows: int = 0, precision: str = ""):
        self.cells, self.out, self.images, self.samples = cells, out, images, samples
        compute = {"rows": str(rows) if rows else "", "precision": precision}
        self.compute = {f"compute.{name}": text for name, text in compute.items() if text}
        self.results: dict[str, dict] = {}  # the finished cells'
        self.failed: list[str] = []
        self._read: set[str] = set()

    def load(self) -> None:
        """Take up the results that are there for the planned cells; finished cells bring new ones into the plan."""
        while new := [cell for cell in self.plan() if cell.name not in self._read]:
            for cell in new:
                self._read.add(cell.name)
                if held := self.finished(cell):
                    self.results[cell.name] = held

    def plan(self) -> list[Cell]:
        return plan(self.cells, self.results)

    def path(self, cell: Cell) -> Path:
        return self.out / f"{cell.name}.json"

    def overrides(self, cell: Cell) -> dict[str, str]:
        return cell.overrides | self.compute

    def config(self, cell: Cell) -> ConfigDict:
        config = config_files.load(cell.config_flag)
        for name, text in self.overrides(cell).items():
            config_files.override(config, name, text)
        return config

    def fingerprint(self, cell: Cell) -> str:
        """SHA-256 of everything but the seeds that decides a cell's images and scores."""
        config = self.config(cell)
        held = fingerprint(config, checkpoints.resolve(cell.checkpoint or config.checkpoint))
        held |= {"eval": {name: config.eval[name] for name in ("metrics", "reference", "fid_mode", "features")},
                 "needs": file_sha256(Path(cell.needs)) if cell.needs else None}
        return hashlib.sha256(json.dumps(held, sort_keys=True).encode()).hexdigest()

    def finished(self, cell: Cell) -> dict | None:
        """The result of a cell that has one of these settings and this number of samples."""
        path = self.path(cell)
        if cell.missing or not path.exists():
            return None
        [result] = read_cells([path])
        if result["samples"] > self.samples:
            raise UserError(f"--samples={self.samples}: {path} has {result['samples']:,}, which fewer shall not "
                            "replace; choose another --out")
        same = result["samples"] == self.samples and result["cell"]["fingerprint"] == self.fingerprint(cell)
        return result if same else None

    def kept(self, cell: Cell) -> ImageFolder | None:
        """The folder of a cell's images, None before the first one."""
        folder = self.images / cell.name
        chain = read_chain(folder)
        return None if chain is None else ImageFolder(folder, chain, "keep_images")

    def missing_images(self, cell: Cell) -> int:
        folder = self.kept(cell)
        return self.samples if folder is None else len(folder.missing(range(self.samples)))

    def run(self) -> None:
        """Measure every cell that has no result, one after the other, those that turn up on the way included."""
        images = seconds = 0.0  # images x steps of this session, and what they took
        left_out = set()
        while True:
            for cell in self.plan():
                if cell.missing and cell.name not in left_out:
                    logging.info("%s is left out: %s is missing", cell.name, cell.missing)
                    left_out.add(cell.name)
            rest = [cell for cell in self.plan() if cell.name not in {*self.results, *self.failed, *left_out}]
            if not rest:
                return
            cell, todo = rest[0], sum(self.missing_images(cell) * cell.steps for cell in rest)
            made = self.missing_images(cell)
            estimate = f"; about {duration(todo * seconds / images)} left" if images else ""
            logging.info("%s: %d of %d images to make; cells to go: %d%s", cell.name, made, self.samples, len(rest),
                         estimate)
            began = time.monotonic()
            self.measure(cell)
            if cell.name in self.results:
                images, seconds = images + made * cell.steps, seconds + time.monotonic() - began
                self.load()  # its equal-time cell may be there

    def measure(self, cell: Cell) -> None:
        """Run eval.py on a cell and write its result, or note that it failed. KeyboardInterrupt goes through."""
        measured = self.images / f"{cell.name}.json"
        argv = [f"--config={cell.config_flag}", f"--seeds=0-{self.samples - 1}",
                *(f"--config.{name}={text}" for name, text in self.overrides(cell).items()),
                *([f"--checkpoint={cell.checkpoint}"] if cell.checkpoint else []),
                f"--keep_images={self.images / cell.name}", f"--out={measured}"]
        try:
            status = import_module("eval").main(argv)
        except Exception:  # a bug in one method does not cost the others their night
            logging.exception("%s failed", cell.name)
            status = 1
        if status == 130:
            raise KeyboardInterrupt
        if status:
            self.failed.append(cell.name)
            return
        result = json.loads(measured.read_text())
        result["cell"] = {"name": cell.name, "settings": dict(cell.settings), "fingerprint": self.fingerprint(cell)}
        self.results[cell.name] = result
        self.add_drift(cell)
        self.write(cell)
        measured.unlink()

    def write(self, cell: Cell) -> None:
        with atomic_path(self.path(cell)) as temporary:
            temporary.write_text(json.dumps(self.results[cell.name], indent=1) + "\n")

    def add_drift(self, cell: Cell) -> bool:
        """Add how far a method's images are from the plain ones of the same seeds, where both were kept."""
        metrics = self.results[cell.name]["metrics"]
        if cell == cell.plain or PSNR in metrics:
            return False
        ours, plain = self.kept(cell), self.kept(cell.plain)
        seeds = range(self.samples)
        if ours is None or plain is None or ours.missing(seeds) or plain.missing(seeds):
            logging.info("%s: no %s, since images were not kept", cell.name, PSNR)
            return False
        metrics[PSNR] = {"value": psnr(plain, ours, seeds), "samples": self.samples, "unit": "dB"}
        return True

    def complete(self) -> None:
        """Add the drift to finished cells that lack it."""
        for cell in self.plan():
            if cell.name in self.results and self.add_drift(cell):
                self.write(cell)

    def time(self, repeats: int, again: bool) -> None:
        """Time the finished cells: those without a time, or all of them `again`. Plain sampling at the steps that a
        group starts from is timed with each, in turns, and the ratio to it is kept.
        """
        groups: dict[str, dict[str, Cell]] = {}
        for cell in self.cells:
            group = groups.setdefault(cell.plain.name, {cell.plain.name: cell.plain})
            group |= {each.name: each for each in (cell, equal_cell(cell, self.results)) if each is not None}
        for plain, group in groups.items():
            cells = [cell for name, cell in group.items() if name in self.results]
            lack = [cell for cell in cells if again or plain not in self.ratios(cell)]
            if plain not in self.results or not lack:
                continue
            cells = [group[plain], *(cell for cell in lack if cell.name != plain)]
            logging.info("timing %d cells of the group of %s", len(cells), plain)
            for cell, timing in zip(cells, self.time_group(cells, repeats), strict=True):
                result = self.results[cell.name]
                ratios = self.ratios(cell) | {plain: timing.pop("ratio")}
                result["timing"] = timing | {"ratio_to_plain": ratios}
                self.write(cell)

    def ratios(self, cell: Cell) -> dict[str, float]:
        return self.results[cell.name].get("timing", {}).get("ratio_to_plain", {})

    def time_group(self, cells: list[Cell], repeats: int) -> list[dict[str, Any]]:
        """Whole loops of the cells in turns, after a round to warm up; ratios are to the first cell's of the round."""
        chains = [self.chain(cell) for cell in cells]
        seconds: list[list[float]] = [[] for _ in cells]
        with tqdm(total=(WARM_UP + repeats) * len(cells), desc="timing", unit="loop") as bar:
            for _ in range(WARM_UP + repeats):
                for chain, held in zip(chains, seconds, strict=True):
                    seeds = list(range(chain.rows))
                    labels = [seed % chain.num_classes for seed in seeds] if chain.num_classes else None
                    held.append(timed_loop(chain, seeds, labels)[0])
                    bar.update()
        seconds = [held[WARM_UP:] for held in seconds]
        return [{"seconds_per_image": median(held) / chain.rows, "rows": chain.rows, "repeats": repeats,
                 "machine": machine(chain.device),
                 "ratio": median(own / plain for own, plain in zip(held, seconds[0], strict=True))}
                for chain, held in zip(chains, seconds, strict=True)]

    def chain(self, cell: Cell) -> Chain:
        config = self.config(cell)
        device = cli.choose_device(config.compute.device)
        chosen = {*self.overrides(cell), *config_files.method_fields(cell.config_flag)}
        return build.load_chain(config, cell.checkpoint or None, device, chosen)[0]

    def list(self) -> str:
        """A table of the planned cells and how far they are."""
        return markdown_table({"cell": cell.name, "state": self.state(cell)} for cell in self.plan())

    def state(self, cell: Cell) -> str:
        if cell.missing:
            return f"left out, {cell.missing} is missing"
        if cell.name in self.results:
            return "finished" if self.ratios(cell) else "finished, not timed"
        return f"{self.samples - self.missing_images(cell)} of {self.samples} images"


def psnr(a: ImageFolder, b: ImageFolder, seeds: Iterable[int]) -> float:
    """Peak signal-to-noise ratio in dB between the images of the same seeds, of the squared error of all their pixels
    (0 to 255) together; infinite for equal images.
    """
    seeds, total, count = list(seeds), 0.0, 0
    for start in range(0, len(seeds), BATCH):
        part = seeds[start:start + BATCH]
        error = (a.load(part).double() - b.load(part).double()).square()
        total, count = total + error.sum().item(), count + error.numel()
    return 10 * math.log10(255**2 * count / total) if total else math.inf


def duration(seconds: float) -> str:
    """
    >>> duration(5), duration(754), duration(7322)
    ('1 min', '13 min', '2 h 3 min')
    """
    hours, minutes = divmod(math.ceil(seconds / 60), 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


class TimeLimit:
    """Ends the `with` block quietly after so many minutes; 0 is no limit.

    By an alarm that interrupts as Ctrl-C would, since one cell can take longer than the limit. Nothing is lost: kept
    images and results are whole.
    """

    def __init__(self, minutes: float):
        self.minutes, self.expired = minutes, False

    def __enter__(self):
        if self.minutes:
            self._before = signal.signal(signal.SIGALRM, self._expire)
            signal.setitimer(signal.ITIMER_REAL, 60 * self.minutes)
        return self

    def __exit__(self, kind, *_):
        if self.minutes:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, self._before)
        if not (self.expired and kind is KeyboardInterrupt):
            return False
        logging.info("%g minutes are over; the same command goes on from here", self.minutes)
        return True

    def _expire(self, *_):
        self.expired = True
        raise KeyboardInterrupt


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("grid", "configs/compare.py", "file that lists the cells", flag_values=fv)
    absl_flags.DEFINE_string("cells", "*", "only the cells of this shell pattern, and what they need", flag_values=fv)
    absl_flags.DEFINE_integer("samples", 500, "images of a cell", flag_values=fv, lower_bound=2)
    absl_flags.DEFINE_integer("rows", 0, "images in one call of the network; 0 is the config's", flag_values=fv,
                              lower_bound=0)
    absl_flags.DEFINE_enum("precision", None, list(build.DTYPES), "of the network; the config's unless given",
                           flag_values=fv)
    absl_flags.DEFINE_float("max_minutes", 0.0, "stop after so long; 0 is no limit", flag_values=fv, lower_bound=0)
    absl_flags.DEFINE_boolean("list", False, "list the cells and their states", flag_values=fv)
    absl_flags.DEFINE_boolean("benchmark", True, "time finished cells that have no time yet", flag_values=fv)
    absl_flags.DEFINE_integer("repeats", 3, "timed loops of a cell", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_boolean("time_only", False, "time all finished cells again, measure none", flag_values=fv)
    absl_flags.DEFINE_boolean("plot", False, "draw the picture of the results in --out", flag_values=fv)
    absl_flags.DEFINE_string("picture", "assets/compare.png", "the file that --plot writes", flag_values=fv)
    absl_flags.DEFINE_string("keep_images", "outputs/compare", "folder of the cells' images", flag_values=fv)
    absl_flags.DEFINE_string("out", "assets/results/compare", "folder of the results", flag_values=fv)


def compare(_, flags) -> int:
    modes = [name for name in ("list", "time_only", "plot") if getattr(flags, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]}: give one of them")
    out = Path(flags.out)
    if flags.plot:
        draw(points(read_cells(sorted(out.glob("*.json")))), flags.picture)
        return 0
    cells = select(load_grid(flags.grid), flags.cells)
    grid = Grid(cells, out, Path(flags.keep_images), flags.samples, flags.rows,
                flags.precision or "")
    grid.load()
    if flags.list:
        sys.stdout.write(grid.list() + "\n")
        return 0
    cli.output_dir(out)
    with TimeLimit(flags.max_minutes):
        if not flags.time_only:
            cli.output_dir(grid.images, "keep_images")
            grid.complete()
            grid.run()
        if flags.time_only or flags.benchmark:
            grid.time(flags.repeats, again=flags.time_only)
    if grid.failed:
        raise UserError(f"cells that failed, each with its reason above: {', '.join(grid.failed)}")
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(compare, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

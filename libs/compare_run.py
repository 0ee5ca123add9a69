"""The measurement of a grid (see `libs.compare`): every cell by eval.py, in turns on the clock, one JSON a cell."""

import hashlib
import json
import math
import time
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from statistics import median
from typing import Any

from absl import logging
from ml_collections import ConfigDict
from tqdm import tqdm

from . import build, cli
from . import checkpoint as checkpoints
from . import config as config_files
from .benchmark import WARM_UP, timed_loop
from .compare_grid import Cell, equal_cell, plan
from .errors import UserError
from .evaluation import BATCH
from .files import write_json
from .generate import Chain
from .image_folder import ImageFolder, fingerprint, read_chain
from .markdown import markdown_table
from .provenance import file_sha256, machine
from .tables import read_cells

PSNR = "psnr_to_plain"


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
        """SHA-256 of everything but the seeds that decides a cell's images, scores and cost."""
        config = self.config(cell)
        held = fingerprint(config, checkpoints.resolve(cell.checkpoint or config.checkpoint))
        held |= {"eval": {name: config.eval[name] for name in ("metrics", "reference", "fid_mode", "features")},
                 "needs": file_sha256(Path(cell.needs)) if cell.needs else None}
        if cell.cost_images:
            held["cost_images"] = cell.cost_images
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
        images = seconds = 0.0  # images x steps made now, and what they took
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
        if cell.family:
            result["cell"]["family"] = cell.family
        self.results[cell.name] = result
        self.add_drift(cell)
        self.write(cell)
        measured.unlink()

    def write(self, cell: Cell) -> None:
        write_json(self.path(cell), self.results[cell.name])

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

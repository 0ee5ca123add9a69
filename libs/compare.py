"""A grid of checkpoint x policy x sampler x steps: quality and cost of every cell by eval.py, one JSON a cell.

    python -m libs.compare --list
    python -m libs.compare --samples=500 --cells='*clockwork*' --max_minutes=60
    python -m libs.compare --time_only --cells='*_8'
    python -m libs.compare --plot
    python -m libs.compare --grid=configs/early_exit.py --plot

The cells are those of --grid (see configs/compare.py). Beside each method stands plain sampling (the whole network in
every call) at the same sampler and steps, and with as many steps as cost what the method costs: equal multiply-adds,
rounded to the nearest whole step, at least 1. A cell whose JSON is there is skipped, one that was interrupted goes on
with the images it has. Times are of whole loops, a method and plain sampling in turns, so that a busy machine slows
both; --benchmark=false leaves them for later, and --time_only takes those of all finished cells anew. Results lie in
assets/results/GRID, images in outputs/GRID, and the picture is assets/GRID.png, after the name of the grid's file,
unless flags say otherwise.
"""

import signal
import sys
from pathlib import Path

from absl import flags as absl_flags
from absl import logging

from . import build, cli
from .compare_grid import load_grid, select
from .compare_run import Grid
from .errors import UserError
from .plots import draw, points
from .tables import read_cells


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
    absl_flags.DEFINE_string("picture", None, "the file that --plot writes; assets/GRID.png unless given",
                             flag_values=fv)
    absl_flags.DEFINE_string("keep_images", None, "folder of the cells' images; outputs/GRID unless given",
                             flag_values=fv)
    absl_flags.DEFINE_string("out", None, "folder of the results; assets/results/GRID unless given", flag_values=fv)


def compare(_, flags) -> int:
    modes = [name for name in ("list", "time_only", "plot") if getattr(flags, name)]
    if len(modes) > 1:
        raise UserError(f"--{modes[0]} and --{modes[1]}: give one of them")
    own = Path(flags.grid).stem
    out = Path(flags.out or f"assets/results/{own}")
    if flags.plot:
        draw(points(read_cells(sorted(out.glob("*.json")))), flags.picture or f"assets/{own}.png")
        return 0
    cells = select(load_grid(flags.grid), flags.cells)
    images = Path(flags.keep_images or f"outputs/{own}")
    grid = Grid(cells, out, images, flags.samples, flags.rows, flags.precision or "")
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

"""The students of a progressive distillation beside the model they come from: a table and a curve of quality against
steps.

A score is {"kind": STUDENT, DDIM or DPM_SOLVER_PP, "steps": N, "calls": of the network, "images": scored,
"metrics": {name: {"value": ...}}}; the last two kinds are samplers of the model itself.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ..files import atomic_path
from ..markdown import EMPTY, markdown_table

STUDENT, DDIM, DPM_SOLVER_PP = "student", "ddim", "dpm_solver_pp"
LABELS = {STUDENT: "student", DDIM: "DDIM", DPM_SOLVER_PP: "DPM-Solver++"}
DRAWN = {STUDENT: "students", DDIM: "their first teacher, DDIM", DPM_SOLVER_PP: "their first teacher, DPM-Solver++ 2M"}
STYLES = {
    STUDENT: {"color": "C0", "marker": "o", "linewidth": 2, "zorder": 3},
    DDIM: {"color": "C1", "marker": "s", "linestyle": "--", "linewidth": 1.2, "markersize": 5},
    DPM_SOLVER_PP: {"color": "C2", "marker": "^", "linestyle": "--", "linewidth": 1.2, "markersize": 5},
}
TICKS = (  # of an axis whose largest value is below that many times its smallest: within each power of ten
    (4, (1, 1.2, 1.4, 1.6, 1.8, 2, 2.5, 3, 3.5, 4, 5, 6, 7, 8, 9)), (20, (1, 1.5, 2, 3, 4, 5, 7)),
    (math.inf, (1, 2, 5)),
)


def _value(score: Mapping, metric: str) -> float:
    return score["metrics"][metric]["value"]


def _is_guided(scores: Sequence[Mapping]) -> bool:
    """Whether a step of some of them takes two calls of the network."""
    return any(score["calls"] > score["steps"] for score in scores)


def quality_table(scores: Sequence[Mapping], metric: str) -> str:
    """One row a number of steps: the student, and the model itself by its samplers."""
    texts = {(score["kind"], score["steps"]): f"{_value(score, metric):.4g}" for score in scores}
    kinds = [kind for kind in LABELS if any(kind == score["kind"] for score in scores)]
    steps = sorted({score["steps"] for score in scores}, reverse=True)
    return markdown_table({"steps": n, **{LABELS[kind]: texts.get((kind, n), EMPTY) for kind in kinds}} for n in steps)


def read_table(paths: Iterable[str | Path]) -> str:
    """The table of the first metric of a run's report.json, the reference among its rows."""
    [path] = paths
    scores = list(json.loads(Path(path).read_text())["scores"].values())
    return quality_table(scores, next(iter(scores[0]["metrics"])))


def report_text(scores: Sequence[Mapping], reference: Mapping) -> str:
    """quality.md: a table for each metric, one row a number of steps."""
    parts = ["# Quality of the students"]
    for metric in reference["metrics"]:
        images = reference["images"]
        parts += [f"## {metric}, {images:,} images a number",
                  f"Seeds 0 to {images - 1}. DDIM and DPM-Solver++ (2M) sample the students' first teacher; by DDIM at "
                  f"{reference['steps']} steps it has {_value(reference, metric):.4g}.",
                  quality_table(scores, metric)]
    if _is_guided([*scores, reference]):
        two = [LABELS[kind] for kind in LABELS if _is_guided([each for each in scores if each["kind"] == kind])]
        parts.append(f"A step takes two calls of the network, for guidance, in the columns {', '.join(two)}.")
    return "\n\n".join(parts) + "\n"


def draw(scores: Sequence[Mapping], reference: Mapping, path: str | Path) -> None:
    """quality.png: the first metric against the number of network calls an image; the students bear their values."""
    from matplotlib.figure import Figure
    from matplotlib.patheffects import withStroke
    from matplotlib.ticker import LogLocator, NullLocator

    metric = next(iter(reference["metrics"]))
    figure = Figure(figsize=(7.5, 4.8), layout="constrained")
    axes = figure.subplots()
    for kind, style in STYLES.items():
        points = sorted((score["calls"], _value(score, metric)) for score in scores if score["kind"] == kind)
        if points:
            axes.plot(*zip(*points, strict=True), label=DRAWN[kind], **style)
        if kind == STUDENT:
            for point in points:
                axes.annotate(f"{point[1]:.3g}", point, (0, -7), textcoords="offset points", ha="center", va="top",
                              color=style["color"], fontsize="small", zorder=4,
                              path_effects=[withStroke(linewidth=3, foreground="white")])
    label = f"{DRAWN[DDIM]}, {reference['calls']} calls"
    axes.axhline(_value(reference, metric), color="0.4", linestyle=":", label=label)
    axes.set_xscale("log", base=2)
    axes.set_xticks(sorted({score["calls"] for score in scores}))
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_locator(NullLocator())
    values = [_value(score, metric) for score in [*scores, reference]]
    if min(values) > 0:
        axes.set_yscale("log")
        wide = max(values) / min(values)
        axes.yaxis.set_major_locator(LogLocator(subs=next(subs for ratio, subs in TICKS if wide < ratio)))
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_locator(NullLocator())
        axes.margins(y=0.08)
    axes.set(xlabel="network calls an image", ylabel=f"{metric} ({reference['images']:,} images)")
    axes.grid(visible=True, alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

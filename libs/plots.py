"""The quality-against-cost picture of a grid of result files (see `libs.compare`)."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from PIL import Image

from .errors import UserError
from .files import atomic_path
from .tables import gmacs, is_plain, seconds_per_image, settings_text

MARKERS = "osD^vP*X<>ph8d"
TICKS = (1, 1.5, 2, 3, 4, 5, 7)  # within each power of ten
SOURCE = "Source"  # field of the PNG's text that holds the digest of what was drawn
AXES = {"gmacs": "GMACs an image", "seconds": "seconds an image"}


def points(results: Iterable[Mapping[str, Any]], metric: str = "frechet_cifar10") -> list[dict[str, Any]]:
    """What the picture shows: one dict a cell that has the metric, in the order of cost."""
    found = []
    for result in results:
        if metric not in result["metrics"]:
            continue
        cell, value = result["cell"], result["metrics"][metric]
        found.append({
            "method": " ".join(filter(None, [result["method"]["name"], settings_text(cell["settings"])])),
            "plain": is_plain(result),
            "curve": f"{result['model']}, {result['sampler']['name']}, {result['compute']['precision']}",
            "gmacs": gmacs(result), "seconds": seconds_per_image(result),
            "value": value["value"], "samples": value["samples"], "metric": metric,
        })
        if "family" in cell:  # a line at each number of steps
            found[-1] |= {"method": cell["family"], "line": result["sampler"]["steps"]}
    return sorted(found, key=lambda point: (point["curve"], point["gmacs"], point["method"]))


def digest(drawn: list[dict[str, Any]]) -> str:
    return hashlib.sha256(json.dumps(drawn, sort_keys=True).encode()).hexdigest()


def drawn_digest(path: str | Path) -> str | None:
    """The digest of the points that a picture of `draw` shows."""
    with Image.open(path) as image:
        return image.info.get(SOURCE)


def draw(drawn: list[dict[str, Any]], path: str | Path) -> None:
    """Write the picture of `points`: against multiply-adds and, where some cells were timed, against time. A marker
    a sampler, a colour a method or family of cells, plain sampling and families joined by lines.
    """
    from matplotlib.figure import Figure

    if not drawn:
        raise UserError(f"{path}: no cell has the metric that the picture shows")
    markers = {curve: MARKERS[i % len(MARKERS)] for i, curve in enumerate(sorted({point["curve"] for point in drawn}))}
    methods = sorted({point["method"] for point in drawn if not point["plain"]})
    colours = {method: f"C{i % 10}" for i, method in enumerate(methods)}
    shown = [axis for axis in AXES if any(point[axis] is not None for point in drawn)]
    figure = Figure(figsize=(5.5 * len(shown) + 3.5, 5), layout="constrained")
    for axes, axis in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        _panel(axes, [point for point in drawn if point[axis] is not None], axis, markers, colours)
    handles = [_handle(axes, marker=markers[curve], color="0.3", linestyle="-", label=f"plain, {curve}")
               for curve in markers]
    # The second ten of a long list of methods have the colours of the first, but hollow.
    handles += [_handle(axes, marker="s", color=colours[method], linestyle="", label=method,
                        fillstyle=_fill(i)) for i, method in enumerate(methods)]
    figure.legend(handles=handles, loc="outside right upper", fontsize="small")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120, metadata={SOURCE: digest(drawn)})


def _panel(axes, drawn: list[dict], axis: str, markers: Mapping[str, str], colours: Mapping[str, str]) -> None:
    from matplotlib.ticker import LogLocator

    for curve, marker in markers.items():
        plain = sorted((point[axis], point["value"]) for point in drawn if point["plain"] and point["curve"] == curve)
        if plain:
            axes.plot(*zip(*plain, strict=True), color="0.3", marker=marker, linewidth=1)
    lines: dict[tuple, list[tuple[float, float]]] = {}
    for point in drawn:
        if "line" in point:
            key = point["method"], point["curve"], point["line"]
            lines.setdefault(key, []).append((point[axis], point["value"]))
    for (method, *_), places in lines.items():
        axes.plot(*zip(*sorted(places), strict=True), color=colours[method], linewidth=0.8)
    for point in drawn:
        if not point["plain"]:
            axes.plot(point[axis], point["value"], color=colours[point["method"]], marker=markers[point["curve"]],
                      fillstyle=_fill(list(colours).index(point["method"])), linestyle="")
    counts = sorted({f"{point['samples']:,}" for point in drawn})
    axes.set(xlabel=AXES[axis], ylabel=f"{drawn[0]['metric']} ({', '.join(counts)} images)", xscale="log", yscale="log")
    for scale in (axes.xaxis, axes.yaxis):
        scale.set_major_locator(LogLocator(subs=TICKS))
        scale.set_major_formatter("{x:g}")
        scale.set_minor_formatter("")
    axes.grid(visible=True, which="both", alpha=0.3)


def _fill(place: int) -> str:
    return "none" if place // 10 % 2 else "full"


def _handle(axes, **style):
    return axes.plot([], [], **style)[0]

"""Pictures of early exit: where images left the network, how uncertain it was, and whether that was true."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import atomic_path
from ..montage import Row
from .calibration import as_array

TITLES = {"eps_error": "1 - tanh|g_i - eps|", "final_gap": "1 - tanh|g_i - g_N|"}
NAMED = 12  # calls whose times are written on the axis


def draw_exits(histogram: Sequence[Sequence[int]], times: Sequence[float], path: str | Path) -> None:
    """A heat map of the share of the images that left at each layer, call by call of the loop, with the mean layer and
    one standard deviation across the images to both sides.

    histogram: (calls, layers) counts. times: of the calls.
    """
    from matplotlib.figure import Figure

    counts = torch.tensor(histogram, dtype=torch.float64)
    calls, layers = counts.shape
    layer = torch.arange(1.0, layers + 1, dtype=torch.float64)
    share = counts / counts.sum(dim=1, keepdim=True)
    mean = share @ layer
    spread = (share * (layer - mean[:, None]).square()).sum(dim=1).sqrt()
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(share.T, origin="lower", aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="nearest",
                        extent=(0.5, calls + 0.5, 0.5, layers + 0.5))
    call = torch.arange(1, calls + 1)
    axes.plot(call, mean, color="C1", linewidth=1.5, label="mean")
    for side, label in ((-1, ""), (1, "one standard deviation across the images")):
        axes.plot(call, mean + side * spread, color="C1", linewidth=1, linestyle=":", label=label)
    named = range(0, calls, -(-calls // NAMED))
    axes.set_xticks([index + 1 for index in named], [f"{index + 1}\n{times[index]:.2g}" for index in named])
    axes.set_yticks(layer_ticks(layers))
    axes.set(xlabel="call of the network, and its t", ylabel=f"exit layer, of {layers}")
    axes.set_title(f"mean exit layer / layers: {float(mean.mean()) / layers:.3f}", fontsize="medium")
    axes.legend(loc="lower right", fontsize="small")
    figure.colorbar(image, ax=axes, label="share of the images")
    _save(figure, path)


def draw_calibration(numbers: Mapping[str, Any], path: str | Path) -> None:
    """Predicted against true certainty, a point a layer and bin of t, above the mean absolute error of each; a column
    each truth.

    numbers: of `calibration.calibration`.
    """
    from matplotlib.figure import Figure

    predicted = as_array(numbers["predicted"])
    layers, bins = predicted.shape
    times = [low for low, high in numbers["bins"] if low == high]  # a student's, from the first to the last
    colour = torch.arange(1, layers + 1)[:, None].expand(-1, bins)
    figure = Figure(figsize=(10, 8.5), layout="constrained")
    for column, name in zip(figure.subplots(2, 2).T, numbers["truths"], strict=True):
        held, (above, below) = numbers[name], column
        dots = above.scatter(predicted, as_array(held["true"]), c=colour, cmap="viridis", s=14)
        above.plot([0, 1], [0, 1], color="0.3", linewidth=1, linestyle=":")
        above.set(xlim=(0, 1.02), ylim=(0, 1.02), xlabel="predicted certainty", ylabel=f"true: {TITLES[name]}")
        above.set_aspect("equal")
        correlation = "-" if held["correlation"] is None else f"{held['correlation']:.3f}"
        above.set_title(f"{name}, {numbers['truths'][name]}\nmean absolute error {held['error']:.3f}, correlation "
                        f"{correlation}", fontsize="medium")
        above.grid(visible=True, alpha=0.3)
        figure.colorbar(dots, ax=above, label="layer", ticks=layer_ticks(layers))
        errors = below.imshow(as_array(held["error_of"]), origin="lower", aspect="auto", cmap="magma", vmin=0,
                              extent=(0.5, bins + 0.5, 0.5, layers + 0.5) if times else (0, 1, 0.5, layers + 0.5))
        below.set_yticks(layer_ticks(layers))
        if times:
            named = range(0, bins, -(-bins // NAMED))
            below.set_xticks([index + 1 for index in named], [f"{times[index]:.2g}" for index in named])
        below.set(xlabel="t of the student's calls" if times else "t", ylabel="layer")
        figure.colorbar(errors, ax=below, label="mean absolute error")
    _save(figure, path)


def uncertainty_rows(steps: Sequence[tuple[str, Tensor, Tensor]]) -> list[Row]:
    """Rows of a montage: the predictions of each step above the maps of their uncertainty, all maps on one scale from
    dark to bright.

    steps: (caption, predictions uint8 (n, H, W, c), uncertainties (n, h, w)) each; h divides H.
    """
    import matplotlib

    lowest = min(float(maps.min()) for _, _, maps in steps)
    highest = max(float(maps.max()) for _, _, maps in steps)
    rows = []
    for caption, images, maps in steps:
        factor, scaled = images.shape[1] // maps.shape[1], (maps.cpu() - lowest) / max(highest - lowest, 1e-9)
        shades = torch.from_numpy(matplotlib.colormaps["magma"](scaled.clamp(0, 1).numpy(), bytes=True))[..., :3]
        shades = shades.repeat_interleave(factor, dim=1).repeat_interleave(factor, dim=2)
        rows += [(caption, images), (f"uncertainty, {lowest:.2g} to {highest:.2g}", shades)]
    return rows


def layer_ticks(layers: int) -> range:
    return range(1, layers + 1, -(-layers // 16))


def _save(figure, path: str | Path) -> None:
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)

"""What a run tells: stats.jsonl for machines, tensorboard, the loss curve, pictures."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ..data.images import image_grid, save_png
from ..files import atomic_path
from ..generate import Chain
from ..seeds import parse_labels


class Report:
    """Writes into `workdir`, on the main process.

    step: the updates done when the run goes on; what an interrupted run told of later ones is dropped.
    """

    def __init__(self, workdir: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter

        self.workdir, self.stats = workdir, workdir / "stats.jsonl"
        rows = [row for row in self._rows() if row["step"] <= step]
        with atomic_path(self.stats) as temporary:
            temporary.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self.board = SummaryWriter(str(workdir / "tensorboard"), purge_step=step + 1 if step else None)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """One row of stats.jsonl, one point of each tensorboard curve."""
        with open(self.stats, "a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
        for name, value in values.items():
            self.board.add_scalar(name, value, step)

    def picture(self, step: int, chain: Chain, count: int) -> None:
        """previews/{step}.png: images of the seeds 0 to count - 1, labels in turn, or the chain's texts;
        those of a model of images between condition and original.
        """
        seeds = list(range(count))
        batches = chain.images(seeds, parse_labels(None, seeds, chain.num_classes))
        images = torch.cat([images.cpu() for _, images in batches])
        columns = chain.num_classes if 0 < chain.num_classes <= 16 else math.ceil(count**0.5)
        if chain.shown is not None:
            images = chain.shown.beside(seeds, images)
        grid = image_grid(images, columns, upscale=max(1, 32 // images.shape[1]))
        save_png(self.workdir / "previews" / f"{step:08d}.png", grid)
        self.board.add_image("preview", grid, step, dataformats="HWC")

    def curve(self) -> None:
        """loss.png: the losses of stats.jsonl and their moving average."""
        from matplotlib.figure import Figure

        rows = [row for row in self._rows() if "loss" in row]
        if not rows:
            return
        steps, losses = ([row[name] for row in rows] for name in ("step", "loss"))
        figure = Figure(figsize=(6, 4), layout="constrained")
        axes = figure.subplots()
        axes.plot(steps, losses, color="0.7", label="mean between two log lines")
        axes.plot(steps, moving_average(losses), color="C0", label="moving average")
        axes.set(xlabel="step", ylabel="loss", yscale="log")
        axes.grid(visible=True, which="both", alpha=0.3)
        axes.legend()
        with atomic_path(self.workdir / "loss.png") as temporary:
            figure.savefig(temporary, format="png", dpi=120)

    def close(self) -> None:
        self.board.close()

    def _rows(self) -> list[dict]:
        """The whole rows of stats.jsonl; the last one may have been cut off."""
        rows = []
        with contextlib.suppress(FileNotFoundError), open(self.stats) as file:
            for line in file:
                with contextlib.suppress(json.JSONDecodeError):
                    rows.append(json.loads(line))
        return rows


def moving_average(values: list[float], share: float = 0.05) -> Tensor:
    """Of each value with its neighbours: a window of `share` of all values, shorter at the ends.

    >>> moving_average([1.0, 2.0, 6.0], share=0.5).tolist()
    [1.5, 3.0, 4.0]
    """
    reach = max(1, round(len(values) * share / 2))
    sums = np.concatenate([[0.0], np.cumsum(values)])
    first = np.clip(np.arange(len(values)) - reach, 0, None)
    last = np.clip(np.arange(len(values)) + reach + 1, None, len(values))
    return torch.from_numpy((sums[last] - sums[first]) / (last - first))

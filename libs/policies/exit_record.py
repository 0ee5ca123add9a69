"""What early exit did to the images of finished denoising loops, kept on the host."""

from typing import Any

import torch
from torch import Tensor


class ExitRecord:
    """Counts of the exit layers of all images, call by call.

    counts     (calls, layers) int64: rows that left at a layer (the first column is layer 1) in a call of the loop
    executed   blocks that were computed for these rows, those carried on beyond their exit too
    images     in how many images

    Loops of another number of calls begin a new record.
    """

    def __init__(self, layers: int):
        self.layers = layers
        self._begin(0)

    def _begin(self, calls: int) -> None:
        self.images = self.executed = 0
        self.counts = torch.zeros(calls, self.layers, dtype=torch.int64)

    def add(self, exits: Tensor, executed: Tensor, images: int) -> None:
        """One loop: exits and executed blocks, each (calls, rows) int64 on the host."""
        if len(exits) != len(self.counts):
            self._begin(len(exits))
        self.counts.scatter_add_(1, exits - 1, torch.ones_like(exits))
        self.executed += int(executed.sum())
        self.images += images

    def stats(self) -> dict[str, Any]:
        """images, layer_ratio (mean exit layer / layers) and executed_ratio; None as long as there are no images."""
        blocks = self.layers * int(self.counts.sum())
        exits = int((self.counts * torch.arange(1, self.layers + 1)).sum())
        return {"images": self.images, "layer_ratio": exits / blocks if blocks else None,
                "executed_ratio": self.executed / blocks if blocks else None}

    def report(self) -> dict[str, Any]:
        """`stats`, the counts as `histogram`, and `spread`: the standard deviation of a call's exit layers."""
        layer, share = torch.arange(1.0, self.layers + 1), self.counts / self.counts.sum(1, keepdim=True).clamp(min=1)
        mean = share @ layer
        variance = (share * (layer - mean[:, None]).square()).sum(1)
        return {**self.stats(), "histogram": self.counts.tolist(), "spread": variance.sqrt().tolist()}

    def total(self, processes: Any) -> "ExitRecord":
        """The record of all `processes.Processes` together, on each of them."""
        whole = ExitRecord(self.layers)
        parts = [part for part in processes.gather((self.counts, self.executed, self.images)) if part[2]]
        if parts:
            whole.counts = torch.stack([counts for counts, _, _ in parts]).sum(0)
            whole.executed = sum(executed for _, executed, _ in parts)
            whole.images = sum(images for _, _, images in parts)
        return whole

"""Which sample of a data set stands at a position of the training sequence: a function of seed and position alone."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..random import Stream, random_bits

SHARDS_TOGETHER = 8  # shards whose samples are mixed; part of what makes a seed reproducible


class DataOrder:
    """Epoch e, positions e * n to (e + 1) * n - 1, is a permutation of the n samples seeded by (seed, e)."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, positions: Tensor) -> Tensor:
        """(b,) int64 positions -> (b,) int64 indices of samples."""
        epochs, offsets = positions // self.n, positions % self.n
        wanted = epochs.unique().tolist()
        self._epochs = {epoch: self._epochs.get(epoch, None) for epoch in wanted}
        indices = torch.empty_like(positions)
        for epoch in wanted:
            if self._epochs[epoch] is None:
                self._epochs[epoch] = self._permutation(self._generator(epoch))
            inside = epochs == epoch
            indices[inside] = self._epochs[epoch][offsets[inside]]
        return indices

    def _generator(self, epoch: int) -> torch.Generator:
        high, low = random_bits(torch.tensor([self.seed]), epoch, Stream.DATA_ORDER, 2)[0].tolist()
        return torch.Generator().manual_seed((high << 31) ^ low)

    def _permutation(self, generator: torch.Generator) -> Tensor:
        return torch.randperm(self.n, generator=generator)


class ShardOrder(DataOrder):
    """An order that stays in few shards at a time: shards are permuted, then the samples of every `together` of them.

    counts  samples of each shard; those of shard 0 have the first indices
    coming  called with the numbers of the shards that follow those of the samples asked for, once in a while
    """

    def __init__(self, counts: Sequence[int], seed: int, together: int = SHARDS_TOGETHER,
                 coming: Callable[[list[int]], None] = lambda shards: None):
        super().__init__(sum(counts), seed)
        self.counts, self.together, self.coming = torch.tensor(counts), together, coming
        self.starts = self.counts.cumsum(0) - self.counts
        self._told: tuple[int, int] | None = None

    def __call__(self, positions: Tensor) -> Tensor:
        indices = super().__call__(positions)
        epoch, offset = divmod(int(positions[-1]), self.n)
        groups = self._groups(self._generator(epoch))
        ends = torch.stack([self.counts[shards].sum() for shards in groups]).cumsum(0)
        group = int(torch.searchsorted(ends, offset, right=True))
        if self._told != (epoch, group) and group + 1 < len(groups):
            self.coming(groups[group + 1].tolist())
        self._told = epoch, group
        return indices

    def _groups(self, generator: torch.Generator) -> tuple[Tensor, ...]:
        return torch.randperm(len(self.counts), generator=generator).split(self.together)

    def _permutation(self, generator: torch.Generator) -> Tensor:
        parts = []
        for shards in self._groups(generator):
            samples = torch.cat([torch.arange(self.counts[i]) + self.starts[i] for i in shards])
            parts.append(samples[torch.randperm(len(samples), generator=generator)])
        return torch.cat(parts)

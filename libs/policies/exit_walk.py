"""U-ViT block by block: to a fixed depth, or for each image until it is certain enough."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..backbones.uvit import UViT


class Walked(NamedTuple):
    """What a walk gives: the output (b, c, h, w) and, for each row, the number of blocks that its output comes from
    and the number that were computed for it.
    """

    out: Tensor
    exit_layer: list[int]
    executed: list[int]


def run_layer(net: UViT, block: Callable, layer: int, tokens: Tensor, skips: list[Tensor]) -> Tensor:
    """Tokens (b, l, d) after `block`, which is the `layer`-th (from 1); in-blocks add to `skips`, out-blocks take."""
    before_middle = len(net.in_blocks)
    merges = layer > before_middle + 1 and net.has_skip
    tokens = block(tokens, skips.pop()) if merges else block(tokens)
    if layer <= before_middle:
        skips.append(tokens)
    return tokens


def truncated(net: UViT, depth: int) -> Callable[..., Tensor]:
    """`net` that ends after `depth` blocks, with its own signature; nothing in it depends on the data.

    A depth has a code object of its own, since torch.compile keeps few graphs a code object.
    """
    blocks = net.block_list()[:depth]

    def forward(x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                guidance: Tensor | None = None, concat: Tensor | None = None) -> Tensor:
        tokens, skips = net.embed(x, timesteps, y, context, guidance, concat), []
        for layer, block in enumerate(blocks, start=1):
            tokens = run_layer(net, block, layer, tokens, skips)
        return net.head(tokens)

    forward.__code__ = forward.__code__.replace(co_name=f"depth_{depth}")
    return forward


class Walk:
    """One call of `net` that its rows leave one by one (2309.17074, section 3.3).

    tokens        (b, l, d) before the first block
    time          (b, d) what the uncertainty heads are told of the time, or None
    certainty     of the rows at hand after a layer, see `heads.MeanCertainty`
    sure          which of these rows that is enough for. They stand in the order of the call; those that have left but
                  are carried on are among them
    patience      in-blocks at which a row must be certain, the last of which it leaves at; mid and out-blocks it leaves
                  at once
    compact_from  share of the rows at hand that must have left before the others go on without them

    Which row goes is decided on the host, so a layer that is looked at costs one wait for the device.
    """

    def __init__(self, net: UViT, tokens: Tensor, time: Tensor | None, certainty: Callable[..., list[float]],
                 sure: Callable[[list[float]], list[bool]], patience: int, compact_from: float):
        self.net, self.tokens, self.time, self.certainty, self.sure = net, tokens, time, certainty, sure
        self.patience, self.compact_from = patience, compact_from
        self.rows = list(range(len(tokens)))  # of the call, that are at hand
        self.skips: list[Tensor] = []
        self.crossings = [0] * len(tokens)
        self.exit_layer, self.executed = [0] * len(tokens), [0] * len(tokens)  # 0: has not left
        self.out: Tensor | None = None

    def run(self, blocks: Sequence[nn.Module], checks: Sequence[int]) -> Walked:
        """checks: the layers (from 1) to look at; the last one ends the walk in any case."""
        for layer, block in enumerate(blocks, start=1):
            self.tokens = run_layer(self.net, block, layer, self.tokens, self.skips)
            leaving = []
            if layer == len(blocks):
                leaving = self._staying()
            elif layer in checks:
                leaving = self._leaving(layer)
            if leaving:
                self._leave(layer, leaving)
                if not self._staying():
                    break
                self._compact(layer)
        for row in self.rows:
            self.executed[row] = layer
        return Walked(self.out, self.exit_layer, self.executed)

    def _staying(self) -> list[int]:
        """Places in the batch at hand of rows that have not left."""
        return [place for place, row in enumerate(self.rows) if not self.exit_layer[row]]

    def _leaving(self, layer: int) -> list[int]:
        sure = self.sure(self.certainty(layer - 1, self.tokens, self.time))
        leaving = [place for place in self._staying() if sure[place]]
        if layer > len(self.net.in_blocks):
            return leaving
        for place in leaving:
            self.crossings[self.rows[place]] += 1
        return [place for place in leaving if self.crossings[self.rows[place]] >= self.patience]

    def _leave(self, layer: int, places: list[int]) -> None:
        """Fix the outputs of these rows."""
        rows = [self.rows[place] for place in places]
        for row in rows:
            self.exit_layer[row] = layer
        result = self.net.head(self._select(self.tokens, places))
        if len(rows) == len(self.exit_layer):  # all at once
            self.out = result
            return
        if self.out is None:
            self.out = result.new_empty(len(self.exit_layer), *result.shape[1:])
        self.out.index_copy_(0, self._index(rows), result)

    def _compact(self, layer: int) -> None:
        """Go on without the rows that have left, if they are many enough."""
        staying = self._staying()
        if len(self.rows) - len(staying) < self.compact_from * len(self.rows):
            return
        for row in self.rows:
            self.executed[row] = layer
        index, before = self._index(staying), self.tokens
        self.tokens = before.index_select(0, index)
        for i, skip in enumerate(self.skips):
            self.skips[i] = self.tokens if skip is before else skip.index_select(0, index)
        if self.time is not None:
            self.time = self.time.index_select(0, index)
        self.rows = [self.rows[place] for place in staying]

    def _select(self, tensor: Tensor, places: list[int]) -> Tensor:
        return tensor if len(places) == len(tensor) else tensor.index_select(0, self._index(places))

    def _index(self, places: list[int]) -> Tensor:
        return torch.tensor(places).to(self.tokens.device, non_blocking=True)

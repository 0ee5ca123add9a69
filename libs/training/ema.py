"""The exponential moving average of a network's weights."""

import contextlib
import copy
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..checkpoint import learned_state, load_learned


class EMA:
    """A copy of `net` in eval mode, whose weights follow those of `net`.

    decay   weight of the past at each update; 0 is no average: `net` itself, and no copy
    apart   a copy in any case, to which a policy may put its hooks
    """

    def __init__(self, net: nn.Module, decay: float, apart: bool = False):
        self.decay, self.shared = decay, not (decay or apart)
        if self.shared:
            self.net = net
            return
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        held, followed = self.net.state_dict(), net.state_dict()  # tensors that share memory with the networks'
        floats = [name for name, tensor in held.items() if tensor.is_floating_point()]
        self._average, self._source = [held[name] for name in floats], [followed[name] for name in floats]
        self._other = [(held[name], followed[name]) for name in held if name not in {*floats}]

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights, in a few fused kernels."""
        if self.shared:
            return
        torch._foreach_lerp_(self._average, self._source, 1 - self.decay)
        for average, source in self._other:  # counters
            average.copy_(source)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it."""
        return learned_state(self.net)

    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        """Take `state` over; strict, the first difference is named in one line."""
        load_learned(self.net, tensors, source)

    def whole(self) -> contextlib.AbstractContextManager:
        """What surrounds calls of `net`; see `sharding.ShardedEMA`."""
        return contextlib.nullcontext()

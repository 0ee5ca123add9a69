"""The policy that runs everything: the baseline of every table, and the contract of the others."""

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn


class Full:
    """Every call runs the whole backbone.

    Other policies subclass this: they replace `__call__` and add to `last` and `stats`.

    net    the backbone, callable as `net(x, timesteps, y=None, context=None)`
    last   what the last call did, one entry a row where a policy decides per row (empty here)
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.last: dict[str, Tensor] = {}
        self.calls = self.rows = 0
        self.times: Tensor | None = None
        self.rows_per_image = 1

    def prepare(self, chain: Any) -> None:
        """Called once with the finished `generate.Chain`, for a policy that calibrates itself on samples of it or
        refuses its number of steps.

        The weights may be none yet, so a policy that samples waits for the first `start`.
        """

    def start(self, times: Tensor, rows_per_image: int = 1) -> None:
        """A new denoising loop: forget all of the previous one. Its conditions stay the same to its end.

        times: (nfe,) on the host, the network's timesteps of the coming calls, in order; call i is step i.
        rows_per_image: 2 under guidance, where row i and row i + b belong to one image; else 1.
        """
        self.times, self.rows_per_image = times, rows_per_image
        self.last = {}

    def after_step(self, x_T: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        """What the sampler of a loop from `x_T` (b, ...) does to its state between steps; None for nothing."""
        return None

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                 **more: Tensor) -> Tensor:
        """more: guidance (b,), for a network that takes the scale as an input."""
        self.calls += 1
        self.rows += len(x)
        return self.net(x, timesteps, y=y, context=context, **more)

    def finish(self, count: int) -> None:
        """The loop has ended; its first `count` images were asked for, the others pad the batch."""

    def stats(self) -> dict:
        """What ran since the policy was made: calls of the network, and rows in them."""
        return {"calls": self.calls, "rows": self.rows}

    def report(self, processes: Any = None) -> dict:
        """What an evaluation should say of the images made so far, beside `stats`; {} for nothing.

        processes: a `processes.Processes`, each of which calls this: then of the images of all of them.
        """
        return {}

    def disable(self) -> nn.Module:
        """Give back the backbone as it was before the policy."""
        return self.net

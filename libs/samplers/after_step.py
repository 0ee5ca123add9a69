"""What may be done to the state between two steps of a sampler."""

from collections.abc import Callable

from torch import Tensor

AfterStep = Callable[[Tensor, Tensor], Tensor]  # (x_t, t) -> x_t, after each step or singlestep interval


def keep(x_t: Tensor, t: Tensor) -> Tensor:
    """Nothing."""
    return x_t

"""Faster Diffusion (2312.09608): the encoder runs on key steps only, its features serve the steps between."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any

from torch import Tensor, nn

from ..denoiser import rows
from ..errors import UserError, whole_number
from .hooks import Mode, Replay, ReplayTokens, SiteHook
from .key_steps import check_key_steps, key_steps
from .sites import Sites
from .step_cache import StepCache

PAPER_PRIOR_NOISE = 0.003  # alpha of section 3.4


@dataclass(frozen=True)
class EncoderPropagation:
    """Settings of encoder propagation; `attach(net)` puts them to work.

    key_steps       the steps that run the whole network: "paper", "every:4", "0,1,2,3,5,10" or a published list's
                    name (`key_steps.py`); "every:1" is the plain network
    parallel        decode all steps between two key steps in one batch (section 3.3); their outputs depend on the
                    cached features and their own times alone
    max_parallel    steps in such a batch at most; bounds its memory
    prior_noise     alpha of prior noise injection x_t + alpha x_T (section 3.4), 0 for none; the paper's is 0.003
    prior_from      time t in [0, 1] below which it is added
    """

    key_steps: str = "paper"
    parallel: bool = False
    max_parallel: int = 64
    prior_noise: float = 0.0
    prior_from: float = 0.5

    def __post_init__(self):
        check_key_steps(self.key_steps)
        if not isinstance(self.parallel, bool):
            raise UserError(f"policy.parallel={self.parallel!r} must be True or False")
        whole_number("policy.max_parallel", self.max_parallel, 1)
        for name in ("prior_noise", "prior_from"):
            if not isinstance(getattr(self, name), Real):
                raise UserError(f"policy.{name}={getattr(self, name)!r} must be a number")
        if not 0 <= self.prior_noise < math.inf:
            raise UserError(f"policy.prior_noise={self.prior_noise} must be finite and not negative")
        if not 0 <= self.prior_from <= 1:
            raise UserError(f"policy.prior_from={self.prior_from} must lie between 0 and 1")

    def is_full(self, index: int, total: int | None) -> bool:
        return index in _key_steps(self.key_steps, total)

    def after_step(self, x_T: Tensor) -> Callable[[Tensor, Tensor], Tensor] | None:
        """Prior noise injection: x_t + alpha x_T wherever t lies below `prior_from`, but not on the final image."""
        if not self.prior_noise:
            return None

        def inject(x_t: Tensor, t: Tensor) -> Tensor:
            weight = self.prior_noise * ((t > 0) & (t < self.prior_from)).to(x_t.dtype)
            return x_t + rows(weight, x_t) * x_T if weight.any() else x_t

        return inject

    def hooks(self, net: nn.Module, parts: Sites, mode: Mode) -> list[tuple[nn.Module, SiteHook]]:
        blocks = [*parts.stem, *parts.encoder, *filter(None, [parts.middle])]
        if parts.time_token is None:
            return [(block, Replay(mode)) for block in blocks]
        return [(block, ReplayTokens(mode, parts.time_token)) for block in blocks]

    def attach(self, net: nn.Module, clock: Any = None) -> StepCache:
        """The running policy around `net`, which it hooks in place."""
        return StepCache(net, self, clock)


_key_steps = lru_cache(maxsize=256)(key_steps)

"""The entry points of Clockwork's and Faster Diffusion's own releases, by the names that their users know.

They stand on `apply_policy`'s mechanism: nothing needs a reset, and the plain `pipe(...)` works as before.
"""

import random
from typing import Any

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..policies.clockwork import Clockwork
from ..policies.encoder_propagation import PAPER_PRIOR_NOISE, EncoderPropagation
from ..policies.key_steps import PUBLISHED
from .apply import apply_policy, unet_of


def ClockworkWrapper(unet: nn.Module, clock: int = 4) -> nn.Module:
    """`pipe.unet = ClockworkWrapper(pipe.unet, clock=4)`: the same UNet, every clock-th step of which runs in full.

    It is the UNet itself, so its dtype, adapters and configuration are at hand. `unet.clock` may be changed later.
    `reset()` begins a new loop; loops are told apart without it. `unet.disable_clockwork()` gives back the plain UNet.
    """
    cache = ClockOfUNet(unet, clock).attach(unet)
    added = {"reset": cache.reset, "clock": clock, "disable_clockwork": cache.disable}
    vars(cache.inner).update(added)

    def remove() -> None:
        for name in added:
            vars(cache.inner).pop(name, None)

    cache.when_disabled(remove)
    return unet


class ClockOfUNet(Clockwork):
    """Clockwork by what the attribute `clock` of `unet` says at each step."""

    def __init__(self, unet: nn.Module, clock: int):
        super().__init__(clock)
        object.__setattr__(self, "unet", unet)

    def is_full(self, index: int, total: int | None) -> bool:
        return Clockwork(self.unet.clock).is_full(index, total)


def register_parallel_pipeline(pipe: Any, mod: str | int | None = None) -> None:
    """Give the pipeline a method `call(...)`: `pipe(...)` with encoder propagation, decoders in one batch."""
    _register(pipe, mod, parallel=True)


def register_normal_pipeline(pipe: Any, mod: str | int | None = None) -> None:
    """Give the pipeline a method `call(...)`: `pipe(...)` with encoder propagation, one step after another."""
    _register(pipe, mod, parallel=False)


def register_faster_forward(unet: nn.Module, mod: str | int = "50ls") -> None:
    """Choose the key steps of `pipe.call`: every mod-th step, or the name of a published list."""
    _key_steps(mod)
    unet._faster_mod = mod


def seed_everything(seed: int) -> None:
    """Seed Python's, NumPy's and torch's generators."""
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002 (the global generator is what is meant)
    torch.manual_seed(seed)


def _register(pipe: Any, mod: str | int | None, parallel: bool) -> None:
    unet_of(pipe, EncoderPropagation.__name__)
    if mod is not None:
        _key_steps(mod)

    def call(*args, **kwargs):
        chosen = [each for each in (mod, getattr(pipe.unet, "_faster_mod", None)) if each is not None]
        if len({_key_steps(each) for each in chosen}) > 1:
            raise UserError(f"mod={chosen[0]!r} of the pipeline is not mod={chosen[1]!r} of register_faster_forward")
        key_steps = _key_steps(chosen[0] if chosen else "50ls")
        settings = EncoderPropagation(key_steps=key_steps, parallel=parallel, prior_noise=PAPER_PRIOR_NOISE)
        with apply_policy(pipe, settings):
            return pipe(*args, **kwargs)

    pipe.call = call


def _key_steps(mod: str | int) -> str:
    if isinstance(mod, int) and not isinstance(mod, bool) and mod >= 1:
        return f"every:{mod}"
    if mod in PUBLISHED:
        return mod
    raise UserError(f"mod={mod!r} is unknown; choose an interval of at least 1 or one of {', '.join(PUBLISHED)}")

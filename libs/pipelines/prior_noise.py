"""Prior noise injection (2312.09608, section 3.4) in a diffusers pipeline: z_t + alpha z_T in the second half."""

import copy
import functools
import math
from collections.abc import Callable
from typing import Any

from absl import logging
from torch import Tensor

from ..policies.clocks import TimestepsClock
from ..policies.encoder_propagation import EncoderPropagation


class PriorNoise:
    """Adds alpha z_T to what `pipe.scheduler.step` returns for a time below `prior_from`.

    z_T is the state of the loop's first step, of unit variance. Schedulers such as Euler's keep a state of variance
    1 + sigma^2, to which the noise is scaled. Where times are not counted as in training (EDM's are log(sigma) / 4), a
    step's place in the loop stands for its time. The result of the last step is left alone, and so is, with a warning,
    a loop whose first state is no noise: one that starts in the middle (image to image, inpainting at a strength below
    1) or goes upwards (inversion).
    """

    def __init__(self, pipe: Any, settings: EncoderPropagation, clock: TimestepsClock):
        self.pipe, self.settings, self.clock = pipe, settings, clock
        self.loop, self.z_T, self.warned = 0, None, False
        self.scheduler = self.before = self.installed = None  # before: a wrapper that somebody put there already
        self.follow()
        clock.on_call = self.follow

    def follow(self) -> None:
        """Wrap the scheduler that the pipeline has now."""
        if self.pipe.scheduler is not self.scheduler:
            self.unwrap()
            self.scheduler = self.pipe.scheduler
            self.before = vars(self.scheduler).get("step")
            self.scheduler.step = self.installed = Step(self, self.scheduler.step)

    def unwrap(self) -> None:
        if self.scheduler is not None and vars(self.scheduler).get("step") is self.installed:
            del self.scheduler.step
            if self.before is not None:
                self.scheduler.step = self.before
        self.scheduler = None  # a wrapper around ours stays, and ours does nothing any more

    def remove(self) -> None:
        self.unwrap()
        self.clock.on_call = None
        self.z_T = None

    def step(self, original: Callable, model_output, timestep, sample: Tensor, *args, **kwargs):
        if self.scheduler is None:
            return original(model_output, timestep, sample, *args, **kwargs)
        if self.clock.loop != self.loop:
            self.loop = self.clock.loop
            self.z_T = sample / self._scale() if self._starts_from_noise() else None
        out = original(model_output, timestep, sample, *args, **kwargs)
        if self.z_T is None or not self._is_due():
            return out
        injected = (self.settings.prior_noise * self._scale()) * self.z_T
        if isinstance(out, tuple):
            return (out[0] + injected, *out[1:])
        out.prev_sample = out.prev_sample + injected
        return out

    def _starts_from_noise(self) -> bool:
        if self.clock.start == 0 and self.clock.values()[0] >= self.clock.values()[-1]:
            return True
        if not self.warned:
            logging.warning("prior_noise=%s: no noise is added, as this loop does not start from pure noise (a "
                            "strength below 1, or inversion)", self.settings.prior_noise)
            self.warned = True
        return False

    def _is_due(self) -> bool:
        """Whether the step that comes next is a grid point below `prior_from`."""
        values, place = self.clock.values(), self.clock.place + 1
        if place >= self.clock.end or not self._is_late(place):
            return False
        if not getattr(self.scheduler, "state_in_first_order", True):  # midway through a second-order step
            return False
        return place + 1 == len(values) or values[place + 1] != values[place]  # PNDM's first step is made twice

    def _is_late(self, place: int) -> bool:
        """Whether the time at this place of the list lies below `prior_from`."""
        values, unit = self.clock.values(), self.scheduler.config.get("num_train_timesteps", 0)
        if unit / 2 <= values[0] <= unit:  # pure noise is at 1 in training's unit; few "leading" steps begin below it
            return values[place] < self.settings.prior_from * unit
        return place >= (1 - self.settings.prior_from) * len(values)

    def _scale(self) -> float:
        """Standard deviation that pure noise has in the scheduler's state now."""
        if float(self.scheduler.init_noise_sigma) == 1 or self.scheduler.step_index is None:
            return 1.0
        return math.sqrt(1 + float(self.scheduler.sigmas[self.scheduler.step_index]) ** 2)


class Step:
    """A scheduler's `step` with the noise of `owner`. A copy of the scheduler, by pickle too, gets its `original` step
    back, and no pipeline along with it.
    """

    def __init__(self, owner: PriorNoise, original: Callable):
        functools.update_wrapper(self, original)  # pipelines look into its signature
        self.owner, self.original = owner, original

    def __call__(self, *args, **kwargs):
        return self.owner.step(self.original, *args, **kwargs)

    def __deepcopy__(self, memo: dict):
        return copy.deepcopy(self.original, memo)

    def __reduce__(self):
        return self.original.__reduce__()

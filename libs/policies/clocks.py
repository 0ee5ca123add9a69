"""Which step of the denoising loop a call of the network belongs to.

A policy that reuses features must know three things of a call: whether a new loop began (else the last image's
features leak into this one), its step, and which of several calls of that step it is (conditional and unconditional
passes may come separately). Values of timesteps do not tell: second-order solvers repeat them, image-to-image starts
in the middle, inversion goes upwards. So calls are placed by what stands behind the value.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Position(NamedTuple):
    """Where a call stands.

    loop     number of the denoising loop, from 1
    index    step of this loop, from 0
    branch   which call of the same caller in this step, from 0; None where nobody can tell
    total    steps of this loop, None where nobody knows
    times    the timesteps of this loop's steps: (total,) or (total, b); None where nobody knows
    """

    loop: int
    index: int
    branch: int | None
    total: int | None
    times: Tensor | None


class AnnouncedClock:
    """The caller says when a loop begins and which times it will ask for; then every call is the next step."""

    def __init__(self):
        self.loop, self.times = 0, torch.empty(0)
        self._calls: dict[Any, int] = {}

    def start(self, times: Tensor) -> None:
        self.loop, self.times, self._calls = self.loop + 1, times, {}

    def at(self, timestep: Tensor, caller: Any = None) -> Position:
        index = self._calls.get(caller, 0)
        self._calls[caller] = index + 1
        return Position(self.loop, index, 0, len(self.times), self.times)


class TimestepsClock:
    """Follows a diffusers loop, `for t in scheduler.timesteps`, from the outside and without asking the device.

    Every `set_timesteps` makes a new tensor, and every t is a view into it: the tensor tells the loop, the view's
    offset tells the step. A t that is a copy or a number is looked up by its value. Without a list (no scheduler, and
    t no view) a change of t is the next step, and a loop ends when t turns round.

    The same step again is another branch. Unless a scheduler vouches for the loop, it must be the very same t: another
    tensor of that value may as well be a loop that was broken off and begins again. Then nobody can tell, and
    `branch` is None until the next loop. A scheduler vouches for a loop of anyone's own too: one that was broken off in
    its first step must not begin again before another `set_timesteps` or `restart`, else it reuses what that step left.

    timesteps   gives the scheduler's tensor; None if there is no scheduler to ask
    steps       gives the number of steps after which the caller ends the loop; None for all to the end of the list
    """

    def __init__(self, timesteps: Callable[[], Tensor | None] | None = None,
                 steps: Callable[[], int | None] | None = None):
        self._ask, self._ask_steps = timesteps, steps
        self.on_call: Callable[[], None] | None = None  # called before each look at the list
        self._vouched = False  # whether the list is that scheduler's
        self.loop = 0
        self._reset(None)

    def restart(self) -> None:
        """The next call begins a new loop."""
        self._reset(None)

    def values(self) -> list[float]:
        """The list as numbers, fetched from the device once a loop."""
        if self._values is None:
            self._values = self.timesteps.tolist()
        return self._values

    def _reset(self, timesteps: Tensor | None) -> None:
        self.timesteps, self._values = timesteps, None  # the tensor is held, so that no other takes its address
        self.start = self.place = None  # of the loop's first step and of the present one, in `timesteps`
        self._last, self._value, self._direction = None, None, 0
        self._branches: dict[Any, int] = {}
        self._index, self._unclear = 0, False

    def at(self, timestep: Tensor | float, caller: Any = None) -> Position:
        if self.on_call is not None:
            self.on_call()
        timesteps = self._list_of(timestep)
        if timesteps is not self.timesteps:
            self._reset(timesteps)
        if timesteps is None:
            self._follow_values(timestep)
        else:
            self._follow_list(timestep)
        self._last = timestep
        branch = self._branches.get(caller, 0)
        self._branches[caller] = branch + 1
        if self._unclear:
            branch = None
        if timesteps is None:
            return Position(self.loop, self._index, branch, None, None)
        return Position(self.loop, self._index, branch, self.end - self.start, timesteps[self.start:self.end])

    @property
    def end(self) -> int:
        """Place behind the loop's last step."""
        length = len(self.timesteps)
        steps = self._ask_steps() if self._vouched and self._ask_steps is not None else None
        end = length if steps is None else min(length, self.start + steps)
        return end if self.place < end else length  # the number was another loop's

    def _list_of(self, timestep: Tensor | float) -> Tensor | None:
        known = self._ask() if self._ask is not None else None
        known = known if isinstance(known, Tensor) and known.dim() == 1 else None
        if not _is_view(timestep) or (known is not None and _address(known) == _address(timestep)):
            self._vouched = known is not None
            return known
        self._vouched = False  # another scheduler's list: two pipelines may share one network
        if self.timesteps is not None and _address(self.timesteps) == _address(timestep):
            return self.timesteps
        return torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(timestep.untyped_storage())

    def _follow_list(self, timestep: Tensor | float) -> None:
        place = self._place_of(timestep)
        if place is None:
            self._unclear = True
            place = 0 if self.place is None else self.place
        if self.place is None or place < self.place:  # below: a second loop over the same list
            self._begin()
            self.start = self.place = place
        elif place > self.place:
            self.place, self._index, self._branches = place, place - self.start, {}
        elif timestep is not self._last and not self._vouched:
            self._unclear = True

    def _place_of(self, timestep: Tensor | float) -> int | None:
        """Place of t in the list; None if it is not there."""
        if isinstance(timestep, Tensor) and _is_view(timestep) and _address(timestep) == _address(self.timesteps):
            return (timestep.storage_offset() - self.timesteps.storage_offset()) // self.timesteps.stride(0)
        if timestep is self._last:
            return self.place
        values, value, now = self.values(), _number(timestep), self.place
        if value not in values:
            return None
        if now is None or value not in values[now:]:
            return values.index(value)
        place = values.index(value, now)
        twice = values[place + 1:place + 2] == [value]  # a solver of second order
        return None if twice and place == now else place

    def _follow_values(self, timestep: Tensor | float) -> None:
        if timestep is self._last and isinstance(timestep, Tensor):
            return
        value = _number(timestep)
        change = 0 if self._value is None else (value > self._value) - (value < self._value)
        if self._value is None or change * self._direction < 0:
            self._begin()
            self._direction = 0
        elif change:
            self._index, self._direction, self._branches = self._index + 1, change, {}
        else:
            self._unclear = True
        self._value = value

    def _begin(self) -> None:
        self.loop += 1
        self._index, self._branches, self._unclear = 0, {}, False


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _is_view(timestep: Tensor | float) -> bool:
    """Whether t is one element of a longer list that is still there."""
    if not isinstance(timestep, Tensor) or timestep.device.type == "meta":
        return False
    distinct = 1 if 0 in timestep.stride() or timestep.dim() == 0 else timestep.numel()  # expand() has stride 0
    return distinct == 1 and timestep.untyped_storage().nbytes() > timestep.element_size()


def _number(timestep: Tensor | float) -> float:
    return float(timestep.reshape(-1)[0]) if isinstance(timestep, Tensor) else float(timestep)

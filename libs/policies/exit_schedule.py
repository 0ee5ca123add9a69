"""A fixed depth for every call of a denoising loop: as text, as a file, and calibrated.

    7              7 layers at every step
    3x30,13x20     30 calls of 3 layers, then 20 of 13
    60%            so much of the layers, for networks of any depth
    3x60%,100%x40% the same of the calls, for loops of any length
    FILE           what `python -m libs.exits.schedule` writes: JSON with `depths`, one a call, and what they are for
"""

import itertools
import json
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import UserError
from ..files import reason, write_json

FORMAT = "early-exit-schedule-1"
TEXT = re.compile(r"[0-9x,%\s-]*")
NUMBER = r"([0-9]{1,6}%?)"
PART = re.compile(f"{NUMBER}x{NUMBER}")


def schedule_file(text: str) -> Path | None:
    """The file that a `policy.schedule` names; None for one that is spelled out, and for ""."""
    return None if TEXT.fullmatch(text) else Path(text)


def depths_of(text: str, layers: int, times: Tensor | None = None) -> tuple[int, ...]:
    """Layers to run in each call of a loop.

    layers: of the network. times: (calls,) in the network's own unit; None checks `text` alone, since what a loop is
    made of is not known yet. Raises UserError for text that is no schedule, a file that cannot be read, and one made
    for another depth, number of calls or times.

    >>> depths_of("3x2,5x1", 5, torch.tensor([900.0, 500.0, 100.0]))
    (3, 3, 5)
    >>> depths_of("1x60%,100%x40%", 5, torch.tensor([900.0, 700.0, 500.0, 300.0]))
    (1, 1, 5, 5)
    >>> depths_of("3x2,5x1", 5, torch.tensor([900.0, 500.0]))
    Traceback (most recent call last):
    ...
    libs.errors.UserError: policy.schedule='3x2,5x1' is for 3 calls of the network, this sampler makes 2
    """
    path = schedule_file(text)
    if path is not None:
        return _from_file(path, layers, times)
    if re.fullmatch(NUMBER, text.strip()):
        depths = (_layers(text.strip(), layers),) * (1 if times is None else len(times))
    else:
        parts = [PART.fullmatch(part.strip()) for part in text.split(",")]
        if None in parts:
            raise UserError(f"policy.schedule={text!r} is no schedule; write a number of layers such as 7, layers x "
                            "calls such as 3x30,13x20, or a file of python -m libs.exits.schedule")
        calls = _calls(text, [part[2] for part in parts], 100 if times is None else len(times))
        depths = tuple(_layers(part[1], layers) for part, count in zip(parts, calls, strict=True) for _ in range(count))
        if times is not None and len(depths) != len(times):
            raise UserError(f"policy.schedule={text!r} is for {len(depths)} calls of the network, this sampler makes "
                            f"{len(times)}")
    wrong = [depth for depth in depths if not 1 <= depth <= layers]
    if wrong:
        raise UserError(f"policy.schedule={text!r}: {wrong[0]} layers; this network has 1 to {layers}")
    return depths


def _layers(number: str, layers: int) -> int:
    """A number of layers, or a share of them, which above 0% is at least one."""
    if not number.endswith("%"):
        return int(number)
    return max(1, _share(number, layers)) if int(number[:-1]) else 0


def _calls(text: str, numbers: Sequence[str], total: int) -> list[int]:
    """Numbers of calls, or shares of so many: then each part ends at the nearest whole call."""
    if not any(number.endswith("%") for number in numbers):
        return [int(number) for number in numbers]
    ends = list(itertools.accumulate(int(number.rstrip("%")) for number in numbers))
    if not all(number.endswith("%") for number in numbers) or ends[-1] != 100:
        raise UserError(f"policy.schedule={text!r}: shares of the calls must be all in % and make 100% together")
    places = [0, *(_share(f"{end}%", total) for end in ends)]
    return [after - before for before, after in itertools.pairwise(places)]


def _share(number: str, total: int) -> int:
    return math.floor(int(number.rstrip("%")) * total / 100 + 0.5)


def read_schedule(path: str | Path) -> dict[str, Any]:
    """The content of a schedule's file. Raises UserError for one that is missing or something else."""
    try:
        held = json.loads(Path(path).read_text())
    except FileNotFoundError:
        raise UserError(f"policy.schedule={str(path)!r}: no such file; write a number of layers such as 7, layers x "
                        "calls such as 3x30,13x20, or a file of python -m libs.exits.schedule") from None
    except (OSError, ValueError) as error:
        raise UserError(f"policy.schedule={str(path)!r} cannot be read ({reason(error)})") from error
    if not isinstance(held, dict) or held.get("format") != FORMAT:
        raise UserError(f"policy.schedule={str(path)!r} is no schedule; python -m libs.exits.schedule writes one")
    depths, times, layers = held.get("depths"), held.get("times"), held.get("layers")
    whole = (isinstance(layers, int) and _all_numbers(depths, int) and _all_numbers(times, int | float)
             and len(depths) == len(times) and all(1 <= depth <= layers for depth in depths))
    if not whole:
        raise UserError(f"policy.schedule={str(path)!r} is damaged: its layers, depths and times do not fit together")
    return held


def write_schedule(path: str | Path, depths: Sequence[int], layers: int, times: Tensor, about: Mapping) -> None:
    """A file of `depths`, one for each of `times` in the network's own unit, with whatever `about` tells of it."""
    ratio = sum(depths) / (len(depths) * layers)
    content = {"format": FORMAT, "layers": layers, "depths": list(depths), "times": times.tolist(),
               "layer_ratio": ratio, **about}
    write_json(path, content)


def nearest(values: Sequence[Any], made_for: Tensor, times: Tensor) -> tuple[Any, ...]:
    """Depths, or what else there is one of a call, for other `times` than they were `made_for`: of the nearest each."""
    if torch.equal(made_for, times):
        return tuple(values)
    places = (times[:, None] - made_for[None]).abs().argmin(dim=1)
    return tuple(values[i] for i in places.tolist())


def _from_file(path: Path, layers: int, times: Tensor | None) -> tuple[int, ...]:
    held = read_schedule(path)
    if held["layers"] != layers:
        raise UserError(f"policy.schedule={str(path)!r} is for a network of {held['layers']} layers, this one has "
                        f"{layers}")
    if times is not None and len(held["depths"]) != len(times):
        raise UserError(f"policy.schedule={str(path)!r} is for {len(held['depths'])} calls of the network, this "
                        f"sampler makes {len(times)}")
    if times is not None:
        made_for = torch.tensor(held["times"], dtype=torch.float64)
        for call, (there, here) in enumerate(zip(made_for.tolist(), times.tolist(), strict=True)):
            if abs(there - here) > 1e-6 * max(1.0, abs(there)):
                raise UserError(f"policy.schedule={str(path)!r} is for other times: call {call} is at {there:.6g} "
                                f"there and at {here:.6g} here, in the network's unit")
    return tuple(held["depths"])


def _all_numbers(values: Any, kind: Any) -> bool:
    return isinstance(values, list) and len(values) > 0 and all(
        isinstance(value, kind) and not isinstance(value, bool) for value in values)

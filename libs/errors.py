"""The one error that a user can cause, and the sentence it prints."""

from collections.abc import Iterable
from numbers import Integral

import torch


class UserError(ValueError):
    """Bad input. Its text is one line that names the flag or field, the value and the choices.

    Entry points print it and exit with status 2 (`cli.run`); library callers get a ValueError.
    """


def choose(field: str, value, choices: Iterable):
    """Return `choices[value]` of a dict (or `value` itself, of a list), else raise a UserError that lists them.

    >>> choose("sampler.name", "ddmi", {"ddim": 1, "ddpm": 2})
    Traceback (most recent call last):
    ...
    libs.errors.UserError: sampler.name='ddmi' is unknown; choose from ddim, ddpm
    """
    if value not in choices:
        raise UserError(f"{field}={value!r} is unknown; choose from {', '.join(map(str, choices))}")
    return choices[value] if isinstance(choices, dict) else value


def whole_number(field: str, value, least: int, note: str = "") -> None:
    """Raise a UserError unless `value` is an integer of at least `least`. note: ends that line.

    >>> whole_number("policy.clock", 2.5, 1)
    Traceback (most recent call last):
    ...
    libs.errors.UserError: policy.clock=2.5 must be a whole number
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise UserError(f"{field}={value!r} must be a whole number")
    if value < least:
        raise UserError(f"{field}={value} must be at least {least}{note}")


def is_out_of_memory(error: BaseException) -> bool:
    # torch has no exception class for the memory of the CPU
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "DefaultCPUAllocator" in str(error)

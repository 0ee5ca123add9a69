"""Seeds and labels as they stand on a command line: `--seeds=0-63,100 --labels=0-9`."""

import re
from collections.abc import Sequence
from itertools import pairwise

from .errors import UserError

MOST_SEEDS = 10_000_000  # two hundred times the largest published evaluation; more is a typing error
SEED_END = 2**63  # seeds are signed 64-bit integers in every generator


def parse_seeds(text: str, flag: str = "seeds") -> list[int]:
    """Seeds in the order given: a comma list of integers and of inclusive ranges.

    Raises UserError for text of any other form, a reversed range, seeds of 2^63 and more, more than ten
    million seeds, and seeds named twice (two equal images would count as two samples).

    >>> parse_seeds("0,5,7-9")
    [0, 5, 7, 8, 9]
    >>> parse_seeds("9-7")
    Traceback (most recent call last):
    ...
    libs.errors.UserError: --seeds=9-7: the range 9-7 is reversed; write 7-9
    """
    ranges = _parse_ranges(text, flag)
    for item in ranges:
        if item[-1] >= SEED_END:
            raise UserError(f"--{flag}={text}: {item[-1]} is too large; seeds are below 2^63")
    ordered = sorted(ranges, key=lambda item: item[0])
    for left, right in pairwise(ordered):
        if right[0] <= left[-1]:
            raise UserError(f"--{flag}={text}: seed {right[0]} is named twice")
    count = sum(map(_length, ranges))
    if count > MOST_SEEDS:
        raise UserError(f"--{flag}={text}: {count:,} seeds; at most {MOST_SEEDS:,}")
    return [seed for item in ranges for seed in item]


def parse_labels(text: str | None, seeds: Sequence[int], num_classes: int) -> list[int] | None:
    """The class of each seed's image: `labels[seed % len(labels)]`, so that it depends on the seed alone.

    `text` is written like seeds ("3", "0-9", "7,7,2"); None stands for all classes in turn. The result is
    None if the model has no classes (`num_classes` 0). Raises UserError for a label outside 0 to
    num_classes - 1, and for labels given to a model that has no classes.

    >>> parse_labels("3,5", seeds=[0, 1, 2, 10], num_classes=10)
    [3, 5, 3, 3]
    >>> parse_labels(None, seeds=range(8, 12), num_classes=10)
    [8, 9, 0, 1]
    >>> parse_labels("0,10", seeds=[0], num_classes=10)
    Traceback (most recent call last):
    ...
    libs.errors.UserError: --labels=0,10: label 10 is out of range; this model's classes are 0 to 9
    """
    if not num_classes:
        if text is not None:
            raise UserError(f"--labels={text}: this model has no classes; leave the flag out")
        return None
    ranges = [range(num_classes)] if text is None else _parse_ranges(text, "labels")
    for item in ranges:
        if item[-1] >= num_classes:
            known = f"this model's classes are 0 to {num_classes - 1}"
            raise UserError(f"--labels={text}: label {item[-1]} is out of range; {known}")
    labels = [label for item in ranges for label in item]
    return [labels[seed % len(labels)] for seed in seeds]


def _parse_ranges(text: str, flag: str) -> list[range]:
    """The non-empty ranges of a comma list of "N" and inclusive "N-M"."""
    ranges = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([0-9]{1,30})(?:-([0-9]{1,30}))?\s*", part)
        if not match:
            raise UserError(f"--{flag}={text}: {part!r} is no number or range; write it like 0-63 or 3,5,8-9")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise UserError(f"--{flag}={text}: the range {first}-{last} is reversed; write {last}-{first}")
        ranges.append(range(first, last + 1))
    return ranges


def _length(item: range) -> int:
    return item[-1] - item[0] + 1  # len() of a range is limited to 2^63 - 1

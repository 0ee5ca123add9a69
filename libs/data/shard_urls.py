"""Addresses of shards, as `data.path` and prepare_data.py take them.

    data/{0000..0123}.tar               braces: a range, its zeros kept, or a list {a,b}; they nest
    data/*.tar                          what matches, sorted; a folder stands for its *.tar
    https://host/{000..099}.tar         fetched
    pipe:aws s3 cp s3://bucket/0.tar -  what a shell command prints
    a.tar;b.tar                         several; commands with a ";" of their own need a file of addresses
    shards.txt                          a file of addresses, one a line, without those that begin with #
"""

import glob
import os
import re
from collections import Counter
from pathlib import Path

from ..errors import UserError
from ..files import reason

REMOTE = ("http://", "https://", "pipe:")
RANGE = re.compile(r"(-?\d+)\.\.(-?\d+)(?:\.\.(\d+))?")


def is_remote(address: str) -> bool:
    """Whether the shard has to be fetched before its samples can be read in any order."""
    return address.startswith(REMOTE)


def list_shards(text: str, field: str = "data.path") -> list[str]:
    """The single addresses, in order, that `text` names.

    Raises UserError, naming `field`, where a local file is missing, a pattern matches none, or a shard is named twice.
    """
    if not text.strip():
        raise UserError(f"{field} is empty; it must name shards, as in data/{{0000..0123}}.tar")
    addresses = [address for part in _parts(text, field) for address in _expanded(part, field)]
    places = [address if is_remote(address) else os.path.realpath(address) for address in addresses]
    place, times = Counter(places).most_common(1)[0]
    if times > 1:
        raise UserError(f"{field} names {addresses[places.index(place)]} {times} times; its samples would be repeated")
    return addresses


def braces(text: str) -> list[str]:
    """What a pattern with braces stands for; braces without a range or a comma in them stay as they are.

    >>> braces("{a,b{08..10}}.tar")
    ['a.tar', 'b08.tar', 'b09.tar', 'b10.tar']
    >>> braces("{0..6..3}-{x}")
    ['0-{x}', '3-{x}', '6-{x}']
    """
    start = text.find("{")
    if start < 0:
        return [text]
    depth, cuts = 0, [start]  # the open brace, the commas at its level, and where it closes
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 1 and text[i] == ",":
            cuts.append(i)
        if depth == 0:
            cuts.append(i)
            break
    else:
        return [text]  # never closed
    inner = [text[left + 1:right] for left, right in zip(cuts, cuts[1:], strict=False)]
    numbers = RANGE.fullmatch(inner[0]) if len(inner) == 1 else None
    if numbers:
        heads = _numbers(*numbers.groups())
    elif len(inner) == 1:
        heads = ["{" + each + "}" for each in braces(inner[0])]
    else:
        heads = [each for part in inner for each in braces(part)]
    return [text[:start] + head + tail for head in heads for tail in braces(text[cuts[-1] + 1:])]


def _numbers(first: str, last: str, step: str | None) -> list[str]:
    low, high, step = int(first), int(last), max(int(step or 1), 1)
    width = max(map(len, (first, last))) if any(re.match(r"-?0\d", each) for each in (first, last)) else 0
    found = range(low, high + 1, step) if low <= high else range(low, high - 1, -step)
    return [f"{i:0{width}d}" for i in found]


def _parts(text: str, field: str) -> list[str]:
    path = Path(text).expanduser()
    if path.suffix == ".txt" and not is_remote(text):
        try:
            lines = [line.strip() for line in path.read_text("utf-8").splitlines()]
        except (OSError, ValueError) as error:
            raise UserError(f"{field}={text!r} cannot be read as a file of addresses "
                            f"({getattr(error, 'strerror', None) or reason(error)})") from error
        lines = [line for line in lines if line and not line.startswith("#")]
        if not lines:
            raise UserError(f"{field}={text!r} holds no addresses")
        return lines
    return [part.strip() for part in text.split(";") if part.strip()]


def _expanded(part: str, field: str) -> list[str]:
    found = []
    for address in braces(part):
        if is_remote(address):
            found.append(address)
            continue
        path = Path(address).expanduser()
        if path.is_file():
            found.append(str(path))
        elif path.is_dir():
            found += _matches(f"{glob.escape(str(path))}/*.tar", f"{field}: {address} holds no *.tar (images with "
                              "captions beside them: data.name=captioned_folder)")
        elif glob.has_magic(address):
            found += _matches(str(path), f"{field}: nothing matches {address}")
        else:
            raise UserError(f"{field}: the shard {address} is not there")
    return found


def _matches(pattern: str, problem: str) -> list[str]:
    found = sorted(path for path in glob.glob(pattern, recursive=True) if Path(path).is_file())
    if not found:
        raise UserError(problem)
    return found

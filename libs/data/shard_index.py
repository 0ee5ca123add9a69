"""What is in a shard and where: found once, by reading it whole, and kept for the next time.

A sample is the files of one name, `00017.jpg`, `00017.json`, `00017.txt`, that stand one after another: an image, and
its captions in the JSON or, one a line, in the text. Every image is decoded once here, so that later each sample of an
epoch can be had, exactly once, in any order.
"""

import contextlib
import dataclasses
import io
import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import UserError
from ..files import atomic_path
from .cache import alone_in
from .folder import decode
from .image_files import EXTENSIONS
from .shard_files import LeftOut, Read, Shard, Where

IMAGES = tuple(extension[1:] for extension in EXTENSIONS)  # of several in a sample, the first in this order is taken
FORMAT = 1  # of the index
Members = dict[str, tuple[Where, int]]  # extension -> (where, bytes)


@dataclasses.dataclass(frozen=True)
class Sample:
    """One sample of a shard, with an image and at least one caption; `numbers` are those of its JSON, for filters."""

    key: str
    members: Members
    numbers: dict[str, float]

    @property
    def image(self) -> str:
        """Extension of the image."""
        return image_in(self.members)


@dataclasses.dataclass(frozen=True)
class ShardIndex:
    """The usable samples of a shard in their order, and the others; `file` is where this is kept, if it is."""

    samples: list[Sample]
    left_out: LeftOut
    file: Path | None = None


def read_index(shard: Shard, caption_key: str, keep: bool = True) -> ShardIndex:
    """The index of a shard: the kept one where it is of this state of the shard, else made and kept.

    caption_key: field of the JSON that holds the caption, or a list of captions.
    """
    if not keep:
        return make_index(shard, caption_key)
    made_from = {"format": FORMAT, "caption_key": caption_key, **shard.state()}
    files = shard.index_files()
    held = _kept(files, made_from)
    if held is not None:
        return held
    with alone_in(shard.lock()):
        return _kept(files, made_from) or _keep(make_index(shard, caption_key), files, made_from)


def _kept(files: Sequence[Path], made_from: dict[str, Any]) -> ShardIndex | None:
    for path in files:
        with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # missing or damaged: it is made again
            held = json.loads(path.read_bytes())
            if held["made_from"] == made_from:
                return _unpacked(held, path)
    return None


def _keep(index: ShardIndex, files: Sequence[Path], made_from: dict[str, Any]) -> ShardIndex:
    content = json.dumps({"made_from": made_from, "left_out": dataclasses.asdict(index.left_out),
                          "samples": [[each.key, each.members, each.numbers] for each in index.samples]})
    for path in files:
        with contextlib.suppress(UserError):  # cannot be written there: the next place
            with atomic_path(path) as temporary:
                temporary.write_text(content)
            return dataclasses.replace(index, file=path)
    return index


def load_index(path: Path) -> ShardIndex:
    """An index that `read_index` has kept."""
    return _unpacked(json.loads(path.read_bytes()), path)


def _unpacked(held: dict, path: Path) -> ShardIndex:
    samples = [Sample(key, {name: tuple(at) for name, at in members.items()}, numbers)
               for key, members, numbers in held["samples"]]
    return ShardIndex(samples, LeftOut(**held["left_out"]), path)


def make_index(shard: Shard, caption_key: str) -> ShardIndex:
    """Read a shard whole and see what can be used."""
    samples, left_out = [], LeftOut()
    with shard.reading() as read:
        for key, members in _grouped(shard.members(left_out)):
            name, image = f"{shard.address}/{key}", image_in(members)
            if image is None:
                left_out.add("no image", name)
                continue
            try:
                open_image(read(*members[image]), f"{name}.{image}")
            except UserError:
                left_out.add("unreadable image", f"{name}.{image}")
                continue
            captions, fields = read_texts(read, members, caption_key)
            if captions:
                samples.append(Sample(key, members, _numbers(fields)))
            else:
                left_out.add(f"no caption (json {caption_key!r}, or txt)", name)
    return ShardIndex(samples, left_out)


def _numbers(fields: Mapping[str, Any]) -> dict[str, float]:
    return {name: value for name, value in fields.items()
            if isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < math.inf}


def image_in(members: Iterable[str]) -> str | None:
    """The extension of a sample's image."""
    return next((extension for extension in IMAGES if extension in members), None)


def open_image(content: bytes, name: str, channels: int = 3) -> Image.Image:
    """Decode one image, upright, on white. Raises UserError where it cannot be read."""
    pixels = decode(name, None, channels, file=io.BytesIO(content))
    return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)


def read_texts(read: Read, members: Members, caption_key: str) -> tuple[list[str], dict[str, Any]]:
    """The captions of a sample, and all fields of its JSON; those that cannot be read are as if they were not there."""
    fields, lines = {}, []
    if "json" in members:
        try:
            content = json.loads(read(*members["json"]))
        except ValueError:
            content = None
        fields = content if isinstance(content, dict) else {}
        held = fields.get(caption_key)
        lines = held if isinstance(held, list) else [held]
    captions = [" ".join(line.split()) for line in lines if isinstance(line, str) and line.strip()]
    if not captions and "txt" in members:
        text = read(*members["txt"]).decode("utf-8", errors="replace")
        captions = [" ".join(line.split()) for line in text.splitlines() if line.strip()]
    return captions, fields


def _grouped(files: Iterable[tuple[str, str, Where, int]]) -> Iterator[tuple[str, Members]]:
    """Samples: files of one key that follow each other, each extension once."""
    held, members = None, {}
    for key, extension, where, size in files:
        if members and (key != held or extension in members):
            yield held, members
            members = {}
        held, members[extension] = key, (where, size)
    if members:
        yield held, members

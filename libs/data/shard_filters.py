"""Filters and maps of the samples of shards: plain functions, to which a user's own may be added.

A filter takes a `Sample` of the index, before anything is decoded, and returns why it is left out, or None. A map takes
a sample as a dictionary and returns another: `image` (Pillow), `text` (its first caption), every field of its JSON, and
every other file of it as bytes under its extension, which a map that needs an image decodes. What makes them raises
UserError for arguments that no sample fits.

    open_shards(shards, filters=[present("json"), at_least("aesthetic_score", 6)], maps=[crop(1024), canny()], ...)
"""

import contextlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError

from ..errors import UserError, choose, whole_number
from .canny import canny as canny_edges
from .raw import fit_coco
from .shard_index import Sample, open_image

Fields = dict[str, Any]
Filter = Callable[[Sample], str | None]
Map = Callable[[Fields], Fields]


# ---- filters


def present(*extensions: str) -> Filter:
    """Keep samples that have files of all these extensions."""
    def why(sample: Sample) -> str | None:
        missing = [extension for extension in extensions if extension not in sample.members]
        return f"no {missing[0]}" if missing else None

    return why


def at_least(name: str, lowest: float, field: str = "data.min_score") -> Filter:
    """Keep samples whose number `name` is `lowest` or more. One without that number is left out, and told apart.

    field: that the UserError names where `lowest` is not a number, which would keep everything.
    """
    if math.isnan(lowest):
        raise UserError(f"{field}={lowest} must be a number")

    def why(sample: Sample) -> str | None:
        if name not in sample.numbers:
            return f"no {name}"
        return f"{name} below {lowest:g}" if sample.numbers[name] < lowest else None

    return why


# ---- maps


def select(*names: str) -> Map:
    """Keep these fields alone, beside the key, the image and the text."""
    kept = {"key", "image", "text", *names}
    return lambda sample: {name: value for name, value in sample.items() if name in kept}


def rename(old: str, new: str) -> Map:
    """Give a field another name."""
    return lambda sample: {new if name == old else name: value for name, value in sample.items()}


def crop(size: int, name: str = "image") -> Map:
    """Cut out the centre, size x size pixels; a side that is shorter stays as it is, without a border."""
    whole_number("size", size, 1)

    def cut(sample: Fields) -> Fields:
        image = _field(sample, name, "crop")
        width, height = (min(size, side) for side in image.size)
        left, top = (image.width - width) // 2, (image.height - height) // 2
        return {**sample, name: image.crop((left, top, left + width, top + height))}

    return cut


def resize(size: int, name: str = "image") -> Map:
    """The centre square at size x size pixels (Lanczos); small images are enlarged."""
    whole_number("size", size, 1)
    return lambda sample: {**sample, name: fit_coco(_field(sample, name, "resize"), size, name)}


def rescale(name: str = "image", to: str = "rescaled") -> Map:
    """A float32 tensor (c, h, w) in [-1, 1]."""
    def scaled(sample: Fields) -> Fields:
        pixels = np.array(_field(sample, name, "rescale"))
        return {**sample, to: torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1) / 127.5 - 1}

    return scaled


def canny(low: int = 100, high: int = 200, name: str = "image", to: str = "edges") -> Map:
    """Canny's edges of an image, white on black."""
    whole_number("low", low, 0)
    whole_number("high", high, low, ", the value of low")

    def edged(sample: Fields) -> Fields:
        pixels = np.array(_field(sample, name, "canny"))
        return {**sample, to: Image.fromarray(canny_edges(pixels.reshape(*pixels.shape[:2], -1), low, high)[..., 0])}

    return edged


MAPS = {"select": select, "rename": rename, "crop": crop, "resize": resize, "rescale": rescale, "canny": canny}


def read_maps(text: str, field: str = "data.maps") -> list[Map]:
    """Maps as a config writes them: "crop 1024; resize 512; canny 100 200". Raises UserError, naming `field`."""
    maps = []
    for part in filter(None, map(str.strip, text.split(";"))):
        name, *words = part.split()
        make = choose(field, name, MAPS)
        try:
            maps.append(make(*(int(word) if word.removeprefix("-").isdecimal() else word for word in words)))
        except UserError as error:
            raise UserError(f"{field}: {part!r}: {error}") from error
        except TypeError as error:
            raise UserError(f"{field}: {part!r} has other arguments than {name} takes; see "
                            "libs/data/shard_filters.py") from error
    return maps


def as_image(value: Any, where: str) -> Image.Image | None:
    """The image that a field is, or the file of one, which is called `where`; None for anything else."""
    if isinstance(value, bytes):
        with contextlib.suppress(UnidentifiedImageError), Image.open(io.BytesIO(value)):
            return open_image(value, where)
    return value if isinstance(value, Image.Image) else None


def _field(sample: Fields, name: str, used_by: str) -> Image.Image:
    image = as_image(sample.get(name), f"{sample.get('key', 'a sample')}.{name}")
    if image is None:
        raise UserError(f"data.maps: {used_by} needs an image {name!r}; {sample['key']} has {', '.join(sample)}")
    return image

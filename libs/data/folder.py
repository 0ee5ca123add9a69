"""Image files one by one: decode, crop, resize."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from ..errors import UserError
from ..files import reason
from .image_files import list_images

MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode


def folder_batches(
    path: str | Path,
    batch_size: int,
    channels: int = 3,
    image_size: int | None = None,
    field: str = "data.path",
    names: list[str] | None = None,
) -> Iterator[Tensor]:
    """Yield the images of a folder as uint8 (b, h, w, c), sorted by path, without holding all of them.

    image_size: centre crop and resize as in training; None keeps the pixels as they are, and then all sizes
        must be equal.
    names: of the files, relative to `path`; None takes all.
    """
    files = [f"{path}/{name}" for name in names or list_images(path, field)]
    size = image_size or _first_size(files[0], field)
    for start in range(0, len(files), batch_size):
        yield torch.from_numpy(
            np.stack([decode(f, size, channels, field) for f in files[start : start + batch_size]])
        )


def centre(image: Image.Image, size: int, where: str) -> Image.Image:
    """The centre square of the short side, resized (Lanczos, antialiased), never enlarged."""
    short = min(image.size)
    if short < size:
        raise UserError(
            f"data.image_size={size}: {where} is only {_by(image.size)}, and images are not enlarged"
        )
    return centre_square(image).resize((size, size), Image.Resampling.LANCZOS)


def centre_square(image: Image.Image) -> Image.Image:
    """The centre square of the short side."""
    short = min(image.size)
    left, top = (image.width - short) // 2, (image.height - short) // 2
    return image.crop((left, top, left + short, top + short))


def decode(
    path: str,
    size: int | tuple[int, int] | None,
    channels: int,
    field: str = "data.path",
    file: BinaryIO | None = None,
    fit: Callable[[Image.Image, int, str], Image.Image] = centre,
    upright: bool = True,
) -> np.ndarray:
    """One image file as uint8 (h, w, channels).

    size: an int asks `fit` for size x size pixels; (width, height) demands exactly that size; None keeps the
        image's own. Transparent parts are laid on white.
    file: what to read; `path` then only names it.
    fit: (image, size, where) -> image of size x size.
    upright: turn photos as their camera says.
    Raises UserError, naming `field`, for an image that is unreadable or not of a size that is asked for.
    """
    image = _open(path, field, file, upright)
    if isinstance(size, tuple) and image.size != size:
        raise UserError(
            f"{field}: {path} is {_by(image.size)} but the first image is {_by(size)}; sizes must be equal"
        )
    if image.mode.startswith("I;16"):  # Pillow would clip 16-bit grays at 255
        image = Image.fromarray((np.asarray(image) // 257).astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    image = image.convert(MODES[channels])
    if isinstance(size, int):
        image = fit(image, size, path)
    return np.array(image).reshape(image.height, image.width, channels)


def _open(path: str, field: str, file: BinaryIO | None = None, upright: bool = True) -> Image.Image:
    try:
        with Image.open(path if file is None else file) as image:
            if upright:
                ImageOps.exif_transpose(image, in_place=True)
            image.load()
            return image
    # Pillow reports broken files by any of these, depending on the format.
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        raise UserError(f"{field}: {path} cannot be read as an image ({reason(error)})") from error


def _first_size(path: str, field: str) -> tuple[int, int]:
    return _open(path, field).size


def _by(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"

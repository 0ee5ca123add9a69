"""Folders of image files: list, decode, crop, resize, and keep the result for the next time."""

import contextlib
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from absl import logging
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_path, reason
from .parallel import cores, items

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
MODES = {1: "L", 3: "RGB"}  # channels -> Pillow's mode
CHUNK_BYTES = 1 << 20  # decoded bytes that one task of a reading process returns
PARALLEL_FROM = 2000  # fewer images than this are read faster than processes start


def list_images(root: str | Path, field: str = "data.path") -> list[str]:
    """Names, relative to `root` and sorted, of all image files below it; hidden ones are left out.

    Raises UserError, naming `field`, where there is no folder or no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{field}={str(root)!r} is not a folder")
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        names = [name for name in names if name.lower().endswith(EXTENSIONS) and not name.startswith(".")]
        # Strings, since a Path for each of a million images takes its time.
        prefix = "" if folder == str(root) else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        found += [prefix + name for name in names]
    if not found:
        raise UserError(f"{field}={str(root)!r} holds no images ({', '.join(EXTENSIONS)})")
    return sorted(found)


def read_folder(
    root: Path, names: list[str], image_size: int, channels: int, workers: int = 0, cache: bool = True
) -> Tensor:
    """The files `root/name` as uint8 (n, image_size, image_size, channels), in the order given.

    workers: reading processes; 0 chooses by the number of cores.
    cache: keep the decoded array in one hidden file in `root`, valid as long as names, sizes and times of the
        files are the same. A folder that cannot be written is no error, only slower the next time.
    Raises UserError for an image that is unreadable or smaller than image_size.
    """
    stored = cache_file(root, files_digest(root, names), image_size, channels) if cache else None
    if stored is not None and stored.is_file():
        # Copy-on-write pages: processes on one machine share them, and nothing is read before it is needed.
        # ValueError: the file is damaged, so it is made again.
        with contextlib.suppress(ValueError):
            return torch.from_numpy(np.load(stored, mmap_mode="c"))
    array = _decode_all([f"{root}/{name}" for name in names], image_size, channels, workers)
    if stored is not None:
        _store(stored, array)
    return torch.from_numpy(array)


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


def decode(path: str, size: int | tuple[int, int] | None, channels: int, field: str = "data.path") -> np.ndarray:
    """One image file as uint8 (h, w, channels).

    size: an int crops the centre to the short side and resizes to size x size (Lanczos, antialiased), never
        enlarging; (width, height) demands exactly that size; None keeps the image's own. Transparent parts are
        laid on white.
    """
    image = _open(path, field)
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
        image = _crop_and_resize(image, size, path)
    return np.array(image).reshape(image.height, image.width, channels)


def _open(path: str, field: str) -> Image.Image:
    try:
        with Image.open(path) as image:
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


def _crop_and_resize(image: Image.Image, size: int, path: str) -> Image.Image:
    short = min(image.size)
    if short < size:
        raise UserError(
            f"data.image_size={size}: {path} is only {_by(image.size)}, and images are not enlarged"
        )
    left, top = (image.width - short) // 2, (image.height - short) // 2
    image = image.crop((left, top, left + short, top + short))
    return image if short == size else image.resize((size, size), Image.Resampling.LANCZOS)


class _Chunks(Dataset):
    """Decoded images of the `files`, so many an item that it is worth handing over; a UserError where one is bad."""

    def __init__(self, files: list[str], image_size: int, channels: int):
        self.files, self.image_size, self.channels = files, image_size, channels
        self.step = max(1, CHUNK_BYTES // (image_size**2 * channels))

    def __len__(self) -> int:
        return -(-len(self.files) // self.step)

    def __getitem__(self, number: int) -> np.ndarray | UserError:
        files = self.files[number * self.step:(number + 1) * self.step]
        try:
            return np.stack([decode(path, self.image_size, self.channels) for path in files])
        except UserError as error:
            return error


def _decode_all(files: list[str], image_size: int, channels: int, workers: int) -> np.ndarray:
    array = np.empty((len(files), image_size, image_size, channels), np.uint8)
    # By processes, since small PNGs hold Python's lock while they decode.
    workers = (workers or min(8, cores())) if len(files) >= PARALLEL_FROM else 1
    done = 0
    with tqdm(total=len(files), desc="reading images", unit="image", delay=1) as bar:
        for part in items(_Chunks(files, image_size, channels), workers, "data.workers"):
            if isinstance(part, UserError):
                raise part
            array[done : done + len(part)] = part
            done += len(part)
            bar.update(len(part))
    return array


def files_digest(root: str | Path, names: list[str]) -> str:
    """SHA-256 of the names, sizes and times of the files `root/name`: the same as long as the files are."""
    digest = hashlib.sha256()
    for name in names:
        status = os.stat(f"{root}/{name}")
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


def cache_file(folder: Path, digest: str, image_size: int, channels: int) -> Path:
    """Where the decoded images of one state of a folder, or of a database in it, are kept."""
    return folder / f".images_{image_size}x{channels}_{digest[:16]}.npy"


def drop_outdated(stored: Path) -> None:
    """Remove what is kept of older states, and say what is kept now."""
    for outdated in stored.parent.glob(stored.name.rsplit("_", 1)[0] + "_*.npy"):
        if outdated != stored:
            outdated.unlink(missing_ok=True)
    logging.info("kept the decoded images in %s", stored)


def _store(stored: Path, array: np.ndarray) -> None:
    """Write the array, and remove what is stored of an older state of the folder."""
    try:
        with atomic_path(stored) as temporary, open(temporary, "wb") as file:
            np.save(file, array)
        drop_outdated(stored)
    except (UserError, OSError) as error:
        logging.info("the images will be read again next time: %s", error)

"""The image files of a data set in its order, decoded when they are asked for."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import UserError
from .cache import cache_file, cached_array
from .folder import centre, decode
from .image_data import ImageData
from .image_files import Folder, Zip
from .parallel import PARALLEL_FROM, cores, items

CHUNK_BYTES = 1 << 20  # decoded bytes that one task of a reading process returns


@dataclasses.dataclass(frozen=True)
class Pictures:
    """Image files with what is known of them.

    files        where they lie
    names        of the images in there, in the data set's order
    labels       one an image, or None
    class_names  name of label 0, 1, ..., or None
    fit          how an image is brought to a size: (image, size, where) -> image of size x size
    upright      turn photos as their camera says
    kept_as      begins the name of the file in which the decoded images are kept
    """

    files: Folder | Zip
    names: list[str]
    labels: list[int] | None = None
    class_names: tuple[str, ...] | None = None
    fit: Callable[[Image.Image, int, str], Image.Image] = centre
    upright: bool = True
    kept_as: str = "images"

    def __len__(self) -> int:
        return len(self.names)

    def digest(self) -> str:
        """SHA-256 of the files' names, sizes and times."""
        return self.files.digest(self.names)

    def decode(self, number: int, size: int, channels: int) -> np.ndarray:
        """Image `number` as uint8 (size, size, channels). Raises UserError for one that is unreadable or too small."""
        name, files = self.names[number], self.files
        opened = files.open(name)
        return decode(f"{files.root}/{name}", size, channels, files.field, None if isinstance(opened, str) else opened,
                      self.fit, self.upright)

    def decoded(self, groups: Sequence[Sequence[int]], size: int, channels: int,
                workers: int = 0) -> Iterator[np.ndarray]:
        """Yield the images of each group of numbers as uint8 (b, size, size, channels).

        workers: reading processes; 0 chooses by the number of cores.
        """
        workers = (workers or min(8, cores())) if sum(map(len, groups)) >= PARALLEL_FROM else 1
        for part in items(_Groups(self, groups, size, channels), workers, "data.workers"):
            if isinstance(part, UserError):
                raise part
            yield part

    def read(self, size: int, channels: int, workers: int = 0, cache: bool = True) -> ImageData:
        """All images, decoded.

        cache: keep them in one hidden file beside where they come from, valid as long as names, sizes and times of
            the files are the same. A folder that cannot be written is no error, only slower the next time.
        """
        stored = self.kept(size, channels) if cache else None
        groups = self.groups(max(1, len(self)), size, channels)
        parts = _with_bar(self.decoded(groups, size, channels, workers), len(self))
        images = cached_array(stored, (len(self), size, size, channels), np.uint8, parts)
        labels = None if self.labels is None else torch.tensor(self.labels, dtype=torch.int64)
        return ImageData(torch.from_numpy(images), labels, self.class_names)

    def kept(self, size: int, channels: int) -> Path:
        """The hidden file in which the decoded images are kept, or would be."""
        return cache_file(self.files.home, self.digest(), f"{self.kept_as}_{size}x{channels}")

    def groups(self, batch_size: int, size: int, channels: int) -> list[range]:
        """The numbers of all images in groups that are worth a task, none of which goes beyond a batch."""
        step, total = max(1, CHUNK_BYTES // (size**2 * channels)), len(self)
        return [range(i, min(i + step, start + batch_size, total)) for start in range(0, total, batch_size)
                for i in range(start, min(start + batch_size, total), step)]


@dataclasses.dataclass(frozen=True)
class PictureStream:
    """Pictures for what looks at all of them once: decoded one after another, none of them kept."""

    pictures: Pictures
    size: int
    channels: int
    workers: int = 0

    def __len__(self) -> int:
        return len(self.pictures)

    def batches(self, batch_size: int) -> Iterator[Tensor]:
        """Yield the images in their order as uint8 (b, size, size, channels)."""
        groups, held = self.pictures.groups(batch_size, self.size, self.channels), []
        parts = self.pictures.decoded(groups, self.size, self.channels, self.workers)
        for group, part in zip(groups, parts, strict=True):
            held.append(part)
            if group.stop % batch_size == 0 or group.stop == len(self):
                yield torch.from_numpy(np.concatenate(held))
                held = []


class _Groups(Dataset):
    """Groups of decoded images, each so large that it is worth handing over; a UserError where one is bad."""

    def __init__(self, pictures: Pictures, groups: Sequence[Sequence[int]], size: int, channels: int):
        self.pictures, self.groups, self.size, self.channels = pictures, groups, size, channels

    def __len__(self) -> int:
        return len(self.groups)

    def __getitem__(self, number: int) -> np.ndarray | UserError:
        try:
            return np.stack([self.pictures.decode(i, self.size, self.channels) for i in self.groups[number]])
        except UserError as error:
            return error


def _with_bar(parts: Iterator[np.ndarray], total: int) -> Iterator[np.ndarray]:
    with tqdm(total=total, desc="reading images", unit="image", delay=1) as bar:
        for part in parts:
            yield part
            bar.update(len(part))

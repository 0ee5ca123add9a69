"""torch data sets of (image, label), as diffusion_distiller's make_dataset returns them, read once into memory."""

from typing import Any

import numpy as np
import torch
from absl import logging
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import UserError
from ..files import reason
from .folder import MODES
from .parallel import PARALLEL_FROM, cores, items


def read_dataset(
    dataset: Dataset, field: str, image_size: int, channels: int, workers: int = 0
) -> tuple[Tensor, Tensor]:
    """All items of `dataset`: images as uint8 (n, image_size, image_size, channels), labels as int64 (n,).

    dataset: has a length; an item is (image, label). The image is a float tensor (c, h, w) in [-1, 1], a uint8 tensor
        (c, h, w), or a Pillow image, all in the order RGB; the label is an int from 0. Transforms that draw from
        torch's random numbers are drawn once an image, the same in every run.
    field: what a UserError names, for an item that is anything else.
    workers: processes; 0 chooses by the number of cores.
    """
    try:
        count = len(dataset)
    except TypeError:
        count = 0
    if not count or not hasattr(dataset, "__getitem__"):
        raise UserError(f"{field} returns {type(dataset).__name__}, want a torch Dataset that has a length and items")
    shape = (image_size, image_size, channels)
    images, labels = np.empty((count, *shape), np.uint8), np.empty(count, np.int64)
    workers = (workers or min(8, cores())) if count >= PARALLEL_FROM else 1
    converted = items(_Converted(dataset, count, shape), workers, "data.workers")
    for i, item in enumerate(tqdm(converted, total=count, desc="reading images", unit="image", delay=1)):
        if isinstance(item, str):
            raise UserError(f"{field}: item {i} {item}")
        images[i], labels[i] = item
    if images.min() >= 127:  # a float image's 0
        logging.warning("%s: no pixel is darker than mid-gray; images in [0, 1] are to be brought to [-1, 1]", field)
    return torch.from_numpy(images), torch.from_numpy(labels)


class _Converted(Dataset):
    """Items as (uint8 (h, w, c), label), or a line that says what is wrong."""

    def __init__(self, dataset: Dataset, count: int, shape: tuple[int, int, int]):
        self.dataset, self.count, self.shape = dataset, count, shape

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> tuple[np.ndarray, int] | str:
        # The seed is the image's own, so that neither the number of processes nor what ran before changes it.
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(number)
            try:
                item = self.dataset[number]
            except Exception as error:  # whatever the user's own code raises is told in one line
                return f"cannot be read ({type(error).__name__}: {reason(error)})"
        if not isinstance(item, tuple | list) or len(item) != 2:
            return f"is {type(item).__name__}, want (image, label)"
        try:
            return _pixels(item[0], self.shape), _label(item[1])
        except ValueError as error:
            return str(error)


def _pixels(image: Any, shape: tuple[int, int, int]) -> np.ndarray:
    """uint8 (h, w, c) of any image that is allowed; ValueError says what is wrong with one that is not."""
    height, width, channels = shape
    if isinstance(image, Image.Image):
        image = torch.from_numpy(np.array(image.convert(MODES[channels]))).view(image.height, image.width, channels)
        image = image.permute(2, 0, 1)
    if not isinstance(image, Tensor) or not (image.is_floating_point() or image.dtype == torch.uint8):
        kind = f"a tensor of {image.dtype}" if isinstance(image, Tensor) else type(image).__name__
        raise ValueError(f"has as image {kind}, want a float tensor in [-1, 1], a uint8 tensor or a Pillow image")
    if image.shape != (channels, height, width):
        raise ValueError(f"has an image of shape {tuple(image.shape)}, want (channels, height, width) = "
                         f"{(channels, height, width)} by data.channels and data.image_size")
    if image.dtype != torch.uint8:
        lowest, highest = image.min().item(), image.max().item()
        levels = ((image.float() + 1) * 127.5).round()
        if not (levels.min() >= 0 and levels.max() <= 255):  # not: nan compares as neither
            raise ValueError(f"has pixels from {lowest:.4g} to {highest:.4g}, want [-1, 1]")
        image = levels.to(torch.uint8)
    return image.permute(1, 2, 0).contiguous().cpu().numpy()


def _label(label: Any) -> int:
    if isinstance(label, np.integer) or (isinstance(label, Tensor) and label.ndim == 0):
        label = label.item()
    if not isinstance(label, int) or label < 0:
        raise ValueError(f"has the label {label!r}, want an int from 0")
    return label

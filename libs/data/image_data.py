"""A data set in memory, from which the training loop takes batches by index."""

from __future__ import annotations

import dataclasses

import torch
from absl import logging
from torch import Tensor

from ..errors import UserError

# Share of the device's free memory that a data set may take; the rest is for the model and its activations.
DEVICE_SHARE = 0.4


@dataclasses.dataclass
class ImageData:
    """uint8 images with optional labels.

    images: uint8 (n, h, w, c), on the compute device when they fit there, else in host memory.
    labels: int64 (n,), or None when the data has none.
    class_names: name of label 0, 1, ..., or None.
    device: where `batch` puts its results; None stands for the device of `images`.
    """

    images: Tensor
    labels: Tensor | None = None
    class_names: tuple[str, ...] | None = None
    device: torch.device | None = None

    def __post_init__(self):
        assert self.images.dtype == torch.uint8, self.images.dtype
        assert self.images.ndim == 4, self.images.shape
        assert self.labels is None or (
            self.labels.dtype == torch.int64 and self.labels.shape == self.images.shape[:1]
        )
        self.device = self.images.device if self.device is None else torch.device(self.device)

    def __len__(self) -> int:
        return len(self.images)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one image."""
        return tuple(self.images.shape[1:])

    def fits_on(self, device: torch.device | str) -> bool:
        """Whether all images fit in the share of the device's free memory that is meant for data."""
        return fits_on(self.images, torch.device(device))

    def to(self, device: torch.device | str) -> ImageData:
        """The same data with batches on `device`; the images move there too when they fit."""
        device = torch.device(device)
        images = self.images
        if self.fits_on(device):
            images = images.to(device)
        else:
            logging.info(
                "%d images (%.1f GB) stay in host memory: too many for %s",
                len(self),
                images.nbytes / 1e9,
                device,
            )
        labels = None if self.labels is None else self.labels.to(device)
        return ImageData(images, labels, self.class_names, device)

    def select(self, rows: Tensor) -> ImageData:
        """The images of `rows`, indices or a mask, and their labels."""
        labels = None if self.labels is None else self.labels[rows.to(self.labels.device)]
        return ImageData(self.images[rows.to(self.images.device)], labels, self.class_names, self.device)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Images uint8 (b, h, w, c) and labels int64 (b,) or None, on the compute device.

        indices: int64 (b,). Indices in host memory avoid a wait for the device when the images are kept
            there.
        """
        labels = (
            None if self.labels is None else self.labels[indices.to(self.labels.device, non_blocking=True)]
        )
        if self.images.device == self.device:
            return self.images[indices.to(self.device, non_blocking=True)], labels
        return host_rows(self.images, indices.cpu(), self.device).to(self.device, non_blocking=True), labels


def hold_out(data: ImageData, every: int, field: str = "data.hold_out") -> tuple[ImageData, ImageData]:
    """(the images to learn from, every `every`-th image, which is not among them).

    >>> images = torch.arange(7, dtype=torch.uint8).view(7, 1, 1, 1)
    >>> [each.images.flatten().tolist() for each in hold_out(ImageData(images), 3)]
    [[0, 1, 3, 4, 6], [2, 5]]
    """
    if not isinstance(data, ImageData):
        raise UserError(f"{field}={every}: a data set of latents, or with captions, is learnt from whole; choose 0")
    if every < 2:
        raise UserError(f"{field}={every} must be at least 2: every second image")
    held = torch.arange(len(data)) % every == every - 1
    if not held.any():
        raise UserError(f"{field}={every}: the data set has only {len(data)} images")
    return data.select(~held), data.select(held)


def fits_on(array: Tensor, device: torch.device) -> bool:
    """Whether `array` fits in the share of the device's free memory that is meant for data."""
    if device.type != "cuda":
        return True
    free, _ = torch.cuda.mem_get_info(device)
    return array.nbytes <= DEVICE_SHARE * free


def host_rows(array: Tensor, indices: Tensor, device: torch.device) -> Tensor:
    """Rows gathered, for a GPU into page-locked memory, from which the copy runs beside the computation."""
    rows = torch.empty((len(indices), *array.shape[1:]), dtype=array.dtype, pin_memory=device.type == "cuda")
    return torch.index_select(array, 0, indices, out=rows)

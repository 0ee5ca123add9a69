"""Feature statistics of generated images, and of what they are compared with."""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ..data.folder import folder_batches
from ..data.image_data import ImageData
from ..data.pictures import PictureStream
from ..data.shards import ShardData
from ..errors import UserError
from .features import ASSETS
from .frechet import FeatureSums, Statistics

# (extractor, data set) -> statistics that ship with the project.
SHIPPED = {("cifar10_resnet", "cifar10"): ASSETS / "cifar10_train_stats.npz"}


class Extractor(Protocol):
    """Features of images: `CIFAR10Features` and `InceptionFeatures` look like this."""

    name: str
    dim: int
    distance_name: str
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w, c) -> float32 (b, dim)."""


def feature_statistics(
    batches: Iterable[Tensor], extractor: Extractor, reduce: Callable[[Tensor], Tensor] | None = None
) -> Statistics:
    """Statistics of an iterator of uint8 (b, h, w, c) batches.

    reduce: adds a tensor up over all processes, each of which brought its own batches.
    """
    sums = FeatureSums(extractor.dim, extractor.name, extractor.device)
    for images in batches:
        sums.update(extractor(images))
    if reduce is not None:
        sums.state = reduce(sums.state)
    return sums.statistics()


def reference_statistics(
    source: ImageData | ShardData | PictureStream | str | Path,
    extractor: Extractor,
    batch_size: int = 256,
    image_size: int | None = None,
    field: str = "--reference",
) -> Statistics:
    """Statistics to compare with. Call it before sampling, so that a mistake costs nothing.

    source: a data set; a folder of images; an npz file with mu and sigma (U-ViT's, pytorch-fid's or ours); or
        "cifar10", whose statistics of the cifar10_resnet features ship with the project.
    image_size: images of a folder are cropped and resized to it; None takes them as they are.
    field: the flag or config field that `source` came from, for error messages.
    Raises UserError when there is nothing to read, or it belongs to other features.
    """
    if isinstance(source, ImageData | ShardData | PictureStream):
        if len(source) < 2:
            raise UserError(f"{field}: the data set has {len(source)} images; statistics need at least 2")
        return feature_statistics(_with_bar(_data_batches(source, batch_size), len(source)), extractor)
    path = Path(SHIPPED.get((extractor.name, str(source)), Path(source).expanduser()))
    if path.is_dir():
        return feature_statistics(
            _with_bar(folder_batches(path, batch_size, 3, image_size, field)), extractor
        )
    if not path.is_file():
        shipped = ", ".join(data for name, data in SHIPPED if name == extractor.name)
        raise UserError(
            f"{field}={str(source)!r} is neither a folder of images nor an npz file with mu and sigma"
            + (f", nor shipped statistics ({shipped})" if shipped else f" (features: {extractor.name})")
        )
    statistics = Statistics.load(path)
    if statistics.dim != extractor.dim or statistics.features not in (None, extractor.name):
        raise UserError(
            f"{field}={str(source)!r} holds {statistics.dim} {statistics.features or 'unnamed'} features, "
            f"not the {extractor.dim} of {extractor.name}"
        )
    return statistics


def _data_batches(data: ImageData | ShardData | PictureStream, batch_size: int) -> Iterator[Tensor]:
    if isinstance(data, PictureStream):
        yield from data.batches(batch_size)
        return
    for indices in torch.arange(len(data)).split(batch_size):
        yield data.batch(indices)[0]


def _with_bar(batches: Iterable[Tensor], total: int | None = None) -> Iterator[Tensor]:
    with tqdm(total=total, desc="reference features", unit="image", delay=1) as bar:
        for images in batches:
            yield images
            bar.update(len(images))

"""The images of which a chain's conditions are made: seed i shows image i modulo their number."""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs import PixelCodec
from ..data import ImageData
from ..data.folder import folder_batches
from .adapters import Draws
from .compose import Conditioners

READ = 256  # image files decoded at a time


def read_images(path: str, size: int, channels: int) -> ImageData:
    """The images of a folder, sorted by path, cropped and resized to size x size. Raises UserError for --images."""
    return ImageData(torch.cat(list(folder_batches(path, READ, channels, size, "--images"))))


class ShownImages:
    """Images, and the conditions that are made of them; everything random about a seed's is drawn from the seed."""

    def __init__(self, data: ImageData, conditioners: Conditioners):
        self.data, self.conditioners = data, conditioners

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the conditions, as JSON, beside the model."""
        hashed = hashlib.sha256(self.data.images.cpu().numpy().tobytes()).hexdigest()
        return {"images_sha256": hashed, "cond": json.loads(json.dumps(self.conditioners.settings))}

    def __call__(self, seeds: Sequence[int], labels: Tensor | None = None) -> dict[str, Tensor]:
        """What the network is given for the seeds."""
        inputs = {"image": _floats(self.originals(seeds))} | ({} if labels is None else {"label": labels})
        return self.conditioners(inputs, _draws(seeds))

    def originals(self, seeds: Sequence[int]) -> Tensor:
        """uint8 (b, h, w, c) on the device."""
        return self.data.batch(torch.tensor([seed % len(self.data) for seed in seeds]))[0]

    def hole(self, seeds: Sequence[int]) -> Tensor | None:
        """(b, h, w, 1) bool: the pixels that the network makes; None for all."""
        hole = self.conditioners.hole(_floats(self.originals(seeds)), _draws(seeds))
        return None if hole is None else hole.permute(0, 2, 3, 1)

    def picture(self, seeds: Sequence[int]) -> tuple[str, Tensor] | None:
        """(the name of what is seen, uint8 (b, h, w, c)) of the conditions; None where they cannot be seen."""
        named = self.conditioners.picture(_floats(self.originals(seeds)), _draws(seeds))
        return None if named is None else (named[0], PixelCodec().decode(named[1]))

    def answer(self, seeds: Sequence[int]) -> tuple[str, Tensor] | None:
        """As `picture`, where what is seen is itself an answer to the task; None elsewhere."""
        picture = self.picture(seeds)
        return picture if picture is not None and picture[0] else None

    def finish(self, seeds: Sequence[int], images: Tensor) -> Tensor:
        """The images (b, h, w, c) with the known pixels as they were."""
        hole = self.hole(seeds)
        return images if hole is None else torch.where(hole, images, self.originals(seeds))

    def beside(self, seeds: Sequence[int], images: Tensor) -> Tensor:
        """uint8 (b, h, 3w, c): condition (where it can be seen), image and original side by side."""
        picture = self.picture(seeds)
        row = [images.to(self.data.device), self.originals(seeds)]
        return torch.cat(row if picture is None else [picture[1], *row], dim=2)


def _floats(images: Tensor) -> Tensor:
    """uint8 (b, h, w, c) -> (b, c, h, w) from -1 to 1."""
    return PixelCodec().encode(images)


def _draws(seeds: Sequence[int]) -> Draws:
    return Draws(torch.tensor(list(seeds)), torch.zeros(len(seeds), dtype=torch.long))

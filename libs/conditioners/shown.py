"""The images, texts and fields of which a chain's conditions are made: seed i shows image i modulo their number, and
text i modulo theirs.
"""

import hashlib
import json
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..codecs import PixelCodec
from ..data import ImageData
from ..data.folder import folder_batches
from ..data.shards import ShardData
from ..errors import UserError
from ..prompts import prompts_id, prompts_of
from ..text import FrozenEncoder
from .adapters import Draws
from .compose import Conditioners
from .fields import READ, GivenFields, data_field


def read_images(path: str, size: int, channels: int) -> ImageData:
    """The images of a folder, sorted by path, cropped and resized to size x size. Raises UserError for --images."""
    return ImageData(torch.cat(list(folder_batches(path, READ, channels, size, "--images"))))


class Shown:
    """Images, texts and fields, and the conditions that are made of them; everything random about a seed's is drawn
    from the seed.

    data      images, of which a training set's bring their captions and fields along; None for conditioners that read
              none
    prompts   the texts, in place of captions
    given     the fields, in place of a training set's
    Raises UserError for conditioners that read texts or fields where there are none.
    """

    def __init__(self, conditioners: Conditioners, data: ImageData | ShardData | None = None,
                 prompts: Sequence[str] | None = None, given: GivenFields | None = None):
        assert prompts or given or data is not None, "nothing to make conditions of"
        self.conditioners, self.data, self.prompts, self.given = conditioners, data, prompts, given
        self.of_images = "image" in conditioners.reads
        if "text" in conditioners.reads and prompts is None and not isinstance(data, ShardData):
            raise UserError(f"{conditioners.field}: it reads captions, which this data set has not; choose "
                            "data.name=webdataset or captioned_folder")
        if conditioners.fields and given is None and not isinstance(data, ShardData):
            raise UserError(f"{conditioners.field}: it reads the field {conditioners.fields[0]!r}, and this data set's "
                            "images have none; choose data.name=webdataset or captioned_folder")

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What decides the conditions, as JSON, beside the model."""
        held = {"cond": json.loads(json.dumps(self.conditioners.settings))}
        if self.of_images:
            held["images_sha256"] = hashlib.sha256(self.data.images.cpu().numpy().tobytes()).hexdigest()
        if self.prompts is not None:
            encoders = [getattr(each, "encoder", None) for each in self.conditioners.parts]
            held["prompts_sha256"] = prompts_id(self.prompts)
            held["text_encoders"] = [each.id for each in encoders if isinstance(each, FrozenEncoder)]
        if self.given is not None:
            held["fields_sha256"] = self.given.fingerprint
        return held

    def __call__(self, seeds: Sequence[int], labels: Tensor | None = None) -> dict[str, Tensor]:
        """What the network is given for the seeds."""
        inputs = {"image": _floats(self.originals(seeds))} if self.of_images else {}
        if "text" in self.conditioners.reads:
            inputs["text"] = self.texts(seeds)
        if labels is not None:
            inputs["label"] = labels
        inputs |= {name: self._field(seeds, name) for name in self.conditioners.fields}
        return self.conditioners(inputs, _draws(seeds))

    def originals(self, seeds: Sequence[int]) -> Tensor:
        """uint8 (b, h, w, c) on the device."""
        with torch.inference_mode(False):  # the mode is one thread's, and threads may read the files
            return self.data.batch(self._indices(seeds))[0]

    def texts(self, seeds: Sequence[int]) -> list[str] | None:
        """The prompt of each seed, or the first caption of its image; None where the conditioners read no text."""
        if "text" not in self.conditioners.reads:
            return None
        if self.prompts is not None:
            return prompts_of(seeds, self.prompts)
        with torch.inference_mode(False):
            return self.data.texts(self._indices(seeds))

    def _field(self, seeds: Sequence[int], name: str) -> Tensor | list[Any]:
        """A field as conditioners read it, see `fields.data_field`; images (b, c, h, w) from -1 to 1."""
        if self.given is not None:
            value = self.given(seeds, name)
        else:
            with torch.inference_mode(False):
                value = data_field(self.data, self._indices(seeds), name)
        return _floats(value) if isinstance(value, Tensor) and value.dtype == torch.uint8 else value

    def _indices(self, seeds: Sequence[int]) -> Tensor:
        return torch.tensor([seed % len(self.data) for seed in seeds])

    def hole(self, seeds: Sequence[int]) -> Tensor | None:
        """(b, h, w, 1) bool: the pixels that the network makes; None for all."""
        if not self.of_images:
            return None
        hole = self.conditioners.hole(_floats(self.originals(seeds)), _draws(seeds))
        return None if hole is None else hole.permute(0, 2, 3, 1)

    def picture(self, seeds: Sequence[int]) -> tuple[str, Tensor] | None:
        """(the name of what is seen, uint8 (b, h, w, c)) of the conditions; None where they cannot be seen."""
        if not self.of_images:
            return None
        named = self.conditioners.picture(_floats(self.originals(seeds)), _draws(seeds))
        return None if named is None else (named[0], PixelCodec().decode(named[1]))

    def answer(self, seeds: Sequence[int]) -> tuple[str, Tensor] | None:
        """As `picture`, where what is seen is itself an answer to the task; None elsewhere."""
        picture = self.picture(seeds)
        return picture if picture is not None and picture[0] else None

    def finish(self, seeds: Sequence[int], images: Tensor) -> Tensor:
        """The images (b, h, w, c) with what is known of the originals as it is: pixels, or means of pixels."""
        if not self.of_images:
            return images
        kept = self.conditioners.keep(_floats(images), _floats(self.originals(seeds)), _draws(seeds))
        return PixelCodec().decode(kept)

    def beside(self, seeds: Sequence[int], images: Tensor) -> Tensor:
        """uint8 (b, h, 3w, c): condition (where it can be seen), image and original side by side; the images as they
        are where the conditions are of texts alone.
        """
        if not self.of_images:
            return images
        picture = self.picture(seeds)
        row = [images.to(self.data.device), self.originals(seeds)]
        return torch.cat(row if picture is None else [picture[1], *row], dim=2)


def _floats(images: Tensor) -> Tensor:
    """uint8 (b, h, w, c) -> (b, c, h, w) from -1 to 1."""
    return PixelCodec().encode(images)


def _draws(seeds: Sequence[int]) -> Draws:
    return Draws(torch.tensor(list(seeds)), torch.zeros(len(seeds), dtype=torch.long))

"""What conditioners read beside images, captions and labels: fields of a data set's samples, or what --fields gives."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.folder import decode, folder_batches
from ..data.shards import ShardData
from ..errors import UserError

INPUTS = ("image", "text", "label")  # that are no fields of samples
FORM = "numbers, an image or a folder of images each, as in aesthetic_score=6.5; edges=drawings"
READ = 256  # image files decoded at a time


def data_field(data: ShardData, indices: Tensor, name: str) -> Tensor | list[Any]:
    """A field of samples: images as uint8 (b, h, w, c), numbers as float32 (b,), equally long lists of them as (b, n),
    tensors that a map has made; texts and whatever else as a list.

    Raises UserError where a sample has no such field, or no number where the others have one.
    """
    values = data.fields(indices, name)
    if isinstance(values, Tensor) or not any(isinstance(each, int | float | list) for each in values):
        return values
    try:
        return torch.tensor(values, dtype=torch.float32).to(data.device)
    except (TypeError, ValueError) as error:
        raise UserError(f"the field {name!r} is no number, or no list of equally many, in some samples ({values[0]!r}, "
                        f"{next((each for each in values if type(each) is not type(values[0])), values[-1])!r})"
                        ) from error


class GivenFields:
    """What --fields names, in place of a data set's: numbers, the same for every seed, or images, of which seed i takes
    number i modulo theirs.

    text: "NAME=VALUE; NAME=VALUE"; a value is a number, several with commas, an image file or a folder of images, which
        are cropped and resized to size x size pixels.
    """

    def __init__(self, text: str, size: int, channels: int, device: torch.device):
        self.values: dict[str, Tensor] = {}
        for part in filter(None, map(str.strip, text.split(";"))):
            name, _, value = map(str.strip, part.partition("="))
            numbers = _numbers(value)
            if not name or not value or (numbers is None and not Path(value).expanduser().exists()):
                raise UserError(f"--fields={text}: {part!r} is neither; want {FORM}")
            held = _images(Path(value).expanduser(), size, channels) if numbers is None else numbers
            self.values[name] = held.to(device)

    @property
    def fingerprint(self) -> dict[str, str]:
        """What decides each field, as JSON."""
        return {name: hashlib.sha256(value.cpu().numpy().tobytes()).hexdigest() for name, value in self.values.items()}

    def __call__(self, seeds: Sequence[int], name: str) -> Tensor:
        """uint8 (b, h, w, c) of images; float32 (b,) of a number, (b, n) of several."""
        value = self.values[name]
        if value.dtype == torch.uint8:
            return value[torch.tensor([seed % len(value) for seed in seeds], device=value.device)]
        return value.expand(len(seeds), *value.shape)


def read_given(text: str | None, wanted: Sequence[str], size: int, channels: int,
               device: torch.device) -> GivenFields | None:
    """What --fields=`text` names, all of the `wanted` fields and no other; None where none is wanted."""
    flag = "--fields" if text is None else f"--fields={text}"
    given = None if text is None else GivenFields(text, size, channels, device)
    held = {} if given is None else given.values
    for name in wanted:
        if name not in held:
            raise UserError(f"{flag}: {name!r} is missing, of which this model's conditions are made; want {FORM}")
    for name in held:
        if name not in wanted:
            raise UserError(f"{flag}: this model's conditions are not made of {name!r}; choose from "
                            f"{', '.join(wanted) or 'none'}")
    return given


def _numbers(text: str) -> Tensor | None:
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError:
        return None
    return torch.tensor(values if len(values) > 1 else values[0])


def _images(path: Path, size: int, channels: int) -> Tensor:
    if path.is_file():
        return torch.from_numpy(decode(str(path), size, channels, "--fields"))[None]
    return torch.cat(list(folder_batches(str(path), READ, channels, size, "--fields")))

"""Latents and text features on disk, in U-ViT's layout, in place of the images and captions they were made from.

    {i}.npy              an image's moments float32 (2c, h, w), mean then log variance; with a label: (moments, label)
    train/, val/         MS-COCO's parts, with the moments {i}.npy, and {i}_{k}.npy, caption k of image i as the hidden
                         states (tokens, width) of the text encoder; of a pipeline with more, such as a pooled text or a
                         mask, (states, vector (d,))
    empty_context.npy    the hidden states of the empty text
    run_vis/{j}.npy      (prompt, hidden states)

There may be any number of files, and numbers i may be left out.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from absl import logging
from torch import Tensor, nn

from ..errors import UserError
from ..files import reason
from ..weights import weights_digest
from .feature_files import READERS, read_feature
from .image_data import fits_on, host_rows
from .packed_moments import packed_moments

PARTS = {"train": "train", "test": "val"}  # data.split -> sub-folder
EMPTY, PROMPTS = "empty_context.npy", "run_vis"
LATENTS_RECORD, TEXTS_RECORD = ".latents.json", ".texts.json"  # what features were made from
RECORDS = {LATENTS_RECORD: "latents", TEXTS_RECORD: "text"}  # -> the command that makes them
WEIGHTS = "_weights"  # behind a model's name in a record: the digest of its weights
FILE = re.compile(r"(0|[1-9]\d*)(?:_(0|[1-9]\d*))?\.npy")


@dataclasses.dataclass
class FeatureData:
    """Moments of images' latents, with labels or captions.

    path           as the user named it
    moments        float32 (n, 2c, h, w), mean then log variance; on the compute device when they fit there
    labels         int64 (n,), or None
    empty_context  float32 (tokens, width), the empty text, or None where it is not there
    captions       for each image the files of its captions' hidden states; None where there are no texts
    made_from      the record of what the latents were made from, see `made_by`; empty where another tool made them
    device         where `batch` and `contexts` put their results; None stands for the device of `moments`
    """

    path: str
    moments: Tensor
    labels: Tensor | None = None
    empty_context: Tensor | None = None
    captions: list[list[str]] | None = None
    made_from: dict[str, Any] = dataclasses.field(default_factory=dict)
    device: torch.device | None = None

    def __post_init__(self):
        assert self.moments.dtype == torch.float32, self.moments.dtype
        assert self.moments.ndim == 4, self.moments.shape
        self.device = self.moments.device if self.device is None else torch.device(self.device)
        self._pool = ThreadPoolExecutor(READERS)

    def __len__(self) -> int:
        return len(self.moments)

    @property
    def has_text(self) -> bool:
        return self.captions is not None

    @cached_property
    def text_shapes(self) -> tuple[tuple[int, int], tuple[int] | None]:
        """(tokens, width) of a text, and (d,) of the vector beside it or None."""
        context, beside = read_text(Path(self.captions[0][0]))
        return tuple(context.shape), None if beside is None else tuple(beside.shape)

    @property
    def context_shape(self) -> tuple[int, int]:
        """(tokens, width) of a text."""
        return self.text_shapes[0]

    @property
    def prompts(self) -> list[tuple[str, Tensor]]:
        """The prompts with their hidden states (tokens, width) float32 on the device that run_vis/ holds."""
        folder = Path(self.path).expanduser() / PROMPTS
        found = read_prompt_features(folder) if folder.is_dir() else []
        return [(prompt, context.to(self.device)) for prompt, context in found]

    def to(self, device: torch.device | str) -> FeatureData:
        """The same data with batches on `device`; the moments move there too when they fit."""
        device = torch.device(device)
        moments = self.moments
        if fits_on(moments, device):
            moments = moments.to(device)
        else:
            logging.info("%d latents (%.1f GB) stay in host memory: too many for %s", len(self), moments.nbytes / 1e9,
                         device)
        labels, empty = (None if each is None else each.to(device) for each in (self.labels, self.empty_context))
        return dataclasses.replace(self, moments=moments, labels=labels, empty_context=empty, device=device)

    def batch(self, indices: Tensor) -> tuple[Tensor, Tensor | None]:
        """Moments float32 (b, 2c, h, w), log variance in [-30, 20], and labels int64 (b,) or None, on the device.

        indices: int64 (b,), in host memory.
        """
        labels = None if self.labels is None else self.labels[indices.to(self.device, non_blocking=True)]
        if self.moments.device == self.device:
            return self.moments[indices.to(self.device, non_blocking=True)], labels
        return host_rows(self.moments, indices, self.device).to(self.device, non_blocking=True), labels

    def contexts(self, indices: Tensor, draws: Tensor) -> Tensor:
        """Hidden states of one caption an image: float32 (b, tokens, width) on the device, read when asked for.

        indices: int64 (b,) and draws: float64 (b,) in (0, 1), in host memory; of an image's n captions number
            floor(draw * n) is taken.
        Raises UserError for a file that is damaged or of another shape than the first one.
        """
        paths = self._chosen(indices, draws)
        rows = torch.empty(len(paths), *self.context_shape, pin_memory=self.device.type == "cuda")
        list(self._pool.map(_read_context_into, paths, rows.unbind()))  # list: so that errors come here
        return rows.to(self.device, non_blocking=True)

    def text_conditions(self, indices: Tensor, draws: Tensor) -> tuple[Tensor, Tensor | None]:
        """As `contexts`, and (b, d) what stands beside each; None where nothing does."""
        read = list(self._pool.map(lambda path: read_text(Path(path)), self._chosen(indices, draws)))
        for context, beside in read:
            shapes = tuple(context.shape), None if beside is None else tuple(beside.shape)
            if shapes != self.text_shapes:
                raise UserError(f"data.path={self.path!r} holds a text of the shapes {shapes}, others have "
                                f"{self.text_shapes}")
        contexts, vectors = zip(*read, strict=True)
        vectors = None if vectors[0] is None else torch.stack(vectors).to(self.device, non_blocking=True)
        return torch.stack(contexts).to(self.device, non_blocking=True), vectors

    def _chosen(self, indices: Tensor, draws: Tensor) -> list[str]:
        """The file of one caption of each image."""
        files = [self.captions[i] for i in indices.tolist()]
        return [of_image[int(draw * len(of_image))] for of_image, draw in zip(files, draws.tolist(), strict=True)]

    def check_encoder(self, nets: Sequence[nn.Module]) -> None:
        """Raise UserError where the latents are known to be of another encoder than `nets`."""
        made_with = self.made_from.get("autoencoder" + WEIGHTS)
        if made_with is not None and made_with != _digest(nets):
            raise UserError(f"data.path={self.path!r} holds latents of another autoencoder than this model's; they "
                            f"were made by {self.made_from.get('autoencoder')!r}")

    def check(self, latent_shape: tuple[int, int, int], context_shape: tuple[int, int] | None = None,
              beside: tuple[int] | None = None) -> None:
        """Raise UserError where the features are not for a network of these shapes.

        latent_shape: (c, h, w) of what the network denoises. context_shape: (tokens, width) of the text it sees, None
            where it sees none. beside: (d,) of the vector beside it, None where it takes none.
        """
        moments, where = self.moments.shape, f"data.path={self.path!r}"
        held = moments[1] // 2, *moments[2:]
        if held != latent_shape:
            raise UserError(f"{where} holds latents of {_by(held)} (channels, height, width); this network takes "
                            f"{_by(latent_shape)}")
        if context_shape is None:
            return
        if not self.has_text:
            raise UserError(f"{where} has no captions ({{i}}_{{k}}.npy), which cond.kind='text' needs; python "
                            "prepare_data.py text writes them")
        if self.empty_context is None:
            raise UserError(f"{where}: {EMPTY}, the empty text, is missing; python prepare_data.py text writes it")
        for shape in (self.context_shape, tuple(self.empty_context.shape)):
            if shape != tuple(context_shape):
                raise UserError(f"{where} holds texts of {_by(shape)} (tokens, width); this network takes "
                                f"{_by(context_shape)}")
        beside = beside and tuple(beside)
        if self.text_shapes[1] != beside:
            held, wanted = ("none" if each is None else f"one of {each[0]}" for each in (self.text_shapes[1], beside))
            raise UserError(f"{where}: of the vector beside a text, such as a pooled text, it holds {held}; this "
                            f"network takes {wanted}")


def read_features(root: Path, split: str = "train", cache: bool = True) -> FeatureData:
    """The features in the folder `root`, or in `root/train` or `root/val` by the split.

    cache: pack the moments, once, into one hidden file beside theirs, of which later reads map the pages they need;
        it is valid as long as the files are the same. Without room for it they go into memory. Texts are read file by
        file when they are asked for.
    Raises UserError where there are none, or they do not fit together.
    """
    folder = root / PARTS[split] if (root / PARTS[split]).is_dir() else root
    where = f"data.path={str(root)!r}"
    if folder == root and split != "train":
        raise UserError(f"data.split={split!r}: {root} has no folder {PARTS[split]}")
    numbers, captions = _list(folder)
    if not numbers:
        raise UserError(f"{where}: there are no features (0.npy, 1.npy, ...) in {folder}; python prepare_data.py "
                        "latents writes them")
    made_from, _ = (_read_record(folder / record, where) for record in (LATENTS_RECORD, TEXTS_RECORD))
    bare = [number for number in numbers if number not in captions] if captions else []
    if bare:
        raise UserError(f"{where}: {len(bare)} of {len(numbers)} images have no captions; the first: {bare[0]}_0.npy "
                        f"is not in {folder}")
    moments, labels = packed_moments(folder, numbers, cache)
    if not captions:
        return FeatureData(str(root), moments, labels, made_from=made_from)
    files = [[f"{folder}/{number}_{k}.npy" for k in captions[number]] for number in numbers]
    empty = read_context(root / EMPTY) if (root / EMPTY).is_file() else None
    return FeatureData(str(root), moments, labels, empty, files, made_from)


def read_context(path: Path, field: str = "data.path") -> Tensor:
    """A text's hidden states: float32 (tokens, width). Raises UserError, naming `field`, for another file."""
    context, beside = read_text(path, field)
    if beside is not None:
        raise UserError(f"{field}: {path} holds no hidden states (tokens, width) of a text alone: a pipeline wrote it")
    return context


def read_text(path: Path, field: str = "data.path") -> tuple[Tensor, Tensor | None]:
    """A text's hidden states, float32 (tokens, width), and the vector (d,) beside them, or None."""
    held = read_feature(path, field)
    context, beside = held if isinstance(held, tuple) else (held, None)
    for part, rank in ((context, 2), (beside, 1)):
        if part is None and rank == 1:
            continue
        if not isinstance(part, np.ndarray) or part.ndim != rank or part.dtype.kind != "f":
            raise UserError(f"{field}: {path} holds no hidden states (tokens, width) of a text")
    return tuple(None if part is None else torch.from_numpy(part.astype(np.float32)) for part in (context, beside))


def read_prompt_features(folder: Path, field: str = "data.path") -> list[tuple[str, Tensor]]:
    """(prompt, float32 (tokens, width)) of the files 0.npy, 1.npy, ... in a folder such as run_vis, by number.

    Raises UserError, naming `field`, where there are none, or a file holds something else.
    """
    numbers, _ = _list(folder)
    if not numbers:
        raise UserError(f"{field}: there are no prompts (0.npy, 1.npy, ...) in {folder}")
    found = []
    for path in (folder / f"{number}.npy" for number in numbers):
        pair = read_feature(path, field)
        context = np.asarray(pair[1]) if isinstance(pair, tuple) else None
        if context is None or context.ndim != 2 or context.dtype.kind != "f":
            raise UserError(f"{field}: {path} holds no prompt with its hidden states (tokens, width)")
        found.append((str(pair[0]), torch.from_numpy(context.astype(np.float32))))
    return found


def _list(folder: Path) -> tuple[list[int], dict[int, list[int]]]:
    """(numbers i of the files {i}.npy, the numbers k of the files {i}_{k}.npy of each i), sorted."""
    numbers, captions = [], {}
    for found in filter(None, map(FILE.fullmatch, os.listdir(folder))):
        number = int(found[1])
        if found[2] is None:
            numbers.append(number)
        else:
            captions.setdefault(number, []).append(int(found[2]))
    return sorted(numbers), {number: sorted(of) for number, of in captions.items()}


def made_by(model: str, name: str, *nets: nn.Module) -> dict[str, str]:
    """What a record says of a model, such as an "autoencoder": its name as the user gave it, and its weights."""
    return {model: name, model + WEIGHTS: _digest(nets)}


def _digest(nets: Sequence[nn.Module]) -> str:
    return weights_digest(nn.ModuleList(nets))


def _read_record(record: Path, where: str) -> dict[str, Any]:
    """What features were made from. Raises UserError where they are half made."""
    try:
        held = json.loads(record.read_text())
        finished = held["finished"]
    except FileNotFoundError:  # other tools write none
        return {}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{where}: {record} cannot be read ({reason(error)})") from error
    if not finished:
        raise UserError(f"{where}: the features in {record.parent} are half made; the same prepare_data.py "
                        f"{RECORDS[record.name]} command goes on with them")
    return held


def _by(shape: tuple[int, ...]) -> str:
    return "x".join(map(str, shape))


def _read_context_into(path: str, row: Tensor) -> None:
    context = read_context(Path(path))
    if context.shape != row.shape:
        raise UserError(f"data.path: {path} holds a text of {_by(context.shape)} (tokens, width), others have "
                        f"{_by(row.shape)}")
    row.copy_(context)

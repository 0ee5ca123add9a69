"""The moments of many small files in one that is mapped into memory: millions of files are slow to read at random."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_path
from .cache import cache_file, cached_array, is_usable
from .feature_files import READERS, read_feature
from .image_files import files_digest

LOG_VARIANCE = (-30.0, 20.0)  # to which the autoencoder clamps it
GROUP = 256  # files that are read before any is stored


def packed_moments(folder: Path, numbers: list[int], cache: bool = True) -> tuple[Tensor, Tensor | None]:
    """(moments float32 (n, 2c, h, w), log variance clamped; labels int64 (n,) or None) of the files `{number}.npy`.

    cache: pack them into one file that is kept beside them until they change.
    Raises UserError for a file that is damaged or unlike the first one.
    """
    names = [f"{number}.npy" for number in numbers]
    first, label = _read_moments(f"{folder}/{names[0]}")
    shape, stored, labels_file = (len(names), *first.shape), None, None
    if cache:
        digest = files_digest(folder, names)
        stored, labels_file = (cache_file(folder, digest, name) for name in ("moments", "labels"))
        if label is not None and not labels_file.is_file():
            stored.unlink(missing_ok=True)
        if not is_usable(stored, shape, np.float32):
            stored = None
    labels: list[int | None] = []

    def parts() -> Iterator[np.ndarray]:
        for group, found in _read_all(folder, names, first.shape, label is not None):
            labels.extend(found)
            yield group
        if stored is not None and label is not None:  # before the moments, so that these never are without
            _store_labels(labels_file, np.array(labels, np.int64))

    moments = cached_array(stored, shape, np.float32, parts())
    if label is None:
        return torch.from_numpy(moments), None
    held = np.array(labels, np.int64) if labels else np.load(labels_file)
    return torch.from_numpy(moments), torch.from_numpy(held)


def _store_labels(path: Path, labels: np.ndarray) -> None:
    for outdated in path.parent.glob(".labels_*.npy"):
        outdated.unlink(missing_ok=True)
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.save(file, labels)


def _read_all(folder: Path, names: list[str], shape: tuple[int, ...],
              labelled: bool) -> Iterator[tuple[np.ndarray, list[int | None]]]:
    """Yield (moments (b, 2c, h, w), labels) of groups of files."""
    with (ThreadPoolExecutor(READERS) as pool,
          tqdm(total=len(names), desc="packing latents", unit="file", delay=1) as bar):
        for start in range(0, len(names), GROUP):
            group = names[start:start + GROUP]
            read = list(pool.map(_read_moments, (f"{folder}/{name}" for name in group)))
            for name, (moments, label) in zip(group, read, strict=True):
                if moments.shape != shape or (label is not None) != labelled:
                    held, wanted = _told(moments.shape, label is not None), _told(shape, labelled)
                    raise UserError(f"data.path: {folder}/{name} holds moments of {held}, {folder}/{names[0]} of "
                                    f"{wanted}; they must be alike")
            yield np.stack([moments for moments, _ in read]), [label for _, label in read]
            bar.update(len(group))


def _read_moments(path: str) -> tuple[np.ndarray, int | None]:
    """(moments float32 (2c, h, w), log variance clamped; label or None) of a file."""
    feature = read_feature(path)
    moments, label = feature if isinstance(feature, tuple) else (feature, None)
    moments = np.asarray(moments)
    if moments.ndim != 3 or moments.dtype.kind != "f" or moments.shape[0] % 2:
        raise UserError(f"data.path: {path} holds no moments (2 x channels, height, width) of a latent")
    if label is not None and not (isinstance(label, int | np.integer) and label >= 0):
        raise UserError(f"data.path: {path} has the label {label!r}, want an int from 0")
    moments = moments.astype(np.float32)  # a copy: what is read is read-only
    half = len(moments) // 2
    np.clip(moments[half:], *LOG_VARIANCE, out=moments[half:])
    return moments, None if label is None else int(label)


def _told(shape: tuple[int, ...], label: bool) -> str:
    return f"{'x'.join(map(str, shape))} {'with' if label else 'without'} a label"

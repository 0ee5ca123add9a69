"""Webdataset shards, or a folder of images with captions, as a data set of which any sample can be had at any time.

The training sequence is a function of the step alone (libs/training/batches.py), so nothing has to be shared out among
processes or saved: each asks for the samples of its positions, none is lost or repeated in an epoch, and a resumed run
goes on exactly. `order` keeps the sequence in few shards at a time.
"""

import contextlib
import copy
import dataclasses
import hashlib
import json
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from absl import logging
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from .folder import MODES
from .order import SHARDS_TOGETHER, ShardOrder
from .parallel import cores
from .raw import fit_coco
from .shard_files import CAPTIONS, LeftOut, Shard
from .shard_filters import Fields, Filter, Map, as_image, resize
from .shard_index import Sample, ShardIndex, load_index, open_image, read_index, read_texts
from .shard_urls import is_remote

INDICES = 16  # shards whose index is in memory


class ShardData:
    """Samples of shards, decoded by threads when they are asked for, or, by `prefetch`, before.

    shards       where they lie
    counts       of the samples of each shard that are used
    samples      number of a shard -> these samples
    maps         applied to each sample, before its image is cut and resized to image_size x image_size
    caption_key  field of the JSON that holds the captions
    workers      threads; 0 chooses by the number of cores
    together     shards whose samples are mixed by `order`
    fetching     ends when the shards that come next are there
    """

    labels = class_names = None  # as ImageData has them

    def __init__(self, shards: Sequence[Shard], counts: Sequence[int], samples: Callable[[int], list[Sample]],
                 image_size: int, channels: int = 3, maps: Sequence[Map] = (), caption_key: str = "caption",
                 workers: int = 0, together: int = SHARDS_TOGETHER):
        self.shards, self.counts, self.caption_key = shards, counts, caption_key
        self.together, self.channels, self.size, self.maps = together, channels, image_size, [*maps, resize(image_size)]
        self.starts = np.cumsum([0, *counts])
        self.device = torch.device("cpu")
        self._samples_of = lru_cache(INDICES)(samples)
        self._pool = ThreadPoolExecutor(workers or min(16, cores()), "decode")
        self.fetching: threading.Thread | None = None
        self._known: dict[int, Future] = {}  # of the batch in use
        self._ahead: dict[int, Future] = {}  # of the next

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of one image."""
        return self.size, self.size, self.channels

    def first(self, count: int | None) -> "ShardData":
        """The first samples alone; None takes all."""
        counts, left = [], len(self) if count is None else count
        for each in self.counts:
            counts.append(min(each, left))
            left -= counts[-1]
        some = copy.copy(self)
        some.counts, some.starts = counts, np.cumsum([0, *counts])
        return some

    def order(self, seed: int) -> ShardOrder:
        """positions (b,) -> indices (b,), both int64: which sample stands where in the training sequence."""
        return ShardOrder(self.counts, seed, self.together, self._fetch)

    def to(self, device: torch.device | str) -> "ShardData":
        """The same data with batches on `device`."""
        moved = copy.copy(self)
        moved.device = torch.device(device)
        return moved

    def prefetch(self, indices: Tensor) -> None:
        """Begin to decode samples, of which the next batch will consist."""
        self._ahead = {i: self._future(i) for i in indices.tolist()}

    def batch(self, indices: Tensor) -> tuple[Tensor, None]:
        """Images uint8 (b, h, w, c) on the device, and no labels.

        indices: int64 (b,), in host memory.
        Raises UserError for an image that cannot be read any more.
        """
        images = torch.empty(len(indices), *self.image_shape, dtype=torch.uint8, pin_memory=self.device.type == "cuda")
        for image, sample in zip(images, self._samples(indices), strict=True):
            image.copy_(_pixels(sample["image"]))
        return images.to(self.device, non_blocking=True), None

    def fields(self, indices: Tensor, name: str) -> Tensor | list[Any]:
        """Any field of the samples, after the maps: images, also those of a file of the sample, with the size and the
        channels of `batch` as uint8 (b, h, w, c), and tensors (b, ...), both on the device, or a list of what else they
        are.

        Raises UserError where a sample has no such field, an image cannot be read, or tensors differ in size.
        """
        samples = self._samples(indices)
        bare = next((sample for sample in samples if name not in sample), None)
        if bare is not None:
            raise UserError(f"{bare['key']} has no {name!r}; choose from {', '.join(bare)}")
        values = list(self._pool.map(partial(self._value, name=name), samples))
        if not all(isinstance(each, Tensor) for each in values):
            return values
        sizes = sorted({tuple(each.shape) for each in values})
        if len(sizes) > 1:
            raise UserError(f"data.maps: {name!r} is {sizes[0]} in one sample and {sizes[1]} in another; resize before "
                            "rescale")
        return torch.stack(values).to(self.device)

    def _value(self, sample: Fields, name: str) -> Any:
        where = f"{sample['key']}.{name}"
        image = as_image(sample[name], where)
        if image is None:
            return sample[name]
        return _pixels(fit_coco(image.convert(MODES[self.channels]), self.size, where))

    def decoded(self, groups: Sequence[Sequence[int]], size: int, channels: int,
                workers: int = 0) -> Iterator[np.ndarray]:
        """As `Pictures.decoded`, of images of this size and channels."""
        assert (size, size, channels) == self.image_shape, (size, channels)
        for group, following in zip(groups, [*groups, ()][1:], strict=True):
            images = self.batch(torch.tensor(group))[0]
            self.prefetch(torch.tensor(following, dtype=torch.long))
            yield images.cpu().numpy()

    def captions(self) -> list[list[str]]:
        """All captions of all samples."""
        return list(self._pool.map(self._captions, range(len(self))))

    def digest(self) -> str:
        """SHA-256 of the samples' names and files, where and how long these are."""
        found = hashlib.sha256()
        for number in range(len(self)):
            shard, sample = self._locate(number)
            found.update(json.dumps([shard.address, sample.key, sample.members]).encode())
        return found.hexdigest()

    def texts(self, indices: Tensor, draws: Tensor | None = None) -> list[str]:
        """One caption a sample, without decoding its image.

        draws: float64 (b,) in (0, 1), in host memory; of a sample's n captions number floor(draw * n) is taken. Without
            them it is the first.
        """
        draws = [0.0] * len(indices) if draws is None else draws.tolist()
        return [captions[int(draw * len(captions))]
                for captions, draw in zip(self._pool.map(self._captions, indices.tolist()), draws, strict=True)]

    def _fetch(self, numbers: list[int]) -> None:
        """Begin to fetch those of these shards that lie elsewhere."""
        shards = [self.shards[number] for number in numbers if is_remote(self.shards[number].address)]
        if shards:
            self.fetching = threading.Thread(target=_have, args=[shards], daemon=True)  # does not delay the end
            self.fetching.start()

    def _captions(self, number: int) -> list[str]:
        shard, sample = self._locate(number)
        with shard.reading() as read:
            return read_texts(read, sample.members, self.caption_key)[0]

    def _samples(self, indices: Tensor) -> list[Fields]:
        self._known = {i: self._future(i) for i in indices.tolist()}
        return [self._known[i].result() for i in indices.tolist()]

    def _future(self, number: int) -> Future:
        return self._known.get(number) or self._ahead.get(number) or self._pool.submit(self._read, number)

    def _locate(self, number: int) -> tuple[Shard, Sample]:
        place = int(np.searchsorted(self.starts, number, "right")) - 1
        return self.shards[place], self._samples_of(place)[number - self.starts[place]]

    def _read(self, number: int) -> Fields:
        """One sample with its maps applied."""
        shard, sample = self._locate(number)
        name, kind = f"{shard.address}/{sample.key}", sample.image
        with shard.reading() as read:
            captions, fields = read_texts(read, sample.members, self.caption_key)
            contents = {each: read(*at) for each, at in sample.members.items() if each not in CAPTIONS}
        image = open_image(contents.pop(kind), f"{name}.{kind}", self.channels)
        fields = {**fields, **contents, "key": name, "text": captions[0], "image": image}
        for each in self.maps:
            fields = each(fields)
        return fields


def _fetched_bytes(shard: Shard, index: ShardIndex) -> int:
    """What a shard takes of the cache, but for the end of it that no sample needs."""
    ends = (sum(at) for sample in index.samples for at in sample.members.values())
    return max(ends, default=0) if is_remote(shard.address) else 0


def _have(shards: Sequence[Shard]) -> None:
    for shard in shards:
        with contextlib.suppress(UserError), shard.reading():  # an error is told to whoever reads a sample
            pass


def open_shards(shards: Sequence[Shard], image_size: int, channels: int = 3, filters: Sequence[Filter] = (),
                maps: Sequence[Map] = (), caption_key: str = "caption", workers: int = 0, keep: bool = True,
                field: str = "data.path", together: int = SHARDS_TOGETHER) -> ShardData:
    """Index the shards, where that has not been done yet, and log what is left out, and why.

    keep: keep the indices beside local shards, or in the cache's folder, for the next time.
    Raises UserError, naming `field`, where no sample can be used, for a shard that cannot be fetched, and where the
    cache has no room for the shards that are in use at a time.
    """
    left_out, sizes, counts, files, in_memory = LeftOut(), [], [], [], {}
    for number, index in enumerate(used_samples(shards, left_out, filters, caption_key, workers, keep, field)):
        counts.append(len(index.samples))
        sizes.append(_fetched_bytes(shards[number], index))
        files.append(index.file)
        if index.file is None:
            in_memory[number] = index.samples
    logging.info("%s", "; ".join([f"{sum(counts):,} samples in {len(shards):,} shards", *left_out.lines()]))

    in_use = sum(sorted(sizes)[-2 * together:])  # those that are mixed, and the next
    limit = shards[0].cache.limit
    if in_use > limit:
        raise UserError(f"data.shard_cache_gb={limit / 1e9:g}: shards of {in_use / 1e9:.3g} GB are in use at a time")

    def samples(number: int) -> list[Sample]:
        if number in in_memory:
            return in_memory[number]
        return _used(load_index(files[number]), filters, LeftOut(), shards[number]).samples

    return ShardData(shards, counts, samples, image_size, channels, maps, caption_key, workers, together)


def used_samples(shards: Sequence[Shard], left_out: LeftOut, filters: Sequence[Filter] = (),
                 caption_key: str = "caption", workers: int = 0, keep: bool = True,
                 field: str = "data.path") -> Iterator[ShardIndex]:
    """Yield the index of each shard without the samples that a filter leaves out, which are told to `left_out`.

    Raises UserError, naming `field`, after the last shard, where no sample can be used.
    """
    found = 0
    with ThreadPoolExecutor(workers or min(16, cores())) as pool:
        indices = pool.map(partial(read_index, caption_key=caption_key, keep=keep), shards)
        for shard, index in zip(shards, tqdm(indices, total=len(shards), desc="indexing", unit="shard", delay=1),
                                strict=True):
            left_out.merge(index.left_out)
            used = _used(index, filters, left_out, shard)
            found += len(used.samples)
            yield used
    if not found:
        raise UserError(f"{field}: no sample can be used; {'; '.join(left_out.lines()) or 'the shards are empty'}")


def _used(index: ShardIndex, filters: Sequence[Filter], left_out: LeftOut, shard: Shard) -> ShardIndex:
    used = []
    for sample in index.samples:
        why = next((why for each in filters if (why := each(sample))), None)
        if why is None:
            used.append(sample)
        else:
            left_out.add(why, f"{shard.address}/{sample.key}")
    return dataclasses.replace(index, samples=used)


def _pixels(image: Image.Image) -> Tensor:
    """uint8 (h, w, c)."""
    pixels = np.array(image)
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1))

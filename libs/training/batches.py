"""Training batches as a function of the step alone.

Sample i of step s stands at position s * batch_size + i of one endless sequence, in which epoch e is a
permutation of the data seeded by (seed, e). Everything random about a sample is drawn from (seed, position), so
the batch is the same however it is cut among processes and parts, and there is no state to save.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..codecs import Codec, PixelCodec
from ..conditioners import Conditioners, Draws, data_field, make_conditioners
from ..contexts import KINDS, DataContexts, refuse_other_kind
from ..data import ImageData, load_learned
from ..data.feature_data import FeatureData
from ..data.order import DataOrder
from ..data.shards import ShardData
from ..errors import UserError, choose
from ..generate import Chain
from ..random import Stream, normal, uniform


@dataclass(frozen=True)
class Batch:
    """What an objective sees of one part of a step.

    x_0        (b, c, h, w) float32 on the device, encoded
    cond       {"y": (b,) int64} with some labels dropped, {"context": (b, tokens, width)} with some texts, what
               conditioners make of the images, or None
    positions  (b,) int64 on the host, of the samples in the training sequence
    seed       of the training; with a position it decides every random number
    step       updates done before this one
    """

    x_0: Tensor
    cond: dict[str, Tensor] | None
    positions: Tensor
    seed: int
    step: int

    def noise(self, stream: Stream = Stream.TRAIN_NOISE) -> Tensor:
        """Standard normal, shaped like x_0, on its device."""
        positions = self.positions.to(self.x_0.device, non_blocking=True)
        return normal(torch.full_like(positions, self.seed), positions, tuple(self.x_0.shape[1:]), stream)

    def uniform(self, stream: Stream = Stream.TRAIN_TIME) -> Tensor:
        """(b,) float64 in (0, 1), on the host."""
        return uniform(torch.full_like(self.positions, self.seed), self.positions, (), stream)


class Batches:
    """`parts(step)` yields this process's share of a step's batch, cut into `accumulate` parts.

    cond         a description's `cond` section: at the rate `drop` labels (kind label) are replaced by `null_label`,
                 texts (kind text) by the empty one, and what conditioners give (kind image) by what stands for none
    flip         mirror half of the images; features hold the flips that they were made with
    rank, count  of the processes; batch_size is a multiple of count x accumulate
    conditioners of `cond`, where they are made already
    """

    def __init__(self, data: ImageData | FeatureData | ShardData, codec: Codec, cond: Mapping, flip: bool, seed: int,
                 batch_size: int, accumulate: int = 1, rank: int = 0, count: int = 1,
                 conditioners: Conditioners | None = None):
        assert batch_size % (count * accumulate) == 0, (batch_size, count, accumulate)
        self.data, self.codec, self.cond, self.flip, self.seed = data, codec, cond, flip, seed
        self.batch_size, self.accumulate = batch_size, accumulate
        if isinstance(data, FeatureData):
            data.check_encoder(codec.encoder())
        self.share = batch_size // count
        self.first = rank * self.share
        self.order = data.order(seed) if isinstance(data, ShardData) else DataOrder(len(data), seed)
        self.conditioners = conditioners
        if cond["kind"] == "image" and conditioners is None:
            size = codec.latent_shape(data.image_shape[0], data.image_shape[2])[1:]
            self.conditioners = make_conditioners(cond, size, data.device)

    def parts(self, step: int) -> Iterator[Batch]:
        positions = [*self._positions(step), *self._positions(step + 1)]
        for part in range(self.accumulate):
            batch = self._batch(positions[part], step)
            if isinstance(self.data, ShardData):  # decoded while this one is in use
                self.data.prefetch(self.order(positions[part + 1]))
            yield batch

    def _positions(self, step: int) -> Sequence[Tensor]:
        start = step * self.batch_size + self.first
        return torch.arange(start, start + self.share).chunk(self.accumulate)

    def _batch(self, positions: Tensor, step: int) -> Batch:
        indices = self.order(positions)
        held, labels = self.data.batch(indices)  # images b h w c, or moments b 2c h w
        draws = Batch(held, None, positions, self.seed, step)
        if isinstance(self.data, FeatureData):
            x_0 = self._latents(draws, held)
        else:
            held = self._flipped(draws, held, 2)
            x_0 = self._encoded(draws, held)
        return Batch(x_0, self._cond(draws, held, indices, labels), positions, self.seed, step)

    def _flipped(self, draws: Batch, images: Tensor, across: int) -> Tensor:
        """Half of the images mirrored; `across` is the dimension of their width."""
        if not self.flip:
            return images
        return torch.where(self._chosen(draws, Stream.TRAIN_FLIP, 0.5, images), images.flip(across), images)

    def _latents(self, draws: Batch, moments: Tensor) -> Tensor:
        return self.codec.encode_moments(moments, self._encoding_noise(draws, moments.chunk(2, dim=1)[0].shape[1:]))

    def _encoded(self, draws: Batch, images: Tensor) -> Tensor:
        shape = self.codec.latent_shape(images.shape[1], images.shape[3])
        return self.codec.encode(images, self._encoding_noise(draws, shape) if self.codec.takes_noise else None)

    def _encoding_noise(self, draws: Batch, shape: Sequence[int]) -> Tensor:
        keys = draws.positions.to(self.data.device, non_blocking=True)
        return normal(torch.full_like(keys, self.seed), keys, tuple(shape), Stream.ENCODE)

    def _cond(self, draws: Batch, images: Tensor, indices: Tensor,
              labels: Tensor | None) -> dict[str, Tensor] | None:
        if self.cond["kind"] == "none":
            return None
        if self.conditioners is not None:
            inputs = {"image": PixelCodec().encode(images)} | ({"label": labels} if self.cond["num_classes"] else {})
            if "text" in self.conditioners.reads:
                inputs["text"] = self.data.texts(indices, draws.uniform(Stream.TRAIN_CAPTION))
            inputs |= {name: self._field(draws, indices, name) for name in self.conditioners.fields}
            seeds = torch.full_like(draws.positions, self.seed)
            return self.conditioners(inputs, Draws(seeds, draws.positions), drop=True)
        if self.cond["kind"] == "label":
            name, value, null = "y", labels, self.cond["null_label"]
        else:
            name, null = "context", self.data.empty_context
            value = self.data.contexts(indices, draws.uniform(Stream.TRAIN_CAPTION))
        if self.cond["drop"] > 0:
            value = torch.where(self._chosen(draws, Stream.TRAIN_DROP, self.cond["drop"], value), null, value)
        return {name: value}

    def _field(self, draws: Batch, indices: Tensor, name: str) -> Tensor | list[Any]:
        """A field of the samples as conditioners read it; images (b, c, h, w) from -1 to 1, mirrored where x_0 is."""
        value = data_field(self.data, indices, name)
        if not isinstance(value, Tensor) or value.dim() != 4:
            return value
        return self._flipped(draws, PixelCodec().encode(value) if value.dtype == torch.uint8 else value, 3)

    def _chosen(self, draws: Batch, stream: Stream, rate: float, value: Tensor) -> Tensor:
        """True in a share `rate` of the rows, fit to choose among those of `value` (b, ...)."""
        chosen = (draws.uniform(stream) < rate).to(self.data.device, non_blocking=True)
        return chosen.view(-1, *[1] * (value.dim() - 1))


OF_DATA = ("text", "image")  # kinds of conditions that come with the training set


def show_data(chain: Chain, description: Mapping, data: ImageData | FeatureData | ShardData) -> None:
    """Let a chain make images of the texts, or the conditions, of its training set."""
    if description["cond"]["kind"] == "text":
        chain.show(DataContexts(data))
    elif description["cond"]["kind"] == "image":
        chain.show_inputs(data)


def load_training_data(section: Mapping, description: Mapping,
                       device: torch.device) -> ImageData | FeatureData | ShardData:
    """What a config's `data` section has to learn from, on the device where it fits.

    description: of the network that will see it. Raises UserError where images, labels or texts do not fit it.
    """
    image, cond = description["image"], description["cond"]
    if (section["image_size"], section["channels"]) != (image["size"], image["channels"]):
        raise UserError(f"data.image_size={section['image_size']}, data.channels={section['channels']}: this network "
                        f"is for images of {image['size']}x{image['size']}x{image['channels']}")
    choose("cond.kind", cond["kind"], KINDS)
    refuse_other_kind(description)
    data = load_learned(section).to(device)
    if isinstance(data, FeatureData):
        _check_features(data, section, description)
    elif cond["kind"] == "text":
        raise UserError(f"cond.kind='text': the data set {section['name']!r} gives no texts' embeddings; make features "
                        "of it by prepare_data.py, and choose data.name=features")
    if cond["kind"] == "image" and isinstance(data, FeatureData):
        raise UserError("cond.kind='image': the conditions are made of images, and data.name='features' holds latents")
    if cond["kind"] == "label" or (cond["kind"] == "image" and cond["num_classes"]):
        _check_labels(data, section, description)
    return data


def _check_features(data: FeatureData, section: Mapping, description: Mapping) -> None:
    """See that the features are latents and texts of the network's size, and that images can be made of them again."""
    backbone, codec, cond = (description[name] for name in ("backbone", "codec", "cond"))
    if codec["name"] != "kl":
        raise UserError(f"data.name={section['name']!r}: latents are decoded by codec.name='kl', not {codec['name']!r}")
    channels, height, width = data.moments.shape[1] // 2, *data.moments.shape[2:]
    channels = backbone.get("in_chans", backbone.get("in_channels", channels))
    if "img_size" in backbone:  # other networks take any size
        height = width = backbone["img_size"]
    text = (backbone["num_clip_token"], backbone["clip_dim"]) if cond["kind"] == "text" else None
    data.check((channels, height, width), text)


def _check_labels(data: ImageData | FeatureData, section: Mapping, description: Mapping) -> None:
    cond = description["cond"]
    if data.labels is None:
        raise UserError(f"cond.kind='label': the data set {section['name']!r} has no labels; an image folder gets them "
                        "by data.labels=folders")
    highest = int(data.labels.max())
    if highest >= cond["num_classes"]:
        raise UserError(f"cond.num_classes={cond['num_classes']}: the data set has labels up to {highest}")
    if cond["drop"] > 0 and cond["null_label"] < 0:
        raise UserError(f"cond.drop={cond['drop']}: there is no cond.null_label to put in a label's place")

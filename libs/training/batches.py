"""Training batches as a function of the step alone.

Sample i of step s stands at position s * batch_size + i of one endless sequence, in which epoch e is a
permutation of the data seeded by (seed, e). Everything random about a sample is drawn from (seed, position), so
the batch is the same however it is cut among processes and parts, and there is no state to save.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..codecs import Codec
from ..data import ImageData, load_data
from ..errors import UserError, choose
from ..random import Stream, normal, random_bits, uniform


@dataclass(frozen=True)
class Batch:
    """What an objective sees of one part of a step.

    x_0        (b, c, h, w) float32 on the device, encoded
    cond       {"y": (b,) int64} with some labels dropped, or None
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


class DataOrder:
    """Which of n images stands at a position of the training sequence."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epochs: dict[int, Tensor] = {}

    def __call__(self, positions: Tensor) -> Tensor:
        """(b,) int64 positions -> (b,) int64 indices of images."""
        epochs, offsets = positions // self.n, positions % self.n
        wanted = epochs.unique().tolist()
        self._epochs = {epoch: self._epochs.get(epoch, None) for epoch in wanted}
        indices = torch.empty_like(positions)
        for epoch in wanted:
            if self._epochs[epoch] is None:
                self._epochs[epoch] = self._permutation(epoch)
            inside = epochs == epoch
            indices[inside] = self._epochs[epoch][offsets[inside]]
        return indices

    def _permutation(self, epoch: int) -> Tensor:
        high, low = random_bits(torch.tensor([self.seed]), epoch, Stream.DATA_ORDER, 2)[0].tolist()
        generator = torch.Generator().manual_seed((high << 31) ^ low)
        return torch.randperm(self.n, generator=generator)


class Batches:
    """`parts(step)` yields this process's share of a step's batch, cut into `accumulate` parts.

    cond         a description's `cond` section: labels are given to the network where `kind` is label, each
                 replaced by `null_label` at the rate `drop`
    flip         mirror half of the images
    rank, count  of the processes; batch_size is a multiple of count x accumulate
    """

    def __init__(self, data: ImageData, codec: Codec, cond: Mapping, flip: bool, seed: int, batch_size: int,
                 accumulate: int = 1, rank: int = 0, count: int = 1):
        assert batch_size % (count * accumulate) == 0, (batch_size, count, accumulate)
        self.data, self.codec, self.cond, self.flip, self.seed = data, codec, cond, flip, seed
        self.batch_size, self.accumulate = batch_size, accumulate
        self.share = batch_size // count
        self.first = rank * self.share
        self.order = DataOrder(len(data), seed)

    def parts(self, step: int) -> Iterator[Batch]:
        start = step * self.batch_size + self.first
        for positions in torch.arange(start, start + self.share).chunk(self.accumulate):
            yield self._batch(positions, step)

    def _batch(self, positions: Tensor, step: int) -> Batch:
        device = self.data.device
        images, labels = self.data.batch(self.order(positions))  # b h w c
        draws = Batch(images, None, positions, self.seed, step)
        if self.flip:
            mirrored = (draws.uniform(Stream.TRAIN_FLIP) < 0.5).to(device, non_blocking=True)
            images = torch.where(mirrored[:, None, None, None], images.flip(2), images)
        noise = None
        if self.codec.takes_noise:
            shape = self.codec.latent_shape(images.shape[1], images.shape[3])
            keys = positions.to(device, non_blocking=True)
            noise = normal(torch.full_like(keys, self.seed), keys, shape, Stream.ENCODE)
        x_0 = self.codec.encode(images, noise)
        cond = None
        if self.cond["kind"] == "label":
            y = labels
            if self.cond["drop"] > 0:
                dropped = (draws.uniform(Stream.TRAIN_DROP) < self.cond["drop"]).to(device, non_blocking=True)
                y = y.masked_fill(dropped, self.cond["null_label"])
            cond = {"y": y}
        return Batch(x_0, cond, positions, self.seed, step)


def load_training_data(section: Mapping, description: Mapping, device: torch.device) -> ImageData:
    """The data set of a config's `data` section, on the device where it fits.

    description: of the network that will see it. Raises UserError where images or labels do not fit it.
    """
    options = {name: value for name, value in section.items() if name != "flip"}
    image, cond = description["image"], description["cond"]
    if (options["image_size"], options["channels"]) != (image["size"], image["channels"]):
        raise UserError(f"data.image_size={options['image_size']}, data.channels={options['channels']}: this network "
                        f"is for images of {image['size']}x{image['size']}x{image['channels']}")
    choose("cond.kind", cond["kind"], ("none", "label"))
    data = load_data(**options)
    if cond["kind"] == "label":
        if data.labels is None:
            raise UserError(f"cond.kind='label': the data set {options['name']!r} has no labels; an image folder "
                            "gets them by data.labels=folders")
        highest = int(data.labels.max())
        if highest >= cond["num_classes"]:
            raise UserError(f"cond.num_classes={cond['num_classes']}: the data set has labels up to {highest}")
        if cond["drop"] > 0 and cond["null_label"] < 0:
            raise UserError(f"cond.drop={cond['drop']}: there is no cond.null_label to put in a label's place")
    return data.to(device)

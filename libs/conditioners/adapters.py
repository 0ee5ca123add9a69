"""One call for all conditioners, `conditioner(value, draws)`, and the small ones that need no task."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..backbones.uvit import timestep_embedding
from ..random import Stream, uniform


@dataclass(frozen=True)
class Draws:
    """Where a batch's random numbers come from: row i's depend on (seeds[i], positions[i]) alone.

    seeds, positions   (b,) int64 on the host: of the training and of its sequence; of an image and 0 when sampling
    """

    seeds: Tensor
    positions: Tensor

    def uniform(self, count: int, stream: Stream) -> Tensor:
        """(b, count) float64 in (0, 1), on the host."""
        return uniform(self.seeds, self.positions, (count,), stream)


class Conditioner(ABC):
    """`conditioner(value, draws)` -> (b, ...), whose rank says what the network takes it for:

        (b,) int64 labels                     `y`
        (b, d) a vector                       `vector`
        (b, tokens, width) for attention      `context`
        (b, c, h, w) beside x                 `concat`

    reads   its input: image ((b, c, H, W) float32 from -1 to 1, RGB), label ((b,) int64), text (b of them), or a field
            of the training set's samples, such as aesthetic_score or edge.png, see `fields.data_field`: images as
            `image`, numbers (b,) float32
    rate    unconditional rate: of the rows that training shows without this condition; 0 is never, and then guidance
            does not take it away either

    Made of an image, it may say what a person sees of the condition, and which pixels are asked for.
    """

    reads = "image"
    rate = 0.0
    sees_as = ""  # the name of what `picture` shows, where it is itself an answer to the task

    @abstractmethod
    def __call__(self, value, draws: Draws) -> Tensor:
        """The condition of b inputs, drawn by `draws` where it is random."""

    def to(self, device: torch.device) -> "Conditioner":
        """The same on the device; it may move in place."""
        return self

    def null(self, out: Tensor) -> Tensor:
        """What stands for no condition, shaped as `out` (b, ...), floats that it gave; labels have the null label."""
        return torch.zeros_like(out)

    def picture(self, images: Tensor, draws: Draws) -> Tensor | None:
        """(b, c, H, W) from -1 to 1 for a person to look at; None where there is nothing to see."""
        return None

    def hole(self, images: Tensor, draws: Draws) -> Tensor | None:
        """(b, 1, H, W) bool, the pixels that the network makes, the others being known; None for all."""
        return None

    def keep(self, made: Tensor, images: Tensor, draws: Draws) -> Tensor:
        """What the network made, with what the condition knows of `images` as it is; both (b, c, H, W) from -1 to 1."""
        return made


class Apply(Conditioner):
    """Any function `function(value) -> (b, ...)`, or an nn.Module, which is frozen.

    >>> pooled = Apply(nn.AdaptiveAvgPool2d(1))  # (b, c, 1, 1), so the network's `concat`
    >>> pooled(torch.ones(2, 3, 8, 8), None).shape
    torch.Size([2, 3, 1, 1])
    """

    def __init__(self, function: Callable[..., Tensor], reads: str = "image", rate: float = 0.0):
        self.function, self.reads, self.rate = function, reads, rate
        if isinstance(function, nn.Module):
            function.eval().requires_grad_(False)

    def __call__(self, value, draws: Draws) -> Tensor:
        return self.function(value)

    def to(self, device: torch.device) -> "Apply":
        if isinstance(self.function, nn.Module):
            self.function.to(device)
        return self


class Label(Conditioner):
    """Class labels as they are."""

    reads = "label"

    def __init__(self, rate: float = 0.0):
        self.rate = rate

    def __call__(self, value: Tensor, draws: Draws) -> Tensor:
        return value


class Sinusoids(Conditioner):
    """(b, width) sinusoids of a number (b,), as those of a timestep: of a size, a score, a crop."""

    def __init__(self, width: int, reads: str, rate: float = 0.0):
        self.width, self.reads, self.rate = width, reads, rate

    def __call__(self, value: Tensor, draws: Draws) -> Tensor:
        return timestep_embedding(value, self.width)

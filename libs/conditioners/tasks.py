"""The conditions of two tasks: super-resolution and inpainting."""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, choose
from ..random import Stream
from .adapters import Conditioner, Draws

CORNERS = 5  # of a stroke, which is four straight lines
NUMBERS = 2 + 2 * CORNERS  # random numbers of one mask: its kind, then what the kind takes


class SuperResolution(Conditioner):
    """(b, c, h, w): the image 1 / factor as large, each pixel the mean of factor^2, then enlarged to the network's size
    by bicubic interpolation (Keys' kernel with a = -1/2, as Pillow's).

    factor   divides the sides of the image
    size     (h, w) of the network's x
    """

    sees_as = "bicubic"

    def __init__(self, factor: int, size: tuple[int, int], rate: float = 0.0):
        if factor < 2:
            raise UserError(f"cond.factor={factor} must be at least 2")
        self.factor, self.size, self.rate = factor, size, rate

    def __call__(self, value: Tensor, draws: Draws) -> Tensor:
        return self._enlarged(value, self.size)

    def picture(self, images: Tensor, draws: Draws) -> Tensor:
        return self._enlarged(images, images.shape[2:])

    def keep(self, made: Tensor, images: Tensor, draws: Draws) -> Tensor:
        """The mean of each factor^2 pixels is the small image's pixel: the nearest image of which that is true, before
        it is clipped (2212.00490, its range-null space decomposition with A the mean).
        """
        error = self._small(images) - F.avg_pool2d(made, self.factor)
        return (made + F.interpolate(error, made.shape[2:], mode="nearest")).clamp(-1, 1)

    def _small(self, images: Tensor) -> Tensor:
        if any(side % self.factor for side in images.shape[2:]):
            raise UserError(f"cond.factor={self.factor} does not divide images of {images.shape[2]}x{images.shape[3]}")
        small = F.avg_pool2d(images, self.factor)
        return ((small + 1) * 127.5).round() / 127.5 - 1  # an image file's levels

    def _enlarged(self, images: Tensor, size: Sequence[int]) -> Tensor:
        return F.interpolate(self._small(images), tuple(size), mode="bicubic", antialias=True).clamp(-1, 1)


class Inpainting(Conditioner):
    """(b, 1 + c, h, w): 1 in the hole and 0 elsewhere, then the image with 0 in the hole.

    kinds   of masks, one of which is drawn for every image: boxes, halves, strokes
    """

    def __init__(self, kinds: Sequence[str] = ("boxes", "halves", "strokes"), rate: float = 0.0):
        if not kinds:
            raise UserError(f"cond.masks is empty; choose from {', '.join(MASKS)}")
        self.kinds, self.rate = [choose("cond.masks", kind, MASKS) for kind in kinds], rate

    def __call__(self, value: Tensor, draws: Draws) -> Tensor:
        hole = self.hole(value, draws)
        return torch.cat([hole.to(value.dtype), value.masked_fill(hole, 0)], dim=1)

    def picture(self, images: Tensor, draws: Draws) -> Tensor:
        return images.masked_fill(self.hole(images, draws), 0)

    def keep(self, made: Tensor, images: Tensor, draws: Draws) -> Tensor:
        return torch.where(self.hole(images, draws), made, images)

    def hole(self, images: Tensor, draws: Draws) -> Tensor:
        h, w = images.shape[2:]
        numbers = draws.uniform(NUMBERS, Stream.MASK).float().to(images.device)
        kind = (numbers[:, 0] * len(self.kinds)).long()
        y = ((torch.arange(h, device=images.device) + 0.5) / h)[None, :, None]  # centres of the pixels, from 0 to 1
        x = ((torch.arange(w, device=images.device) + 0.5) / w)[None, None, :]
        masks = torch.stack([each(numbers[:, 1:, None, None], y, x) for each in self.kinds])  # kinds b h w
        return masks.gather(0, kind.view(1, -1, 1, 1).expand(1, *masks.shape[1:]))[0, :, None]


# Each takes random numbers u (b, NUMBERS - 1, 1, 1) and the pixels' places y (1, h, 1) and x (1, 1, w), and gives
# (b, h, w), True in the hole.


def boxes(u: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """A rectangle inside the image, each side a quarter to three quarters of the image's."""
    height, width = 0.25 + 0.5 * u[:, 0], 0.25 + 0.5 * u[:, 1]
    top, left = (1 - height) * u[:, 2], (1 - width) * u[:, 3]
    return (y >= top) & (y < top + height) & (x >= left) & (x < left + width)


def halves(u: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """One half of the image: upper, lower, left or right."""
    side = (4 * u[:, 0]).long()
    place = torch.where(side < 2, y, x)
    return torch.where(side % 2 == 0, place < 0.5, place >= 0.5)


def strokes(u: Tensor, y: Tensor, x: Tensor) -> Tensor:
    """All that is near a broken line, by 1/16 to 1/8 of the image's side: never so little as to miss all pixels."""
    radius = (0.0625 + 0.0625 * u[:, 0]).clamp(min=0.75 / min(y.shape[1], x.shape[2]))
    corners = u[:, 1:1 + 2 * CORNERS].unflatten(1, (CORNERS, 2))
    start, end = corners[:, :-1], corners[:, 1:]  # b lines 2 1 1
    point = torch.stack(torch.broadcast_tensors(y, x), dim=1)[:, None]  # 1 1 2 h w
    along = ((point - start) * (end - start)).sum(2, keepdim=True) / (end - start).square().sum(2, keepdim=True)
    nearest = start + along.clamp(0, 1) * (end - start)
    return ((point - nearest).square().sum(2) < radius[:, None] ** 2).any(1)


MASKS: dict[str, Callable[[Tensor, Tensor, Tensor], Tensor]] = {"boxes": boxes, "halves": halves, "strokes": strokes}

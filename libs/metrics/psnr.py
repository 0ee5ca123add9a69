"""Peak signal-to-noise ratio of images to the originals of which their conditions were made."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..errors import UserError
from ..processes import Processes

PEAK = 255
ROUNDING = 1 / 12  # mean squared error of rounding to whole levels: images that are equal score 58.9 dB, not infinity


class Truth(NamedTuple):
    """What images of a model of images should be.

    originals   uint8 (b, h, w, c)
    hole        (b, h, w, 1) bool, the pixels that the model made; None for all
    answer      (name, uint8 (b, h, w, c)) of a plain answer to the same task, such as bicubic; None without
    """

    originals: Tensor
    hole: Tensor | None = None
    answer: tuple[str, Tensor] | None = None


def psnr(images: Tensor, originals: Tensor, hole: Tensor | None = None) -> Tensor:
    """(b,) float64 10 log10(255^2 / mean squared error) of uint8 images (b, h, w, c), in dB, over the pixels of `hole`
    (b, h, w, 1) or over all.

    >>> psnr(torch.zeros(1, 2, 2, 1, dtype=torch.uint8), torch.full((1, 2, 2, 1), 255, dtype=torch.uint8)).item()
    0.0
    """
    error = (images.double() - originals.double()).square()
    weight = torch.ones_like(error) if hole is None else hole.to(error).expand_as(error)
    mean = (error * weight).flatten(1).sum(1) / weight.flatten(1).sum(1)
    return 10 * torch.log10(PEAK**2 / mean.clamp(min=ROUNDING))


class Pixels:
    """The images themselves, where another metric has features of them."""

    name = "pixels"

    def __call__(self, images: Tensor) -> Tensor:
        return images


class PSNR:
    """Mean over the images of their PSNR in dB, and of that of a plain answer to the same task where there is one."""

    def __init__(self, extractors: Mapping[str, Any], request: Any):
        if not request.shown:
            raise UserError("eval.metrics: psnr needs a model of images and its originals; give --seeds and --images, "
                            "or leave it out")
        self.extractor = Pixels()
        self.values: list[Tensor] = []
        self.answers: dict[str, list[Tensor]] = {}
        self.pixels = "all"

    def update(self, features: Tensor, labels: Tensor | None, prompts: list[str] | None, truth: Truth) -> None:
        hole = None if truth.hole is None else truth.hole.cpu()
        originals = truth.originals.cpu()
        self.pixels = "all" if hole is None else "hole"
        self.values.append(psnr(features.cpu(), originals, hole))
        if truth.answer is not None:
            name, answer = truth.answer
            self.answers.setdefault(name, []).append(psnr(answer.cpu(), originals, hole))

    def compute(self, processes: Processes) -> dict[str, dict[str, Any]]:
        own = {name: torch.cat(values) for name, values in {"value": self.values, **self.answers}.items() if values}
        parts = [part for part in processes.gather(own) if part]
        if not processes.is_main:
            return {}
        means = {name: torch.cat([part[name] for part in parts]).mean().item() for name in parts[0]}
        return {"psnr": {**means, "samples": sum(len(part["value"]) for part in parts), "pixels": self.pixels}}

"""Between uint8 images and the space in which the diffusion runs; the training loop never asks which."""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from .errors import choose


class Codec(Protocol):
    """What every codec offers: between images of h x w pixels, c channels, and a model space of c' h' w'."""

    def encode(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w, c) -> float32 (b, c', h', w') with values of about unit size."""

    def decode(self, x: Tensor) -> Tensor:
        """(b, c', h', w') of any floating type -> uint8 (b, h, w, c)."""

    def latent_shape(self, image_size: int, channels: int) -> tuple[int, int, int]:
        """(c', h', w') for square images of image_size pixels."""


class PixelCodec:
    """Model space = pixels, scaled from 0 ... 255 to -1 ... 1. A decoded encoding is the image, exactly."""

    def encode(self, images: Tensor) -> Tensor:
        assert images.dtype == torch.uint8, images.dtype
        return images.permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1  # b c h w

    def decode(self, x: Tensor) -> Tensor:
        levels = (x.float() * 127.5 + 127.5).round().clamp(0, 255)
        return levels.to(torch.uint8).permute(0, 2, 3, 1).contiguous()  # b h w c

    def latent_shape(self, image_size: int, channels: int) -> tuple[int, int, int]:
        return channels, image_size, image_size


CODECS = {"pixel": PixelCodec}


def make_codec(section: Mapping) -> Codec:
    """Codec of a config section: `name` chooses the class, the other fields are its arguments."""
    options = dict(section)
    return choose("codec.name", options.pop("name"), CODECS)(**options)

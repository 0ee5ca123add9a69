"""Between uint8 images and the space in which the diffusion runs; the training loop never asks which."""

import inspect
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn

from .autoencoder_checkpoint import load_autoencoder
from .errors import UserError, choose
from .files import reason


class Codec(Protocol):
    """What every codec offers: between images of h x w pixels, c channels, and a model space of c' h' w'."""

    takes_noise: bool  # whether training gives `encode` standard normal noise (b, c', h', w')

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """uint8 (b, h, w, c) -> float32 (b, c', h', w') with values of about unit size."""

    def decode(self, x: Tensor) -> Tensor:
        """(b, c', h', w') of any floating type -> uint8 (b, h, w, c)."""

    def pixels(self, x: Tensor) -> Tensor:
        """(b, c', h', w') -> RGB (b, c, h, w) of about -1 ... 1, differentiable in x."""

    def latent_shape(self, image_size: int, channels: int) -> tuple[int, int, int]:
        """(c', h', w') for square images of image_size pixels."""


class PixelCodec:
    """Model space = pixels, scaled from 0 ... 255 to -1 ... 1. A decoded encoding is the image, exactly.

    order   rgb, or bgr for a model that learnt from images whose channels stood in that order; images are RGB always
    """

    takes_noise = False

    def __init__(self, order: str = "rgb"):
        self.order = choose("codec.order", order, ("rgb", "bgr"))

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        assert images.dtype == torch.uint8, images.dtype
        return self._ordered(images.permute(0, 3, 1, 2)).contiguous().float() / 127.5 - 1  # b c h w

    def decode(self, x: Tensor) -> Tensor:
        levels = (x.float() * 127.5 + 127.5).round().clamp(0, 255)
        return self._ordered(levels.to(torch.uint8)).permute(0, 2, 3, 1).contiguous()  # b h w c

    def pixels(self, x: Tensor) -> Tensor:
        return self._ordered(x)

    def latent_shape(self, image_size: int, channels: int) -> tuple[int, int, int]:
        self._check(channels)
        return channels, image_size, image_size

    def _ordered(self, x: Tensor) -> Tensor:
        """x (b, c, h, w) from one order of its channels to the other."""
        self._check(x.shape[1])
        return x.flip(1) if self.order == "bgr" else x

    def _check(self, channels: int) -> None:
        if self.order == "bgr" and channels != 3:
            raise UserError(f"codec.order='bgr' needs 3 channels; data.channels={channels}")


class KLCodec:
    """Model space = an autoencoder's latents, scaled: z = scale_factor * (mean + std * noise).

    pretrained     a folder or hub id of a diffusers `AutoencoderKL`, or a .pth file such as U-ViT's autoencoder_kl.pth
    scale_factor   1 / the standard deviation of the latents: 0.18215 on ImageNet, 0.23010 on COCO
    chunk          images encoded or decoded at once
    """

    takes_noise = True

    def __init__(self, pretrained: str, scale_factor: float, device: torch.device | str = "cpu", chunk: int = 16):
        self.vae = _autoencoder(pretrained).to(device).eval().requires_grad_(False)
        self.device, self.scale_factor, self.chunk = torch.device(device), scale_factor, chunk

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """A sample of the latents for standard normal noise (b, c', h', w'); their mean without."""
        return self.encode_moments(self.moments(images), noise)

    @torch.no_grad()
    def moments(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w, c) -> float32 (b, 2c', h', w'): mean of the latents, then log variance in [-30, 20]."""
        pixels = PixelCodec().encode(images.to(self.device))
        parts = [self.vae.encode(part).latent_dist for part in pixels.split(self.chunk)]
        return torch.cat([torch.cat([part.mean, part.logvar], dim=1) for part in parts])

    @torch.no_grad()
    def encode_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """What `encode` gives for the images whose `moments` (b, 2c', h', w') these are."""
        mean, logvar = moments.to(self.device).chunk(2, dim=1)
        z = mean if noise is None else mean + torch.exp(0.5 * logvar) * noise.to(mean)
        return self.scale_factor * z

    @torch.no_grad()
    def decode(self, x: Tensor) -> Tensor:
        return torch.cat([PixelCodec().decode(self.pixels(part)) for part in x.split(self.chunk)])

    def pixels(self, x: Tensor) -> Tensor:
        return self.vae.decode(x.to(self.device).float() / self.scale_factor).sample

    def encoder(self) -> list[nn.Module]:
        """What decides the moments. Autoencoders may share it: some of Stable Diffusion differ in the decoder alone."""
        return [part for part in (self.vae.encoder, self.vae.quant_conv) if part is not None]

    def latent_shape(self, image_size: int, channels: int) -> tuple[int, int, int]:
        side = image_size // 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.latent_channels, side, side


def _autoencoder(pretrained: str) -> nn.Module:
    """diffusers' AutoencoderKL from a folder, the hub, or a file in the format of latent diffusion."""
    from diffusers import AutoencoderKL

    if Path(pretrained).suffix in (".pth", ".pt"):
        return load_autoencoder(Path(pretrained).expanduser())
    try:
        return AutoencoderKL.from_pretrained(pretrained, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"codec.pretrained={pretrained!r}: no AutoencoderKL there and none on the hub "
                        f"({reason(error)})") from error


CODECS = {"pixel": PixelCodec, "kl": KLCodec}


def make_codec(section: Mapping, device: torch.device | str = "cpu") -> Codec:
    """Codec of a config section: `name` chooses the class, the other fields are its arguments.

    Raises UserError for a field that the codec does not take, and for one that it lacks.
    """
    options = dict(section)
    name = options.pop("name")
    cls = choose("codec.name", name, CODECS)
    takes = {each.name: each for each in inspect.signature(cls).parameters.values() if each.name != "device"}
    for field in options:
        if field not in takes:
            raise UserError(f"codec.name={name!r}: it takes no codec.{field}, which this config gives; its fields are "
                            f"{', '.join(takes)}")
    for field, each in takes.items():
        if field not in options and each.default is each.empty:
            raise UserError(f"codec.name={name!r}: codec.{field} is missing, which this config does not give")
    return cls(**options, device=device) if cls is KLCodec else cls(**options)

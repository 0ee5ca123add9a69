"""Training of a small `AutoencoderKL`, in whose latents a diffusion runs by `codec.name=kl`.

    L = mean |x - x'| + kl_weight mean KL(N(mean, std^2) || N(0, 1)),    KL = (mean^2 + std^2 - 1 - log std^2) / 2

x' decodes z = mean + std noise (1312.6114, appendix B); the first mean is over the values of an image, the second over
those of its latents. Latent diffusion (2112.10752, appendix G) adds a perceptual and an adversarial loss, without which
fine texture comes out smooth; flat drawings do well without.
"""

import contextlib
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor, nn

from ..build import describe
from ..checkpoint import load_weights, read, resolve
from ..codecs import PixelCodec
from ..data import ImageData, hold_out
from ..data.images import BACKGROUND, image_grid, save_png
from ..denoiser import Denoiser
from ..errors import UserError
from ..files import reason
from ..random import Stream, normal
from .batches import Batch
from .loop import Trainer
from .run import Run

AUTOENCODER = "autoencoder_kl"  # backbone.name
FOLDER = "autoencoder"  # of the run: what codec.pretrained reads
FIRST_LOGVAR = -6.0  # of the latents before training
MEASURED = 512  # images, at most, of which the PSNR and the standard deviation of the latents are taken


class Autoencoder(nn.Module):
    """diffusers' `AutoencoderKL` as `net(x, noise) -> (x', mean, logvar)`, with the noise of its latents given.

    latent_channels, block_out_channels, layers_per_block   theirs; each width after the first halves the side
    norm_num_groups                                         groups of the norms; divides every width
    mid_attention                                           self-attention at the lowest resolution
    """

    def __init__(self, latent_channels: int = 4, block_out_channels: tuple[int, ...] = (128, 256, 512, 512),
                 layers_per_block: int = 2, norm_num_groups: int = 32, mid_attention: bool = True, channels: int = 3):
        super().__init__()
        from diffusers import AutoencoderKL  # takes seconds to import

        widths = tuple(block_out_channels)
        self.vae = AutoencoderKL(
            in_channels=channels, out_channels=channels, latent_channels=latent_channels, block_out_channels=widths,
            down_block_types=("DownEncoderBlock2D",) * len(widths), up_block_types=("UpDecoderBlock2D",) * len(widths),
            layers_per_block=layers_per_block, norm_num_groups=norm_num_groups, mid_block_add_attention=mid_attention)
        self.factor = 2 ** (len(widths) - 1)
        with torch.no_grad():  # a standard deviation as large as the mean's would drown what the decoder first learns
            self.vae.quant_conv.bias[latent_channels:] = FIRST_LOGVAR

    def latent_shape(self, image_size: int) -> tuple[int, int, int]:
        """(c', h', w') for square images of image_size pixels."""
        return self.vae.config.latent_channels, image_size // self.factor, image_size // self.factor

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log variance of the latents, each (b, c', h', w'), of images (b, c, h, w) in [-1, 1]."""
        latents = self.vae.encode(x).latent_dist
        return latents.mean, latents.logvar

    def decode(self, z: Tensor) -> Tensor:
        return self.vae.decode(z).sample

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        mean, logvar = self.encode(x)
        return self.decode(mean + (0.5 * logvar).exp() * noise), mean, logvar


class AutoencoderLoss:
    """The loss above, an `Objective`: `loss(denoiser, batch) -> (b,)`, where the denoiser's network is an `Autoencoder`
    and x_0 are pixels.

    latent_shape   (c', h', w') of an image
    """

    def __init__(self, kl_weight: float, latent_shape: tuple[int, int, int]):
        self.kl_weight, self.latent_shape = kl_weight, latent_shape

    def __call__(self, denoiser: Denoiser, batch: Batch) -> Tensor:
        keys = batch.positions.to(batch.x_0.device, non_blocking=True)
        noise = normal(torch.full_like(keys, batch.seed), keys, self.latent_shape, Stream.ENCODE)
        with denoiser.autocast() if denoiser.autocast else contextlib.nullcontext():
            reconstruction, mean, logvar = denoiser.net(batch.x_0, noise)
        return self.of(batch.x_0, reconstruction.float(), mean.float(), logvar.float())

    def of(self, x: Tensor, reconstruction: Tensor, mean: Tensor, logvar: Tensor) -> Tensor:
        """(b,) from images x and reconstructions (b, c, h, w) and their latents' mean and log variance."""
        distance = (x - reconstruction).abs().flatten(1).mean(dim=1)
        kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).flatten(1).mean(dim=1)
        return distance + self.kl_weight * kl


class AutoencoderTrainer(Trainer):
    """The training loop, with what it tells of an autoencoder: pictures and PSNR of images that it does not learn from.

    Every checkpoint comes with WORKDIR/autoencoder, a diffusers folder of the averaged weights, whose `scaling_factor`
    is 1 / the standard deviation of the latents: codec.scale_factor of the diffusion.
    """

    def __init__(self, config: ConfigDict, run: Run, net: Autoencoder, description: Mapping[str, Any],
                 precision: str = "fp32"):
        loss = AutoencoderLoss(config.autoencoder.kl_weight, net.latent_shape(config.data.image_size))
        super().__init__(config, run, net, description, loss, precision)

    def train(self, data: ImageData, began: float) -> int:
        """As `Trainer.train`, on all but every `autoencoder.hold_out`-th image."""
        self.learned, self.held_out = hold_out(data, self.config.autoencoder.hold_out, "--config.autoencoder.hold_out")
        return super().train(self.learned, began)

    def _preview(self) -> None:
        """previews/{step}.png, held-out images above what comes out of them, and their PSNR."""
        with self._sampling():
            if not self.processes.is_main:
                return
            images, out = (torch.cat(each) for each in zip(*(
                (part.cpu(), self._reconstruct(part).cpu()) for part in self._parts(self.held_out)), strict=True))
            error = float((images.double() - out.double()).square().mean())
            psnr = 10 * math.log10(255**2 / max(error, 1e-9))
            self.report.scalars(self.step, {"psnr": psnr})
            logging.info("step %d  PSNR %.2f dB of %d held-out images", self.step, psnr, len(images))
            shown = self.section.preview_images
            save_png(self.run.workdir / "previews" / f"{self.step:08d}.png", above(images[:shown], out[:shown]))

    def _parts(self, data: ImageData) -> Iterator[Tensor]:
        """The first `MEASURED` images, uint8 (b, h, w, c) on the device, as many at a time as the chain takes."""
        for indices in torch.arange(min(len(data), MEASURED)).split(self.chain.rows):
            yield data.batch(indices)[0]

    @torch.no_grad()
    def _reconstruct(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w, c) -> the same, by the averaged weights from the means of the latents."""
        mean, _ = self.ema.net.encode(PixelCodec().encode(images))
        return PixelCodec().decode(self.ema.net.decode(mean))

    def _save(self) -> None:
        """The folder, then the checkpoint: whoever goes on from this has made that."""
        self._refuse_failure()
        with self._sampling():
            if self.processes.is_main:
                self._write_folder()
        super()._save()

    def _write_folder(self) -> None:
        vae, folder = self.ema.net.vae, self.run.workdir / FOLDER
        scale = self._scale_factor()
        vae.register_to_config(scaling_factor=scale)
        temporary = folder.with_name(f".{FOLDER}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        vae.save_pretrained(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temporary, folder)
        self.report.scalars(self.step, {"scale_factor": scale})
        logging.info("wrote %s: codec.pretrained; codec.scale_factor=%.5f", folder, scale)

    @torch.no_grad()
    def _scale_factor(self) -> float:
        """1 / the standard deviation of sampled latents, whose variance is that of the means and the mean variance."""
        sums, count = torch.zeros(3, dtype=torch.float64), 0  # of mean, mean^2, std^2, averaged over an image
        for images in self._parts(self.learned):
            mean, logvar = self.ema.net.encode(PixelCodec().encode(images))
            sums += torch.stack([each.double().flatten(1).mean(dim=1).sum().cpu()
                                 for each in (mean, mean.square(), logvar.exp())])
            count += len(images)
        first, second, noise = (sums / count).tolist()
        return (second - first**2 + noise) ** -0.5


def above(images: Tensor, out: Tensor) -> Tensor:
    """One picture, uint8 (H, W, c): rows of images above rows of what came out of them, both uint8 (n, h, w, c).

    >>> black, gray = (torch.full((4, 32, 32, 1), value, dtype=torch.uint8) for value in (0, 128))
    >>> above(black, gray)[2::34, 2].flatten().tolist()
    [0, 128, 0, 128]
    """
    columns = math.ceil((2 * len(images)) ** 0.5)
    padding = (0, 0, 0, 0, 0, 0, 0, -len(images) % columns)
    rows = [nn.functional.pad(each, padding, value=BACKGROUND).unflatten(0, (-1, columns)) for each in (images, out)]
    return image_grid(torch.stack(rows, dim=1).flatten(0, 2), columns, upscale=max(1, 32 // images.shape[1]))


def start_autoencoder(config: ConfigDict, start: str | None) -> tuple[Autoencoder, dict[str, Any]]:
    """(network, description): new weights drawn from the config's seed, or those that `start` names."""
    _validate(config)
    options = {name: value for name, value in config.backbone.items() if name != "name"}
    torch.manual_seed(config.seed)
    try:
        net = Autoencoder(**options, channels=config.data.channels)
    except (TypeError, ValueError) as error:
        raise UserError(f"backbone: {reason(error)}") from error
    size = config.data.image_size
    if size % net.factor:
        raise UserError(f"--config.data.image_size={size} must be a multiple of {net.factor}: "
                        f"backbone.block_out_channels has {len(options['block_out_channels'])} widths")
    if start:
        path = resolve(start)
        load_weights(net, read(path)[0], str(path))
    return net, describe(config)


def _validate(config: ConfigDict) -> None:
    section = config.autoencoder
    if not 0 <= section.kl_weight < math.inf:
        raise UserError(f"--config.autoencoder.kl_weight={section.kl_weight} must not be negative")
    if section.hold_out < 2:
        raise UserError(f"--config.autoencoder.hold_out={section.hold_out} must be at least 2: every second image")
    if config.train.eval_every:
        raise UserError(f"--config.train.eval_every={config.train.eval_every}: an autoencoder is measured at "
                        "train.preview_every")
    if config.codec.name != "pixel" or config.cond.kind != "none":
        raise UserError(f"--config.codec.name={config.codec.name}, --config.cond.kind={config.cond.kind}: an "
                        "autoencoder learns from pixels alone; want pixel and none")

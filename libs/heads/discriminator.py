"""The discriminator of Flash Diffusion (2406.02347): a small convolutional head on a frozen teacher's features.

The published sizes come out with w = `width` channels after the first layer and twice as many after each further one:

    teacher      features           width  layers       parameters
    SD 1.5       1280 x 8 x 8          64  2             0.87 M
    SDXL         1280 x 32 x 32       256  3            15.75 M
    T2I, SDXL    1280 x 32 x 32        64  3             1.97 M
    PixArt       output, 4 x 128^2     64  5            11.17 M
    SD3          output, 16 x 128^2    64  4 (not 5)     2.78 M
"""

from collections.abc import Mapping
from math import gcd

from torch import Tensor, nn

from ..errors import UserError

LAST = 4  # side of the last layer's kernel, and of the map that it sees


def keeps_size(height: int, width: int) -> bool:
    """Whether the first layer works at the features' own resolution: a map below 16x16 has little to lose."""
    return max(height, width) < 4 * LAST


def default_layers(height: int, width: int) -> int:
    """Layers that take features of this size to a map of 4x4 or less."""
    layers = int(keeps_size(height, width))
    while max(height, width) > LAST and min(height, width) > 1:
        height, width, layers = height // 2, width // 2, layers + 1
    return layers


class Discriminator(nn.Module):
    """Features (b, channels, h, w) -> logits (b, n) in float32, high where they look real.

    Every layer is a convolution, a normalisation and a LeakyReLU. The convolutions are 4x4 with stride 2, but the first
    is 3x3 with stride 1 on a map below 16x16. One 4x4 convolution makes the logits of what is left: one of a map of
    4x4, as the default number of layers leaves it, and with fewer layers one for each place that the kernel fits.
    Normalised is each image by itself, so that no image's logits depend on its batch mates.

    channels, height, width   of the features
    first                     channels after the first layer, a multiple of 4; each further layer doubles them
    layers                    before the logits; 0 is `default_layers`
    """

    def __init__(self, channels: int, height: int, width: int, first: int = 64, layers: int = 0):
        super().__init__()
        if first < 4 or first % 4:
            raise UserError(f"--config.distill.discriminator_width={first} must be a positive multiple of 4")
        if layers < 0:
            raise UserError(f"--config.distill.discriminator_layers={layers} must be positive, or 0 for those that the "
                            "features' size asks for")
        size, blocks = (height, width), []
        for i in range(layers or default_layers(height, width)):
            after = first * 2**i
            if i == 0 and keeps_size(height, width):
                convolution = nn.Conv2d(channels, after, 3, padding=1, bias=False)
            else:
                convolution = nn.Conv2d(channels, after, 4, stride=2, padding=1, bias=False)
                size = size[0] // 2, size[1] // 2
            if min(size) < 1:
                raise UserError(f"--config.distill.discriminator_layers={layers}: features of {height} x {width} "
                                f"cannot be halved so often; 0 is {default_layers(height, width)}")
            # Groups of four channels or more: at 1x1, a group of one would have nothing to normalise.
            blocks.append(nn.Sequential(convolution, nn.GroupNorm(gcd(32, after // 4), after), nn.LeakyReLU(0.2)))
            channels = after
        self.blocks = nn.Sequential(*blocks)
        self.last = nn.Conv2d(channels, 1, (min(size[0], LAST), min(size[1], LAST)))

    def forward(self, features: Tensor) -> Tensor:
        return self.last(self.blocks(features.to(self.last.weight.dtype))).flatten(1).float()


def make_discriminator(section: Mapping, channels: int, height: int, width: int) -> Discriminator:
    """The discriminator of a config's `distill` section for features (channels, height, width)."""
    return Discriminator(channels, height, width, section["discriminator_width"], section["discriminator_layers"])

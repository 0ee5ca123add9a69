"""Networks: `net(x, timesteps, y=None, context=None) -> out`, out shaped like x (b, c, h, w)."""

from .unet2d import UNet2D
from .uvit import UViT

BACKBONES = {"uvit": UViT, "unet2d": UNet2D}

__all__ = ["BACKBONES", "UNet2D", "UViT"]

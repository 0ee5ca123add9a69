"""Networks: `net(x, timesteps, y=None, context=None) -> out`, out shaped like x (b, c, h, w).

One that predicts both x_0 and eps has twice the channels; one made by guidance.py also takes `guidance` (b,).
"""

from collections.abc import Callable

from torch import nn

from .ddpm_unet import DDPMUNet
from .uvit import UViT


def uvit_class() -> type[nn.Module]:
    return UViT


def unet2d_class() -> type[nn.Module]:
    from .unet2d import UNet2D  # diffusers takes seconds to import; a U-ViT does without

    return UNet2D


def ddpm_unet_class() -> type[nn.Module]:
    return DDPMUNet


def factory_function() -> Callable[[str], nn.Module]:
    from ..factory import make_network

    return make_network


# name -> a function that gives the class, or a function in its place
BACKBONES = {"uvit": uvit_class, "unet2d": unet2d_class, "ddpm_unet": ddpm_unet_class, "factory": factory_function}


def __getattr__(name: str):
    if name == "UNet2D":
        return unet2d_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

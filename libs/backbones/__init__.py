"""Networks: `net(x, timesteps, y=None, context=None) -> out`, out shaped like x (b, c, h, w)."""

from torch import nn

from .uvit import UViT


def uvit_class() -> type[nn.Module]:
    return UViT


def unet2d_class() -> type[nn.Module]:
    from .unet2d import UNet2D  # diffusers takes seconds to import; a U-ViT does without

    return UNet2D


BACKBONES = {"uvit": uvit_class, "unet2d": unet2d_class}  # name -> a function that gives the class


def __getattr__(name: str):
    if name == "UNet2D":
        return unet2d_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

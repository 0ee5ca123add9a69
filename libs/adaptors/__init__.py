"""Adaptors of Clockwork (2312.08128): what stands in for the low-resolution part of a UNet on steps that reuse it.

An adaptor is an nn.Module called as `adaptor(deep: DeepFeatures) -> r_out_hat` (b, c_out, h, w), in the precision
of the features. Its class says
    uses  the fields of DeepFeatures that it reads; only those need be kept
    cut   where r_out is taken: "before" the upsampler of the last deep block, where r_in and r_out are of one
          size, or "any"
and it may say of which UNet it is: sizes, of c_in, c_out and temb_dim those that decide its own.
All of them start as the identity adaptor of the paper, which hands back the features of the last step.
Files: `adaptors.files`.
"""

from torch import nn

from ..errors import UserError, choose
from .features import DeepFeatures
from .learned import ResNetAdaptor, UNetAdaptor, UNetLightAdaptor
from .training_free import Extrapolation, RidgeAdaptor

ADAPTORS: dict[str, type[nn.Module]] = {
    "resnet": ResNetAdaptor,
    "unet": UNetAdaptor,
    "unet_light": UNetLightAdaptor,
    "extrapolation": Extrapolation,
    "ridge": RidgeAdaptor,
}

__all__ = ["ADAPTORS", "DeepFeatures", "Extrapolation", "ResNetAdaptor", "RidgeAdaptor", "UNetAdaptor",
           "UNetLightAdaptor", "make_adaptor"]


def make_adaptor(name: str, c_in: int, c_out: int, temb_dim: int, **options) -> nn.Module:
    """An untrained adaptor by name.

    c_in, c_out: channels of r_in and r_out; temb_dim: of the UNet's time embedding; options: of the class.
    Raises UserError for an unknown name, size or option.
    """
    cls = choose("adaptor", name, ADAPTORS)
    try:
        return cls(c_in, c_out, temb_dim, **options)
    except TypeError as error:
        raise UserError(f"adaptor={name!r}: {error}") from error

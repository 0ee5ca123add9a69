"""Real images: `load_data` reads a data set by name into an `ImageData`, or their latents into a `FeatureData`."""

from .feature_data import FeatureData
from .image_data import ImageData, hold_out
from .loaders import load_data, load_learned, load_section

__all__ = ["FeatureData", "ImageData", "hold_out", "load_data", "load_learned", "load_section"]

"""Real images: `load_data` reads a data set by name into an `ImageData`, or their latents into a `FeatureData`."""

from .feature_data import FeatureData
from .image_data import ImageData
from .loaders import load_data

__all__ = ["FeatureData", "ImageData", "load_data"]

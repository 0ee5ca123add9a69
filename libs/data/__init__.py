"""Real images: `load_data` reads a data set by name into an `ImageData`."""

from .image_data import ImageData
from .loaders import load_data

__all__ = ["ImageData", "load_data"]

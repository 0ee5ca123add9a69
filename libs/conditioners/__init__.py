"""Conditioners: from images, labels, texts or a user's own tensors to what a network is given beside x and t."""

from .adapters import Apply, Conditioner, Draws, Label, Sinusoids, TextContext
from .compose import OF_IMAGES, Conditioners, make_conditioners, names_code, unconditional
from .shown import ShownImages, read_images
from .tasks import Inpainting, SuperResolution

__all__ = [
    "OF_IMAGES", "Apply", "Conditioner", "Conditioners", "Draws", "Inpainting", "Label", "ShownImages", "Sinusoids",
    "SuperResolution", "TextContext", "make_conditioners", "names_code", "read_images", "unconditional",
]

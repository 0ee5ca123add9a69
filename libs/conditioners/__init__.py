"""Conditioners: from images, labels, texts or a user's own tensors to what a network is given beside x and t."""

from .adapters import Apply, Conditioner, Draws, Label, Sinusoids
from .compose import OF_IMAGES, OF_TEXTS, Conditioners, make_conditioners, names_code, names_texts
from .fields import GivenFields, data_field, read_given
from .shown import Shown, read_images
from .tasks import Inpainting, SuperResolution
from .texts import TextContext, TextVector

__all__ = [
    "OF_IMAGES", "OF_TEXTS", "Apply", "Conditioner", "Conditioners", "Draws", "GivenFields", "Inpainting", "Label",
    "Shown", "Sinusoids", "SuperResolution", "TextContext", "TextVector", "data_field", "make_conditioners",
    "names_code", "names_texts", "read_given", "read_images",
]

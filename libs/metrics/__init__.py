"""What is measured about generated images. A metric consumes an iterator of uint8 batches."""

from ..errors import choose
from .features import CIFAR10Features
from .fid import InceptionFeatures
from .statistics import Extractor

EXTRACTORS = {"cifar10_resnet": CIFAR10Features, "inception": InceptionFeatures}


def make_extractor(name: str, **options) -> Extractor:
    """Feature extractor by name.

    options: `weights` (file; None for the default) and `device`; for "inception" also `mode`.
    """
    return choose("metrics.features", name, EXTRACTORS)(**options)

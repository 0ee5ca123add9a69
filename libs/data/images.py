"""Pictures at the border of the project: uint8, height x width x channels."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import atomic_path

BACKGROUND = 255


def save_png(path: str | Path, image: Tensor | np.ndarray) -> None:
    """Write uint8 (h, w, c), c 1 or 3, as a PNG file. Raises UserError where the file cannot be written."""
    pixels = image.cpu().numpy() if isinstance(image, Tensor) else np.asarray(image)
    assert pixels.dtype == np.uint8, pixels.dtype
    assert pixels.ndim == 3, pixels.shape
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    with atomic_path(path) as temporary:
        picture.save(temporary, format="PNG")


def image_grid(images: Tensor | np.ndarray, columns: int, pad: int = 2, upscale: int = 1) -> Tensor:
    """One picture of many: uint8 (n, h, w, c) -> uint8 (H, W, c), row by row, `pad` white pixels around each
    image.

    upscale: every pixel becomes upscale x upscale equal ones (small scans are hard to see otherwise).

    >>> image_grid(torch.zeros(3, 8, 8, 1, dtype=torch.uint8), columns=2, pad=1).shape
    torch.Size([19, 19, 1])
    """
    images = torch.as_tensor(images).cpu()
    assert images.dtype == torch.uint8, images.dtype
    assert images.ndim == 4, images.shape
    images = images.repeat_interleave(upscale, 1).repeat_interleave(upscale, 2)
    n, h, w, c = images.shape
    columns = max(1, min(columns, n))
    rows = -(-n // columns)
    grid = torch.full((pad + rows * (h + pad), pad + columns * (w + pad), c), BACKGROUND, dtype=torch.uint8)
    for i, image in enumerate(images):
        top, left = pad + i // columns * (h + pad), pad + i % columns * (w + pad)
        grid[top : top + h, left : left + w] = image
    return grid

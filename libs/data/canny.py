"""Canny's edges (1986), equal to OpenCV's `cv2.Canny(image, low, high)` pixel for pixel."""

import numpy as np
from scipy import ndimage

TAN_22_5 = 13573  # tan(22.5 degrees), in 1/32768
EVERY_NEIGHBOUR = np.ones((3, 3))


def canny(image: np.ndarray, low: int = 100, high: int = 200) -> np.ndarray:
    """Edges of one image: uint8 (h, w, c) -> uint8 (h, w, 1), 255 on an edge and 0 elsewhere.

    low, high: of the gradient |dx| + |dy| by Sobel's filters, of the channel in which it is largest. An edge is what
        is above `low` and connected to something above `high`.
    """
    pixels = image.astype(np.int64)
    dx, dy = _sobel(pixels, 1), _sobel(pixels, 0)
    strongest = (np.abs(dx) + np.abs(dy)).argmax(2)[..., None]
    dx, dy = (np.take_along_axis(each, strongest, 2)[..., 0] for each in (dx, dy))
    size = np.abs(dx) + np.abs(dy)
    thin = (size > low) & _is_largest_across(size, dx, dy)
    connected, _ = ndimage.label(thin, EVERY_NEIGHBOUR)
    kept = np.unique(connected[thin & (size > high)])
    return np.where(thin & np.isin(connected, kept), 255, 0).astype(np.uint8)[..., None]


def _sobel(pixels: np.ndarray, axis: int) -> np.ndarray:
    """(h, w, c) -> derivative along rows (0) or columns (1), x 8, smoothed along the other."""
    slope = ndimage.correlate1d(pixels, [-1, 0, 1], axis, mode="nearest")
    return ndimage.correlate1d(slope, [1, 2, 1], 1 - axis, mode="nearest")


def _is_largest_across(size: np.ndarray, dx: np.ndarray, dy: np.ndarray) -> np.ndarray:
    """Whether the gradient is larger than at both neighbours in its direction, of which there are four: (h, w) bool."""
    height, width = size.shape
    around = np.pad(size, 1)

    def at(down: int, right: int) -> np.ndarray:
        return around[1 + down:1 + down + height, 1 + right:1 + right + width]

    x, y = np.abs(dx), np.abs(dy) << 15
    level, steep = y < x * TAN_22_5, y > x * TAN_22_5 + (x << 16)  # tan 67.5 = tan 22.5 + 2
    falling = (dx ^ dy) < 0
    diagonal = np.where(falling, (size > at(-1, 1)) & (size > at(1, -1)), (size > at(-1, -1)) & (size > at(1, 1)))
    return np.where(level, (size > at(0, -1)) & (size >= at(0, 1)),
                    np.where(steep, (size > at(-1, 0)) & (size >= at(1, 0)), diagonal))

"""Canny's edges are OpenCV's, pixel for pixel (where OpenCV is installed)."""

import numpy as np
import pytest
from scipy import ndimage

from libs.data.canny import canny

cv2 = pytest.importorskip("cv2")


def pictures():
    """{name: uint8 (h, w, c)}: noise, smooth slopes in all directions, and shapes with ties of the gradient."""
    generator = np.random.default_rng(0)
    noise = generator.integers(0, 256, (61, 47, 3), np.uint8)
    smooth = ndimage.gaussian_filter(generator.normal(size=(96, 80, 3)), (2, 2, 0))
    smooth = np.uint8(255 * (smooth - smooth.min()) / np.ptp(smooth))
    down, right = np.mgrid[:64, :64]
    disc = np.uint8(255 * (np.hypot(down - 31.5, right - 30) < 20))[..., None]
    stairs = np.uint8(32 * ((down + 2 * right) // 24))[..., None]
    checks = np.uint8(255 * ((down // 4 + right // 4) % 2))[..., None]
    return {"noise": noise, "gray noise": noise[..., :1], "smooth": smooth, "disc": disc, "stairs": stairs,
            "checks": checks, "channels that differ": np.concatenate([disc, stairs, checks], 2),
            "one row": noise[:1], "one column": noise[:, :1], "two by two": noise[:2, :2]}


@pytest.mark.parametrize(("low", "high"), [(100, 200), (50, 100), (20, 60), (0, 1), (600, 900), (150, 150)])
@pytest.mark.parametrize("name", pictures())
def test_canny_is_opencvs(name, low, high):
    image = np.ascontiguousarray(pictures()[name])
    theirs = cv2.Canny(image, low, high)
    ours = canny(image, low, high)
    assert ours.dtype == np.uint8
    assert np.array_equal(ours[..., 0], theirs)
    if (name, low) == ("smooth", 20):
        assert 0.01 < (ours > 0).mean() < 0.5  # there is something to compare

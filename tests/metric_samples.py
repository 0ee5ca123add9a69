"""Random images and features for metrics."""

import numpy as np
import torch


def noise(*shape, seed=0):
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def gaussian(n, d, seed=0):
    """n samples of a Gaussian with a random covariance: float64 (n, d)."""
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) / d**0.5 + rng.normal(size=d)

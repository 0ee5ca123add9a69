"""Frechet distance of two Gaussians that were fitted to features (Heusel et al. 2017, Eq. 6)."""

from __future__ import annotations

import dataclasses
import zipfile
import zlib
from pathlib import Path

import numpy as np
import torch
from scipy.linalg.lapack import dpstrf
from torch import Tensor

from ..errors import UserError
from ..files import atomic_path, reason


@dataclasses.dataclass(frozen=True)
class Statistics:
    """Mean and covariance of features.

    mu: float64 (d,). sigma: float64 (d, d), divided by n - 1.
    n: number of images. features: name of the extractor. None where a file does not say.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int | None = None
    features: str | None = None

    @property
    def dim(self) -> int:
        return len(self.mu)

    def save(self, path: str | Path, dtype: type = np.float64) -> None:
        """Write an npz with `mu` and `sigma`, as pytorch-fid and U-ViT do, and with `n` and `features`."""
        extra = {} if self.n is None else {"n": np.int64(self.n)}
        extra |= {} if self.features is None else {"features": np.str_(self.features)}
        with atomic_path(path) as temporary, open(temporary, "wb") as file:
            np.savez_compressed(file, mu=self.mu.astype(dtype), sigma=self.sigma.astype(dtype), **extra)

    @classmethod
    def load(cls, path: str | Path) -> Statistics:
        """Read an npz with `mu` (d,) and `sigma` (d, d). Raises UserError for a missing or different file."""
        try:
            with np.load(path, allow_pickle=False) as file:
                values = {key: file[key] for key in ("mu", "sigma", "n", "features") if key in file}
        # NumPy reports a file that is no npz, or a damaged one, by any of these.
        except (
            OSError,
            ValueError,
            EOFError,
            AttributeError,
            TypeError,
            zipfile.BadZipFile,
            zlib.error,
        ) as error:
            raise UserError(f"feature statistics {path} cannot be read: {reason(error)}") from error
        if not {"mu", "sigma"} <= values.keys():
            raise UserError(f"feature statistics {path} lack the arrays mu and sigma")
        mu, sigma = values["mu"], values["sigma"]
        numbers = all(
            np.issubdtype(array.dtype, np.floating) and np.isfinite(array).all() for array in (mu, sigma)
        )
        if mu.ndim != 1 or sigma.shape != 2 * mu.shape or not numbers:
            shapes = f"mu {mu.shape} and sigma {sigma.shape}"
            raise UserError(f"feature statistics {path}: {shapes} must be finite numbers (d,) and (d, d)")
        n = int(values["n"]) if "n" in values else None
        features = str(values["features"]) if "features" in values else None
        return cls(mu.astype(np.float64), sigma.astype(np.float64), n, features)


class FeatureSums:
    """Sums over features, from which mean and covariance follow.

    Sums of several processes add up to those of one: `sums.state = accelerator.reduce(sums.state, "sum")`.

    features: name of the extractor, kept with the result. device: where the sums are kept.
    """

    def __init__(self, dim: int, features: str | None = None, device: torch.device | str = "cpu"):
        self.dim, self.features = dim, features
        device = "cpu" if torch.device(device).type == "mps" else device  # which has no float64
        # n, sum of f, sum of f f^T
        self.state = torch.zeros(1 + dim + dim * dim, dtype=torch.float64, device=device)

    def update(self, features: Tensor) -> None:
        """Add (b, d) features of any floating type and device."""
        assert features.shape[1:] == (self.dim,), (features.shape, self.dim)
        f = features.to(self.state.device).double()  # b d
        self.state[0] += len(f)
        self.state[1 : 1 + self.dim] += f.sum(0)
        self.state[1 + self.dim :].view(self.dim, self.dim).addmm_(f.T, f)

    def statistics(self) -> Statistics:
        """Mean and covariance of everything added so far. Raises UserError for fewer than two images."""
        state = self.state.cpu().numpy()
        n, total, outer = int(state[0]), state[1 : 1 + self.dim], state[1 + self.dim :]
        if n < 2:
            raise UserError(f"feature statistics need at least 2 images, got {n}")
        mu = total / n
        sigma = (outer.reshape(self.dim, self.dim) - n * np.outer(mu, mu)) / (n - 1)
        return Statistics(mu, sigma, n, self.features)


def frechet_distance(a: Statistics, b: Statistics) -> float:
    """|mu_a - mu_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^(1/2)): the squared 2-Wasserstein distance.

    S_a S_b has the eigenvalues of the symmetric R^T S_b R, where S_a = R R^T, so the trace of the root is the
    sum of the roots of its eigenvalues. Works for covariances of any rank (fewer samples than features).
    """
    assert a.dim == b.dim, (a.dim, b.dim)
    a, b = sorted((a, b), key=lambda s: s.n or np.inf)  # fewer images, lower rank, smaller eigenvalue problem
    factor = _factor(a.sigma)  # d rank
    eigenvalues = np.linalg.eigvalsh(factor.T @ b.sigma @ factor)
    trace_of_root = np.sqrt(eigenvalues.clip(min=0)).sum()
    difference = a.mu - b.mu
    distance = difference @ difference + np.trace(a.sigma) + np.trace(b.sigma) - 2 * trace_of_root
    return max(0.0, float(distance))


def _factor(sigma: np.ndarray) -> np.ndarray:
    """R (d, rank) with R R^T = sigma, by Cholesky with pivots, which stops where only rounding is left."""
    lower, pivots, rank, _ = dpstrf(sigma, lower=1)
    factor = np.empty((len(sigma), rank))
    factor[pivots - 1] = np.tril(lower)[:, :rank]
    return factor

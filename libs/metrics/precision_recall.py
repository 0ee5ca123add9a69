"""Improved precision and recall of generative models (Kynkaanniemi et al. 2019)."""

import torch
from torch import Tensor

from ..errors import UserError

BLOCK = 1 << 25  # entries of one block of the distance matrix: bounds the memory (128 MB in float32)


def precision_recall(real_features: Tensor, fake_features: Tensor, k: int = 3) -> tuple[float, float]:
    """Shares of fake features inside the real manifold (precision) and of real ones inside the fake manifold
    (recall).

    A manifold is the union of balls around its points that reach to each point's k-th nearest neighbour (Eqs.
    1, 2).

    real_features: (n, d). fake_features: (m, d), same floating type. Use equal numbers to compare models.
    Raises UserError unless both hold more than k points.
    """
    if min(len(real_features), len(fake_features)) <= k:
        raise UserError(
            f"precision and recall need more than k={k} images, "
            f"got {len(real_features)} real and {len(fake_features)} generated"
        )
    # Distances do not change, but their rounding errors shrink.
    center = real_features.mean(0)
    real, fake = real_features - center, fake_features - center
    return _share_inside(fake, real, k), _share_inside(real, fake, k)


def _share_inside(points: Tensor, manifold: Tensor, k: int) -> float:
    radii = _neighbour_distances(manifold, k)  # n
    inside = 0
    for block in points.split(max(1, BLOCK // len(manifold))):
        inside += (torch.cdist(block, manifold) <= radii).any(1).sum().item()
    return inside / len(points)


def _neighbour_distances(points: Tensor, k: int) -> Tensor:
    """Distance of each point to its k-th nearest other point: (n,)."""
    radii, start = [], 0
    for block in points.split(max(1, BLOCK // len(points))):
        distances = torch.cdist(block, points)  # rows n
        rows = torch.arange(len(block), device=points.device)
        distances[rows, start + rows] = torch.inf  # not its own neighbour
        radii.append(distances.kthvalue(k, dim=1).values)
        start += len(block)
    return torch.cat(radii)

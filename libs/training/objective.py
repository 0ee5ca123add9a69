"""What a step minimizes: `objective(denoiser, batch) -> (b,)`, one loss an image."""

from collections.abc import Callable

import torch
from torch import Tensor

from ..denoiser import Denoiser
from .batches import Batch

Objective = Callable[[Denoiser, Batch], Tensor]


def training_times(denoiser: Denoiser, batch: Batch) -> Tensor:
    """t (b,), uniform on (0, 1), or on the steps 1/N, 2/N, ..., 1 of a discrete schedule; float64, on the host."""
    t, steps = batch.uniform(), denoiser.schedule.steps
    return t if steps is None else (torch.floor(t * steps) + 1) / steps


def diffusion_loss(denoiser: Denoiser, batch: Batch) -> Tensor:
    """Mean squared error of the network's own output (2006.11239, equation 14, for any prediction): (b,)."""
    return denoiser.loss(batch.x_0, batch.noise(), training_times(denoiser, batch), batch.cond)

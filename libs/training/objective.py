"""What a step minimizes: `objective(denoiser, batch) -> (b,)`, one loss an image.

An objective may have attributes too:

    modules    an nn.Module that learns beside the network, such as a discriminator, from the same loss
    lr_factor  of its learning rate, to the network's
    terms      {name: sum over the rows of the last call}, detached on the device, for the log
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..denoiser import Denoiser
from ..random import Stream
from .batches import Batch

Objective = Callable[[Denoiser, Batch], Tensor]


def training_times(denoiser: Denoiser, batch: Batch, stream: Stream = Stream.TRAIN_TIME) -> Tensor:
    """t (b,), uniform on (0, 1), or on the steps 1/N, 2/N, ..., 1 of a discrete schedule; float64, on the host."""
    t, steps = batch.uniform(stream), denoiser.schedule.steps
    return t if steps is None else (torch.floor(t * steps) + 1) / steps


def diffusion_loss(denoiser: Denoiser, batch: Batch) -> Tensor:
    """Mean squared error of the network's own output (2006.11239, equation 14, for any prediction): (b,)."""
    return denoiser.loss(batch.x_0, batch.noise(), training_times(denoiser, batch), batch.cond)


def beside(objective: Objective) -> nn.Module:
    """What learns beside the network; an empty module for most objectives."""
    modules = getattr(objective, "modules", None)
    return nn.ModuleDict() if modules is None else modules

"""AdamW as U-ViT trains with it, and the learning rate as a pure function of the step."""

from collections.abc import Mapping

import torch
from torch import nn


def learning_rate(step: int, steps: int, lr: float, warmup: int = 0, decay_from: float = 1.0) -> float:
    """Of the update after `step` others: linear from 0 over `warmup` updates, constant, then, from the share
    `decay_from` of all `steps`, linear to 0.

    >>> [learning_rate(step, 10, 1.0, warmup=2, decay_from=0.6) for step in (0, 1, 5, 6, 8, 9)]
    [0.5, 1.0, 1.0, 1.0, 0.5, 0.25]
    """
    rising = min(1.0, (step + 1) / warmup) if warmup else 1.0
    start = decay_from * steps
    falling = (steps - step) / (steps - start) if step > start else 1.0
    return lr * rising * falling


def parameter_groups(net: nn.Module, weight_decay: float) -> list[dict]:
    """All that is trained, in two groups: norms, biases and position embeddings do not decay."""
    named = [(name, parameter) for name, parameter in net.named_parameters() if parameter.requires_grad]
    free = {name for name, parameter in named if parameter.dim() < 2 or "pos_embed" in name}
    return [{"params": [each for name, each in named if name not in free], "weight_decay": weight_decay},
            {"params": [each for name, each in named if name in free], "weight_decay": 0.0}]


def make_optimizer(net: nn.Module, section: Mapping, device: torch.device) -> torch.optim.AdamW:
    """AdamW (1711.05101) of a config's `train` section, in fused kernels where there are any."""
    groups = parameter_groups(net, section["weight_decay"])
    return torch.optim.AdamW(groups, lr=section["lr"], betas=tuple(section["betas"]),
                             fused=device.type in ("cpu", "cuda"))


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: Mapping) -> None:
    """Take over the moments of a checkpoint; rates and kernels stay this run's own."""
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})

"""Uncertainty heads for timing a network that has no trained ones: random, but images leave at all layers.

What such a network samples is worth nothing; how fast it is, and what it costs, is that of trained heads with the same
exits.
"""

from collections.abc import Mapping

import torch
from ml_collections import ConfigDict
from torch import Tensor

from ..backbones.uvit import UViT
from ..build import make_chain, prepare_backbone
from ..contexts import Contexts
from ..generate import Chain
from .watch import every_layer, plain_denoiser, watch

CALLS = 8  # of a loop, whose inputs the biases are fitted to
ITERATIONS = 40  # of bisections


def add_random_heads(net: UViT, config: ConfigDict, description: Mapping, device: torch.device, ratio: float,
                     contexts: Contexts | None = None) -> None:
    """Give `net` fresh heads, at which about a share `ratio` of its layers runs at the config's policy.threshold.

    On the way of a plain loop, each layer but the last lets the same share of the rows that are still there go.
    """
    torch.manual_seed(config.seed)
    net.add_uem_heads("released")
    compute = {**config.compute, "compile": False}
    plain = {**config, "policy": {"name": "full"}, "compute": compute}
    chain = make_chain(plain, prepare_backbone(net, compute, device), description, device, contexts)
    biases = needed_biases(chain, config.policy.threshold)  # layers rows
    leaving = leaving_share(ratio, len(biases))
    there = torch.ones(biases.shape[1], dtype=torch.bool)
    for head, needed in zip(list(net.lte_classifer)[:-1], biases[:-1], strict=True):
        bias = torch.quantile(needed[there], leaving)
        with torch.no_grad():
            head.lte.bias.fill_(float(bias))
        there &= needed > bias


def needed_biases(chain: Chain, threshold: float) -> Tensor:
    """The bias of each layer's head at which a row is just certain enough: (layers, rows of several calls), float64."""
    indices = {round(i * (chain.nfe - 1) / (CALLS - 1)) for i in range(CALLS)}
    seeds = list(range(chain.rows))
    labels = [seed % chain.num_classes for seed in seeds] if chain.num_classes else None
    denoiser, parts = plain_denoiser(chain), []
    for call in watch(chain, indices, seeds, labels):
        _, certainty = every_layer(denoiser, call)  # of heads without biases
        logits = certainty.double().flatten(2).logit(eps=1e-12)
        low, high = torch.full_like(logits[..., 0], -40.0), torch.full_like(logits[..., 0], 40.0)
        for _ in range(ITERATIONS):
            middle = (low + high) / 2
            certain = (logits + middle[..., None]).sigmoid().mean(dim=2) > threshold
            low, high = torch.where(certain, low, middle), torch.where(certain, middle, high)
        parts.append(high.cpu())
    return torch.cat(parts, dim=1)


def leaving_share(ratio: float, layers: int) -> float:
    """The share h of the rows that leaves at each layer but the last where the mean exit layer is ratio * layers:
    sum of (1 - h)^k over k = 0 ... layers - 1.
    """
    low, high = 0.0, 1.0
    for _ in range(ITERATIONS):
        h = (low + high) / 2
        low, high = (h, high) if sum((1 - h) ** k for k in range(layers)) > ratio * layers else (low, h)
    return (low + high) / 2

"""What a network does inside a sampling loop, to be looked at afterwards: its inputs and the layers it left at."""

from collections.abc import Collection
from copy import copy
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..generate import Chain
from ..policies.sites import unwrap


class Call(NamedTuple):
    """One call of the network for b rows: the images, or under guidance the images twice, the conditional rows first.

    index       of the call in the loop, from 0
    t           () its time
    x, cond     what the network was given, (b, c, h, w) and its labels or texts
    exit_layer  (b,) layers that were run; None where the policy runs all
    x_0         (images, c, h, w) what the sampler was told, guided and clipped
    """

    index: int
    t: Tensor
    x: Tensor
    cond: dict[str, Any]
    exit_layer: Tensor | None
    x_0: Tensor


def watch(chain: Chain, indices: Collection[int], seeds: list[int], labels: list[int] | None = None) -> list[Call]:
    """Those calls of the loop that `chain.sample` makes of up to `rows` seeds, padding included."""
    calls: list[Call] = []
    given: list[tuple] = []

    def net(x: Tensor, timesteps: Tensor, **cond) -> Tensor:
        out = chain.policy(x, timesteps, **cond)
        given[:] = [(x, cond, chain.policy.last.get("exit_layer"))]
        return out

    def sampler(denoise, *args, **options) -> Tensor:
        index = count()

        def watched(x_t: Tensor, t: Tensor):
            prediction, now = denoise(x_t, t), next(index)
            if now in indices:
                calls.append(Call(now, t, *given[0], prediction.x_0))
            return prediction

        return chain.sampler(watched, *args, **options)

    own = copy(chain)
    own.denoiser, own.sampler = copy(chain.denoiser), sampler
    own.denoiser.net = net
    own.sample(seeds, labels)
    return calls


def plain_denoiser(chain: Chain) -> Denoiser:
    """The chain's denoiser around the network itself, without policy and uncompiled."""
    denoiser = copy(chain.denoiser)
    denoiser.net = unwrap(chain.policy.net)
    return denoiser


@torch.inference_mode()
def every_layer(denoiser: Denoiser, call: Call) -> tuple[Tensor, Tensor]:
    """Output and certainty after every layer for the rows of a call, each (layers, b, c, h, w) float32.

    denoiser: see `plain_denoiser`.
    """
    out, certainty = denoiser.call(call.x, call.t, call.cond, every_layer=True)
    return out.float(), certainty.float()


def exit_uncertainty(certainty: Tensor, exit_layer: Tensor, images: int) -> Tensor:
    """1 - c of each image's exit layer, the mean over the channels: (images, h, w) of certainties (layers, b, c, h, w).

    Under guidance it is that of the conditional rows.
    """
    rows = torch.arange(images, device=certainty.device)
    return 1 - certainty[exit_layer[:images].to(certainty.device) - 1, rows].mean(dim=1)

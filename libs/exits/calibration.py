"""Whether early exit's certainties are true: on images of a data set, noised to all times.

Of every layer i and image, the mean certainty that its head predicts stands beside two true ones,

    eps_error   1 - tanh|g_i - eps|, how near the layer's prediction is to the network's target
    final_gap   1 - tanh|g_i - g_N|, how near it is to what the last layer N predicts,

means over the image too. A head learns one of them (`early_exit.target`).

A student of few steps is asked at the times at which it samples and nowhere else. And its target at these times is what
its teacher would say, not the noise: eps_error, which is against the data, is large for the best of students, and
final_gap is the one to read.
"""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..denoiser import Denoiser
from ..training.batches import Batch

TRUTHS = {"eps_error": "against the data's noise", "final_gap": "against the last layer"}
TRUTHS_OF_A_STUDENT = {"eps_error": "against the data, which is not what a student learns",
                       "final_gap": "against the last layer: the one to read for a student"}


class Certainties(NamedTuple):
    """Means over each of n images: predicted and true certainties (layers, n), and in which bin they were (n,): of t,
    or at which of a student's times.
    """

    predicted: Tensor
    eps_error: Tensor
    final_gap: Tensor
    bin: Tensor

    def of(self, images: Tensor) -> "Certainties":
        return Certainties(*(each[..., images] for each in self))


def join(parts: Iterable[Certainties]) -> Certainties:
    return Certainties(*(torch.cat(each, dim=-1) for each in zip(*parts, strict=True)))


@torch.inference_mode()
def certainties(denoiser: Denoiser, batch: Batch, bins: int, times: Tensor | None = None) -> Certainties:
    """Those of a batch, on the host, by a denoiser around a network with uncertainty heads.

    Images fall to the `bins` equal parts of (0, 1] in turn, by their positions, and t is uniform within, on the steps
    of a discrete schedule.

    times: (bins,) float64 of a student, which are the bins then: its images are at these times themselves.
    """
    place, steps, eps = batch.positions % bins, denoiser.schedule.steps, batch.noise()
    if times is not None:
        t = times[place]
    else:
        t = (place + batch.uniform()) / bins
        if steps is not None:
            t = (torch.floor(t * steps) + 1) / steps
    target = denoiser.target(batch.x_0, eps, t)
    out, certainty = denoiser.call(denoiser.diffuse(batch.x_0, eps, t), t, batch.cond, every_layer=True)
    out, target = denoiser.scaled(out.float(), t), denoiser.scaled(target, t)
    means = (_mean_per_image(each) for each in (certainty, *((1 - (out - truth).abs().tanh())
                                                             for truth in (target, out[-1]))))
    return Certainties(*means, place)


def _mean_per_image(maps: Tensor) -> Tensor:
    """(layers, b, c, h, w) -> (layers, b)."""
    return maps.flatten(2).mean(dim=2).cpu()


def calibration(held: Certainties, bins: int, times: Tensor | None = None) -> dict[str, Any]:
    """The numbers of a report, over all images and in lists layers x bins.

    bins         [lowest, highest] t of each; twice a student's time
    truths       of each truth, what it is measured against, and for a student which of them to read
    certainty    mean of the predicted ones, and of each truth
    error        mean absolute difference of predicted and true, over images
    correlation  of the two over images (Pearson); None where one of them does not vary
    """
    layers = range(len(held.predicted))
    parts = [held.of(held.bin == bin) for bin in range(bins)]
    ends = [[bin / bins, (bin + 1) / bins] for bin in range(bins)]
    if times is not None:
        ends = [[t, t] for t in times.tolist()]
    found = {"images": len(held.bin), "bins": ends, "truths": TRUTHS if times is None else TRUTHS_OF_A_STUDENT,
             "predicted": [[_mean(part.predicted[i]) for part in parts] for i in layers]}
    for name in TRUTHS:
        pairs = [[(part.predicted[i], getattr(part, name)[i]) for part in parts] for i in layers]
        found[name] = {
            "error": float((held.predicted - getattr(held, name)).abs().mean()),
            "correlation": _correlation(held.predicted.flatten(), getattr(held, name).flatten()),
            "true": [[_mean(true) for _, true in row] for row in pairs],
            "error_of": [[_mean((own - true).abs()) for own, true in row] for row in pairs],
            "correlation_of": [[_correlation(own, true) for own, true in row] for row in pairs],
        }
    return found


def _mean(values: Tensor) -> float | None:
    return float(values.mean()) if len(values) else None


def _correlation(a: Tensor, b: Tensor) -> float | None:
    a, b = (each.double() - each.double().mean() for each in (a, b))
    scale = a.norm() * b.norm()
    return float(a @ b / scale) if scale > 1e-9 * max(1, len(a)) else None


def as_array(table: Sequence[Sequence[float | None]]) -> Tensor:
    """A list layers x bins as a tensor, nan for None."""
    return torch.tensor([[float("nan") if value is None else value for value in row] for row in table])

"""How good the averaged weights are: the metrics of the config's `eval` section on images of fixed seeds."""

import copy

import torch
from ml_collections import ConfigDict

from ..errors import UserError
from ..evaluation import Metrics, Request, score_seeds
from ..generate import Chain
from ..processes import Processes
from ..seeds import parse_labels

RISING = ("precision", "recall", "class_accuracy", "psnr")  # better when larger


class Quality:
    """Scores `train.eval_images` images, seeds 0, 1, ..., shared among the processes; a text model's are made from what
    its chain is shown by the time of a measurement.

    Raises UserError at once for what is missing: a reference, Inception weights.
    """

    def __init__(self, config: ConfigDict, chain: Chain, processes: Processes):
        self.chain, self.processes = chain, processes
        self.seeds = list(range(config.train.eval_images))
        blank = chain.codec.decode(torch.zeros(1, *chain.shape, device=chain.device))  # 1 h w c
        reads = set() if chain.conditioners is None else chain.conditioners.reads
        self._fresh = Metrics(Request(config.eval, len(self.seeds), tuple(blank.shape[1:]), chain.device, config.data,
                                      chain.num_classes, with_reference=processes.is_main, prompts="text" in reads,
                                      shown="image" in reads))

    def measure(self) -> dict[str, float]:
        """{metric: value} on the main process, {} on others."""
        return {name: each["value"] for name, each in score(self._fresh, self.chain, self.seeds,
                                                            self.processes).items()}


def score(fresh: Metrics, chain: Chain, seeds: list[int], processes: Processes) -> dict[str, dict]:
    """What `fresh` metrics, which stay as they are, measure on images of these seeds, labels in turn; the processes
    share the seeds, and all but the main one get {}.

    Raises UserError on all of them where one cannot make its images.
    """
    metrics = copy.deepcopy(fresh)  # they add up; the next measurement starts from nothing
    labels = parse_labels(None, seeds, chain.num_classes)
    label_of = dict(zip(seeds, labels, strict=True)) if labels else None
    failed = None
    try:
        score_seeds(metrics, chain, processes.share(seeds, chain.rows), label_of, bar=processes.is_main)
    except UserError as error:
        failed = error
    if processes.agree(failed is not None):  # for the others would wait for this one
        raise failed or UserError("another process cannot make its images")
    return metrics.compute(processes)


def is_better(values: dict[str, float], best: float | None) -> bool:
    """Whether the first metric beats `best`, its value so far."""
    name, value = next(iter(values.items()))
    return best is None or (value > best if name in RISING else value < best)

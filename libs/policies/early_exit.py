"""AdaDiff's early exit (2309.17074, section 3.3): an image leaves the U-ViT at the layer that is certain enough of it.

Three modes. `per_sample` decides for every image by itself, `batch_mean` for a whole batch as the released code does,
and `schedule` runs a fixed depth a step, found by a calibration or given. `policy.threshold` is a certainty; the
paper's, an uncertainty, is 1 minus it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import torch
from absl import logging
from torch import Tensor, nn

from ..backbones.uvit import UViT
from ..errors import UserError, choose
from .exit_calibration import calibration_exits, depth_quantiles, find_threshold
from .exit_demands import call_thresholds, call_weights
from .exit_record import ExitRecord
from .exit_schedule import depths_of, nearest
from .exit_walk import Walk, truncated
from .full import Full
from .sites import unwrap


@dataclass(frozen=True)
class EarlyExit:
    """Settings of early exit; `attach(net)` puts them to work on a U-ViT.

    mode                 per_sample, batch_mean, schedule
    threshold            certainty (0, 1] above which an image leaves; 1 is the plain network
    target_layer_ratio   layers to run, as a share of all: replaces the threshold by the one that gives it on
                         `calibration_images` images, found before the first loop; 0 takes `threshold`
    by_step              the uncertainty of a call counts by how far an error of its output moves the image in its step
                         of the sampler, `threshold` where that is farthest; else all calls count alike, as published.
                         See `exit_demands`
    check_every          layers between two looks at the certainty, each of which waits for the device once
    compact_from         share of the rows at hand that must have left before the others go on without them; till then
                         they are carried on, which changes nothing of their result
    patience             in-blocks above the threshold, the last of which is the exit; mid and out-blocks are left at
                         once. The released rule, 2, counts over the whole pass: they need not follow each other
    joint                under guidance, both rows of an image leave together, when both are certain; else each by
                         itself, as the released code does. In batch_mean: one mean, or one for each half
    schedule             of mode schedule: see `exit_schedule`; "" calibrates one
    calibration_images   for target_layer_ratio and such a schedule
    quantile             of these images' exit layers in a call, which becomes its depth
    """

    mode: str = "per_sample"
    threshold: float = 0.92
    target_layer_ratio: float = 0.0
    by_step: bool = False
    check_every: int = 1
    compact_from: float = 0.125
    patience: int = 1
    joint: bool = True
    schedule: str = ""
    calibration_images: int = 16
    quantile: float = 0.5

    def __post_init__(self):
        choose("policy.mode", self.mode, MODES)
        if not 0 < self.threshold <= 1:
            raise UserError(f"policy.threshold={self.threshold} must be a certainty above 0, and at most 1 (never)")
        if not 0 <= self.target_layer_ratio <= 1:
            raise UserError(f"policy.target_layer_ratio={self.target_layer_ratio} must be above 0 and at most 1, or 0 "
                            "for none")
        for name in ("check_every", "patience", "calibration_images"):
            if getattr(self, name) < 1:
                raise UserError(f"policy.{name}={getattr(self, name)} must be at least 1")
        for name in ("compact_from", "quantile"):
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"policy.{name}={getattr(self, name)} must lie between 0 and 1")
        if self.schedule and self.mode != "schedule":
            raise UserError(f"policy.schedule={self.schedule!r} belongs to policy.mode=schedule, not to {self.mode}")
        if self.schedule and self.target_layer_ratio:
            raise UserError(f"policy.target_layer_ratio={self.target_layer_ratio}, policy.schedule={self.schedule!r}: "
                            "give one of them")

    @property
    def needs_heads(self) -> bool:
        return not self.schedule and bool(self.threshold < 1 or self.target_layer_ratio)

    def attach(self, net: nn.Module) -> "EarlyExitPolicy":
        """The running policy around `net`. Raises UserError for a network that it cannot leave early."""
        inner = unwrap(net)
        if not isinstance(inner, UViT):
            raise UserError(f"policy.name=early_exit leaves a U-ViT between two blocks; this network is a "
                            f"{type(inner).__name__}")
        if self.needs_heads and inner.lte_classifer is None:
            source = getattr(inner, "checkpoint", None)
            raise UserError(f"policy.mode={self.mode} needs uncertainty heads, which "
                            f"{f'checkpoint={source}' if source else 'this network'} has not; train them by "
                            "train.py --config=configs/NAME.py:early_exit")
        return MODES[self.mode](net, self)


class EarlyExitPolicy(Full):
    """What the modes share: calibration before a loop, and the record of exits after it.

    last        {"exit_layer": blocks that a row's result comes from, from 1, "executed": blocks that were computed for
                it, those after its exit too}, each (b,) int64
    exits       (calls, rows) int64 on the host: exit layers of the present loop, or of the last one
    threshold   the one in force

    A threshold or a schedule that must be found is found before the first loop of the chain that `prepare` was told of,
    and again whenever the weights have changed since, as they do between the previews of a training.
    """

    def __init__(self, net: nn.Module, settings: EarlyExit):
        super().__init__(net)
        self.settings, self.inner = settings, unwrap(net)
        self.layers = self.inner.depth + 1
        self.threshold = settings.threshold
        self.record = ExitRecord(self.layers)
        self.chain: Any = None
        self._weights: int | None = None  # that the calibration was made with
        self._loop: list[tuple[list[int], list[int]]] = []  # exit layers and executed layers of each call

    def prepare(self, chain: Any) -> None:
        self.chain = chain

    def start(self, times: Tensor, rows_per_image: int = 1) -> None:
        self.ready()
        super().start(times, rows_per_image)
        self._loop = []

    def finish(self, count: int) -> None:
        images = self.rows_per_image
        kept = []
        for both in self._loop:
            half = len(both[0]) // images
            rows = [part * half + i for part in range(images) for i in range(count)]
            kept.append(tuple([each[row] for row in rows] for each in both))
        self._loop = kept
        self.record.add(self.exits, torch.tensor([executed for _, executed in kept]), count)

    @property
    def exits(self) -> Tensor:
        return torch.tensor([exits for exits, _ in self._loop])

    def stats(self) -> dict:
        """Of the images of finished loops, padded rows left out: how many, the layers that their results come from
        (layer_ratio) and the layers computed (executed_ratio), as shares of all layers.
        """
        return {**super().stats(), **self.record.stats()}

    def report(self, processes: Any = None) -> dict:
        """`stats` of the images, with the threshold in force, the schedule (depths, or None), for each call of the
        loop the `histogram` of exit layers (column 0 is layer 1) and their `spread`, the standard deviation over
        the images.
        """
        record = self.record if processes is None else self.record.total(processes)
        return {**record.report(), "threshold": self.threshold, "schedule": None}

    def ready(self) -> None:
        """Calibrate, if there is something to be found, and it was not yet for the present weights."""
        weights = sum(parameter._version for parameter in self.inner.parameters())
        if self._calibrates() and weights != self._weights:
            logging.info("early exit: calibrating on %d images", self.settings.calibration_images)
            self._calibrate()
            self._weights = weights

    def _calibrate(self) -> None:
        """Find the threshold of the target ratio."""
        wanted = self.settings.target_layer_ratio
        self.threshold, ratio = find_threshold(lambda threshold: self._ratio(self._exits_at(threshold)), wanted)
        logging.info("early exit: threshold %.5f for a layer ratio of %.3f, %g was asked for", self.threshold, ratio,
                     wanted)

    def _calibrates(self) -> bool:
        return bool(self.settings.target_layer_ratio)

    def _exits_at(self, threshold: float, mode: str | None = None) -> Tensor:
        if self.chain is None:
            raise UserError("policy: a calibration samples images, so it needs a chain; make it by build.make_chain")
        settings = replace(self.settings, mode=mode or self.settings.mode, threshold=threshold, target_layer_ratio=0.0)
        return calibration_exits(self.chain, settings.attach(self.inner), self.settings.calibration_images)

    def _ratio(self, exits: Tensor) -> float:
        return exits.double().mean().item() / self.layers

    def _note(self, exits: list[int], executed: list[int]) -> None:
        """One call: the exit layers of its rows, and the blocks computed for them."""
        self.calls += 1
        self.rows += len(exits)
        self._loop.append((exits, executed))


class PerSample(EarlyExitPolicy):
    """Every image leaves by itself; the output head runs for the rows that leave alone.

    A compiled network has its blocks compiled one by one. What a CUDA graph gives does not outlive the next one's run,
    so a network that was compiled into these (compute.compile_mode) is for the mode `schedule`;
    `build.make_chain` refuses it here.
    """

    def __init__(self, net: nn.Module, settings: EarlyExit):
        super().__init__(net, settings)
        compiled = compiler_of(net)
        self.blocks = [compiled(block) for block in self.inner.block_list()]
        self.checks = range(settings.check_every, self.layers, settings.check_every)
        self.certainty: Callable[..., list[float]] | None = None  # by the heads as they are in the present loop
        self.weights: Tensor | None = None  # of the calls of the chain's loop
        self.thresholds: list[float] = []  # of the present loop's calls, where they differ

    def prepare(self, chain: Any) -> None:
        super().prepare(chain)
        if self.settings.by_step:
            self.weights = call_weights(chain)

    def start(self, times: Tensor, rows_per_image: int = 1) -> None:
        super().start(times, rows_per_image)
        if self.threshold < 1:
            self.certainty = self.inner.mean_certainty()
        if self.settings.by_step:
            if self.weights is None:
                raise UserError("policy.by_step follows the steps of a sampler, so it needs a chain; make it by "
                                "build.make_chain")
            thresholds = call_thresholds(self.threshold, self.weights).tolist()
            self.thresholds = list(nearest(thresholds, self.chain.denoiser.time_input(self.chain.times), times))

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                 **more: Tensor) -> Tensor:
        if self.threshold >= 1:
            out, exits = self.net(x, timesteps, y=y, context=context, **more), [self.layers] * len(x)
            executed = exits
        else:
            net, settings = self.inner, self.settings
            walk = Walk(net, net.embed(x, timesteps, y, context, **more), net.uem_time(timesteps),
                        self.certainty, self.sure(len(x)), settings.patience, settings.compact_from)
            out, exits, executed = walk.run(self.blocks, self.checks)
        self._note(exits, executed)
        self.last = {"exit_layer": torch.tensor(exits).to(x.device, non_blocking=True),
                     "executed": torch.tensor(executed).to(x.device, non_blocking=True)}
        return out

    def demanded(self) -> float:
        """The threshold of the present call."""
        return self.thresholds[len(self._loop)] if self.settings.by_step else self.threshold

    def sure(self, rows: int) -> Callable[[list[float]], list[bool]]:
        """Which rows are certain enough, by the mean certainty of each, in a call of so many."""
        pairs, threshold = self.rows_per_image == 2 and self.settings.joint, self.demanded()

        def decide(certainty: list[float]) -> list[bool]:
            sure = [each > threshold for each in certainty]
            half = len(sure) // 2
            return [all(both) for both in zip(sure[:half], sure[half:], strict=True)] * 2 if pairs else sure

        return decide


class BatchMean(PerSample):
    """The released code's rule, for parity: the mean certainty of the whole batch decides for all of its rows.

    So an image depends on its batch mates, the rows that pad the last batch of a run included, and GMACs are those of a
    batch of `eval.cost_images` images.
    """

    def sure(self, rows: int) -> Callable[[list[float]], list[bool]]:
        # The released code calls the two halves of a guided pair one after the other.
        group = rows // 2 if self.rows_per_image == 2 and not self.settings.joint else rows
        threshold = self.demanded()

        def decide(certainty: list[float]) -> list[bool]:
            means = [fmean(certainty[i:i + group]) for i in range(0, len(certainty), group)]
            return [mean > threshold for mean in means for _ in range(group)]

        return decide


class Scheduled(EarlyExitPolicy):
    """A fixed depth for every call of a loop: no head is asked, and nothing waits for the device.

    A compiled network has one more compiled function for each depth in use, compiled in the same mode, CUDA graphs
    included: under compute.compile_mode=reduce-overhead each depth replays one of its own. Their results are copied by
    the denoiser. (That has been tested with a counting compiler on a CPU; it has not run on a GPU.)
    """

    def __init__(self, net: nn.Module, settings: EarlyExit):
        super().__init__(net, settings)
        self.depths: tuple[int, ...] = ()  # of the present loop's calls
        self.schedule: tuple[int, ...] | None = None
        self.made_for: Tensor | None = None  # the times of the schedule
        self._compiled = compiler_of(net)
        self._to_depth: dict[int, Callable[..., Tensor]] = {self.layers: net}
        if settings.schedule:
            depths_of(settings.schedule, self.layers)

    def prepare(self, chain: Any) -> None:
        super().prepare(chain)
        self.made_for = chain.denoiser.time_input(chain.times)
        if self.settings.schedule:
            self.schedule = depths_of(self.settings.schedule, self.layers, self.made_for)

    def start(self, times: Tensor, rows_per_image: int = 1) -> None:
        """Times other than the chain's get the depths of the nearest ones."""
        super().start(times, rows_per_image)
        if self.chain is None:
            self.schedule, self.made_for = depths_of(self.settings.schedule, self.layers, times), times
        self.depths = nearest(self.schedule, self.made_for, times)

    def _calibrate(self) -> None:
        if self.settings.target_layer_ratio:
            super()._calibrate()
        self.schedule = self._schedule_at(self.threshold)
        logging.info("early exit: %.2f of the layers, by a schedule of %d calls",
                     sum(self.schedule) / (len(self.schedule) * self.layers), len(self.schedule))

    def __call__(self, x: Tensor, timesteps: Tensor, y: Tensor | None = None, context: Tensor | None = None,
                 **more: Tensor) -> Tensor:
        depth = self.depths[len(self._loop)]
        if depth not in self._to_depth:
            self._to_depth[depth] = self._compiled(truncated(self.inner, depth))
        out = self._to_depth[depth](x, timesteps, y=y, context=context, **more)
        exits = [depth] * len(x)
        self._note(exits, exits)
        self.last = dict.fromkeys(("exit_layer", "executed"), torch.full((len(x),), depth, device=x.device))
        return out

    def report(self, processes: Any = None) -> dict:
        found = {} if not self.settings.schedule else {"threshold": None}
        return {**super().report(processes), "schedule": self.schedule and list(self.schedule), **found}

    def _calibrates(self) -> bool:
        return not self.settings.schedule

    def _exits_at(self, threshold: float, mode: str | None = None) -> Tensor:
        return super()._exits_at(threshold, "per_sample")

    def _schedule_at(self, threshold: float) -> tuple[int, ...]:
        return depth_quantiles(self._exits_at(threshold), self.settings.quantile)

    def _ratio(self, exits: Tensor) -> float:
        return super()._ratio(torch.tensor(depth_quantiles(exits, self.settings.quantile)))


def compiler_of(net: nn.Module) -> Callable:
    """Compiles a part of `net` the way that `net` itself was; leaves it as it is where `net` was not."""
    return getattr(net, "dynamo_ctx", None) or (lambda part: part)


MODES = {"per_sample": PerSample, "batch_mean": BatchMean, "schedule": Scheduled}

"""Trajectories of a frozen UNet: what the adaptors of Clockwork learn from, without any images (2312.08128, 3.3).

The whole sampler runs from pure noise with the network in full at every step, and hooks note what goes into the deep
part and what comes out of it. A trajectory is a function of its seed, so none is ever written to disk.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import Tensor, nn

from ..adaptors import DeepFeatures
from ..build import load_chain
from ..errors import UserError, choose
from ..policies.clockwork import Clockwork
from ..policies.hooks import Deep, Mode, attach
from ..policies.sites import Sites, deep_sizes, sites, unwrap
from ..processes import Processes
from ..prompts import prompts_id, prompts_of
from ..seeds import parse_labels

FIRST_SEED = 2**62  # training draws its seeds from here on; evaluations, which count from 0, never get there


@dataclass(frozen=True)
class Teacher:
    """A frozen network and the way it is sampled.

    net      the UNet itself
    denoise  `denoise(seeds)` runs the whole sampler for exactly `rows` seeds, each with its own label or prompt
    rows     images in one call of the network
    steps    calls of the network in a trajectory
    network  what the network is, sampler: how it is sampled; both as JSON
    """

    net: nn.Module
    denoise: Callable[[list[int]], Any]
    rows: int
    steps: int
    network: dict[str, Any]
    sampler: dict[str, Any]


def chain_teacher(config: ConfigDict, checkpoint: str | None, device: torch.device, overrides) -> Teacher:
    """The model of a chain's config, classes in turn. A student's checkpoint brings its sampler along."""
    chain, path = load_chain(config, checkpoint, device, overrides)
    return Teacher(_frozen(chain.policy.net),
                   lambda seeds: chain.sample(seeds, parse_labels(None, seeds, chain.num_classes)),
                   chain.rows, chain.nfe, {**config.backbone.to_dict(), "checkpoint": Path(path).name},
                   config.sampler.to_dict())


def pipeline_teacher(config: ConfigDict, prompts: list[str], device: torch.device, overrides=()) -> Teacher:
    """The UNet of a diffusers pipeline, seed i with prompt i modulo their number. Nothing is decoded to images."""
    from ..pipelines.sampling import PipelineSampler

    if config.pipeline.name == "controlnet":
        raise UserError("pipeline.name='controlnet': train the adaptor on the plain pipeline (configs/sd15.py), whose "
                        "UNet is the same")
    section, source = config.pipeline, PipelineSampler(config, prompts, device, chosen=overrides)
    options = {"num_inference_steps": section.steps, "guidance_scale": section.guidance,
               "height": section.height or None, "width": section.width or None, "output_type": "latent"}
    if section.negative_prompt:
        options["negative_prompt"] = [section.negative_prompt] * source.rows

    def denoise(seeds: list[int]) -> None:
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        source.pipe(prompt=prompts_of(seeds, prompts), generator=generators, **options)

    sampler = {name: section[name] for name in ("scheduler", "steps", "guidance", "negative_prompt", "height", "width")}
    return Teacher(_frozen(source.pipe.unet), denoise, source.rows, source.nfe,
                   {"name": type(unwrap(source.pipe.unet)).__name__, "checkpoint": Path(section.path).name},
                   sampler | {"prompts_sha256": prompts_id(prompts)})


def _frozen(net: nn.Module) -> nn.Module:
    return unwrap(net).eval().requires_grad_(False)


def deep_part(net: nn.Module, depth: int) -> tuple[int, dict[str, int], nn.Module]:
    """(depth, channels of r_in, r_out and the time embedding, the block that hands back r_out) at a depth of a UNet.

    depth: 0 is the network family's own. Raises UserError for a depth or a network that the learned adaptors cannot
    serve.
    """
    parts: Sites = sites(net)
    if parts.time_token is not None:
        raise UserError("distill.name='clockwork_adaptor': learned adaptors are made for UNets, not for a "
                        f"{type(net).__name__}; with it use :clockwork and policy.adaptor=identity or extrapolation")
    depth = depth or parts.depth
    choose("distill.depth", depth, range(1, len(parts.decoder)))
    block = parts.decoder[-1 - depth]
    if not getattr(block, "upsamplers", None):
        raise UserError(f"distill.depth={depth}: the {type(block).__name__} there has no upsampler to cut before")
    return depth, deep_sizes(net, parts, depth), block


class Recorder(Deep):
    """Notes r_in, r_out before the upsampler, and the time embedding of every call, and changes nothing."""

    def __init__(self, block: nn.Module):
        super().__init__(Mode(), block, "before", adaptor=None)
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []
        attach(block, self, "recorder")
        attach(self.upsamplers[0], self.capture, "recorder_capture")

    def new_forward(self, module: nn.Module, *args, **kwargs):
        out = self.run(*args, **kwargs)
        self._note(self._argument("res_hidden_states_tuple", args, kwargs)[0], self._argument("temb", args, kwargs))
        return out

    @torch.compiler.disable
    def _note(self, r_in: Tensor, temb: Tensor) -> None:
        self.calls.append((r_in, self.capture.take(), temb))


class Trajectories:
    """The newest `rounds_kept` rounds of trajectories, in the device's memory; a ring that each new round goes on in.

    Every row of the network's calls is a trajectory of its own, so that guidance gives two for a seed. Several
    processes share the seeds of a round, and each keeps its own.

    teacher, block   where they come from, see `deep_part`
    section          the config's `distill`: trajectories (a round, over all processes), rounds_kept
    seed             of the training

    r_in (n, s, c_in, h, w), r_out (n, s, c_out, h, w), temb (n, s, d) for n trajectories of s steps, in the precision
    of the network; count: how many of the n are filled,
    newest: those of the last round.
    """

    def __init__(self, teacher: Teacher, block: nn.Module, section: ConfigDict, seed: int, processes: Processes):
        self.teacher, self.recorder = teacher, Recorder(block)
        self.section, self.seed, self.processes = section, seed, processes
        self.r_in = self.r_out = self.temb = torch.empty(0)
        self.count, self.newest = 0, range(0)

    def seeds(self, number: int) -> list[int]:
        """This process's seeds of round `number`."""
        a_round = self.section.trajectories
        first = FIRST_SEED + (self.seed % 2**29) * 2**32 + number * a_round
        return list(range(first, first + a_round))[self.processes.rank::self.processes.count]

    def draw(self, number: int) -> Iterator[int]:
        """Make round `number`, in place of the oldest; yields the number of its seeds done, group by group.

        Nothing of a round counts until its iteration is over.
        """
        seeds, rows = self.seeds(number), self.teacher.rows
        groups = []
        for start in range(0, len(seeds), rows):
            groups.append(self.record(seeds[start:start + rows]))
            yield min(start + rows, len(seeds))
        news = [torch.cat(each) for each in zip(*groups, strict=True)]
        size, kept = len(news[0]), self.section.rounds_kept
        if not self.count:
            self.r_in, self.r_out, self.temb = (each.new_empty(kept * size, *each.shape[1:]) for each in news)
        place = number % kept * size
        for held, new in zip((self.r_in, self.r_out, self.temb), news, strict=True):
            held[place:place + size] = new
        self.count = min(self.count + size, kept * size)
        self.newest = range(place, place + size)

    @torch.no_grad()
    def record(self, seeds: list[int]) -> list[Tensor]:
        """[r_in, r_out, temb] of up to `rows` seeds, as above."""
        rows, calls = self.teacher.rows, self.recorder.calls
        self.teacher.denoise([*seeds, *[seeds[-1]] * (rows - len(seeds))])
        called = len(calls)
        found = [torch.stack(each, dim=1) for each in zip(*calls, strict=True)]  # (guidance x rows) s ...
        calls.clear()
        if called != self.teacher.steps:
            raise UserError(f"the sampler called its UNet {called} times in {self.teacher.steps} steps; an adaptor "
                            "learns from samplers with one call a step")
        return [each.unflatten(0, (-1, rows))[:, :len(seeds)].flatten(0, 1) for each in found]


def reuse_runs(clockwork: Clockwork, steps: int) -> list[range]:
    """The steps between full ones, run by run; the step before each run is full.

    >>> reuse_runs(Clockwork(clock=3), 8)
    [range(1, 3), range(4, 6), range(7, 8)]
    """
    full = [clockwork.is_full(i, steps) for i in range(steps)] + [True]
    starts = [i for i in range(1, steps) if full[i - 1] and not full[i]]
    return [range(i, full.index(True, i)) for i in starts]


def unrolled_error(adaptor: nn.Module, data: Trajectories, runs: Sequence[range],
                   places: Tensor) -> tuple[Tensor, Tensor, int]:
    """(sum of squares that the adaptor misses, the same of the identity adaptor, number of elements).

    places: (b,) int64 on the host; trajectory * len(runs) + run. Each run is unrolled from its full step.
    """
    n, run = places // len(runs), places % len(runs)
    first, stop = (torch.tensor([getattr(each, end) for each in runs])[run] for end in ("start", "stop"))
    r_key, r_in_key = data.r_out[n, first - 1].float(), data.r_in[n, first - 1].float()  # b c h w
    r_hat = r_key
    learned, identity, elements = r_key.new_zeros(()), r_key.new_zeros(()), 0
    for k in range(max(map(len, runs))):
        on = first + k < stop  # the last run may be shorter than the others
        if not on.all():
            n, first, stop = n[on], first[on], stop[on]
            r_key, r_in_key, r_hat = (each[on.to(each.device)] for each in (r_key, r_in_key, r_hat))
        t = first + k
        r_hat = adaptor(DeepFeatures(r_in=data.r_in[n, t].float(), r_in_key=r_in_key, r_prev=r_hat, r_key=r_key,
                                     temb=data.temb[n, t].float()))
        r_out = data.r_out[n, t].float()
        learned = learned + (r_out - r_hat).square().sum()
        identity = identity + (r_out - r_key).square().sum()
        elements += r_out.numel()
    return learned, identity, elements

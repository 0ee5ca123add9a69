"""What a training step with AdaDiff's layer-wise loss costs, beside a plain step of the same U-ViT.

    python -m libs.training.early_exit_speed --config=configs/cifar10_uvit_tiny.py --batch_size=16 \\
        --out=assets/results/exits/training_cpu.json

A step is forward pass, backward pass and optimizer update. Both kinds run in turns in one run, on one network with
fresh weights: a busy machine slows both. Prints JSON: `time_ratio` is the median over the rounds of the layer-wise
step's seconds over the plain step's, `memory_ratio` that of their peak memory, weights, gradients and the optimizer's
moments included: what torch has allocated, by its own books (a CPU library's scratch memory is not in them). `goals`
are the most that these should be, and `met` says which of them are.
"""

import itertools
import json
import sys
import time
from collections.abc import Callable, Mapping
from statistics import median
from typing import Any

import torch
from absl import flags as absl_flags
from torch import nn
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .. import cli
from ..backbones.recompute import recompute_activations
from ..benchmark import PeakMemory, synchronize
from ..build import make_denoiser, prepare_backbone
from ..files import require_json, write_json
from ..markdown import markdown_table
from ..methods import METHODS, apply_methods
from ..provenance import machine, origin
from ..random import Stream, normal
from .batches import Batch
from .objective import Objective, diffusion_loss
from .optimizer import make_optimizer
from .setup import choose_precision, make_objective, start_network

WARM_UP = 2  # rounds
GOALS = {"time_ratio": 1.35, "memory_ratio": 1.1}  # at most
FLAGS = ("batch_size", "repeats", "out")


def define_flags(fv) -> None:
    absl_flags.DEFINE_integer("batch_size", 16, "images in a step", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("repeats", 7, "rounds that count", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_string("out", None, "file for the result (.json)", flag_values=fv)


def random_batch(config, net: nn.Module, size: int, device: torch.device) -> Batch:
    """Noise in the shapes of a training batch of a U-ViT."""
    positions = torch.arange(size)
    keys, cond = positions.to(device), {}
    x_0 = normal(keys, 0, (net.in_chans, net.img_size, net.img_size), Stream.START).clamp(-1, 1)
    if net.num_classes > 0:
        cond["y"] = keys % net.num_classes
    if net.num_clip_token:
        cond["context"] = normal(keys, 1, (net.num_clip_token, net.context_embed.in_features), Stream.START)
    return Batch(x_0, cond or None, positions, config.seed, 0)


def peak_bytes(step: Callable[[], None], device: torch.device) -> int:
    """The most memory that torch had allocated in a step, beyond what it had before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        with PeakMemory(device) as memory:
            step()
        return int(memory.mib * 2**20) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [event for event in recorded.profiler.kineto_results.events()
              if event.name() == "[memory]" and event.device_type() == DeviceType.CPU]
    sizes = (event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
    return max(itertools.accumulate(sizes), default=0)


def measure(config, batch_size: int, repeats: int, device: torch.device) -> dict[str, Any]:
    """Median seconds and peak memory of both kinds of step, and their ratios."""
    precision = choose_precision(config)
    net, description = start_network(config, None)
    net = prepare_backbone(net, {**config.compute, "compile": False}, device).train()
    if config.train.grad_checkpoint:
        recompute_activations(net)
    called = torch.compile(net) if config.compute.compile else net
    denoiser = make_denoiser(called, description, precision, device)
    optimizer = make_optimizer(net, config.train, device)
    batch = random_batch(config, net, batch_size, device)

    def step(objective: Objective) -> Callable[[], None]:
        def run() -> None:
            optimizer.zero_grad(set_to_none=True)
            objective(denoiser, batch).mean().backward()
            optimizer.step()
        return run

    layerwise = make_objective(config, net, description, precision, device)
    steps = {"plain": step(diffusion_loss), "early_exit": step(layerwise)}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(WARM_UP + repeats):
        for name, run in steps.items():
            synchronize(device)
            start = time.perf_counter()
            run()
            synchronize(device)
            seconds[name].append(time.perf_counter() - start)
    seconds = {name: times[WARM_UP:] for name, times in seconds.items()}
    optimizer.zero_grad(set_to_none=True)
    held = sum(each.nbytes for each in net.state_dict().values()) + sum(
        each.nbytes for moments in optimizer.state.values() for each in moments.values())
    mib = {}
    for name, run in steps.items():
        mib[name] = (held + peak_bytes(run, device)) / 2**20
        optimizer.zero_grad(set_to_none=True)
    return {"time_ratio": median(b / a for a, b in zip(*seconds.values(), strict=True)),
            "memory_ratio": mib["early_exit"] / mib["plain"],
            "seconds": {name: median(times) for name, times in seconds.items()}, "peak_memory_mib": mib,
            "batch_size": batch_size, "precision": precision, "compile": config.compute.compile,
            "grad_checkpoint": config.train.grad_checkpoint, "repeats": repeats, "machine": machine(device)}


def table(result: Mapping[str, Any]) -> str:
    """The Markdown table of a result file: both ratios, each beside its goal."""
    seconds, mib = result["seconds"], result["peak_memory_mib"]
    rows = [("seconds", seconds, ".2f", "time_ratio"), ("peak memory, MiB", mib, ",.0f", "memory_ratio")]
    return markdown_table({"of a training step": name, "plain": format(held["plain"], form),
                           "with the layer-wise loss": format(held["early_exit"], form),
                           "ratio": f"{result[ratio]:.3f}", "goal": f"<= {result['goals'][ratio]:g}",
                           "met": "yes" if result["met"][ratio] else "no"}
                          for name, held, form, ratio in rows)


def speed(config, flags) -> int:
    require_json(flags.out)
    if "early_exit" not in config:
        with config.unlocked():
            apply_methods(config, "early_exit", METHODS)
    found = measure(config, flags.batch_size, flags.repeats, cli.choose_device(config.compute.device))
    result = {**found, "goals": GOALS, "met": {name: found[name] <= most for name, most in GOALS.items()},
              "config": flags.config, **origin("-m libs.training.early_exit_speed", config, flags, FLAGS)}
    sys.stdout.write(json.dumps(result, indent=1) + "\n")
    if flags.out:
        write_json(flags.out, result)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(speed, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

"""What an update of progressive distillation costs beside the network passes that it cannot do without.

    python -m libs.distillation.speed --config=configs/cifar10_unet.py --batch_size=64 --out=outputs/distillation.json

Two teacher passes without gradients, a student's forward and backward pass, and the whole objective with its backward
pass (optimizer and EMA apart, as they are training's), in turns in one run: a busy machine slows all of them. The ratio
is that of the whole to the sum of its passes, the median over rounds. A guided teacher's pass has two rows an image.

Memory: the most that tensors take in an update of distillation and in one of training, weights included, beside one
copy of the weights in the precision of the passes, which is what a teacher may cost more.
"""

import copy
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from statistics import median

import torch
from absl import flags as absl_flags
from torch import nn

from .. import cli
from ..benchmark import synchronize
from ..build import load_model, make_denoiser
from ..files import require_json, write_json
from ..methods import METHODS, apply_methods
from ..peak_tensors import PeakTensors
from ..provenance import machine, origin
from ..random import Stream, normal
from ..training import Batch, choose_precision, diffusion_loss
from .stages import Stage, stage_config
from .student import hold, prepare_halving

WARM_UP = 2  # rounds

FLAGS = ("checkpoint", "batch_size", "steps", "repeats", "out")


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "the teacher; the config's own unless given", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 64, "images in an update", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("steps", 8, "of the student", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("repeats", 7, "rounds that count", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_string("out", None, "file for the result (.json)", flag_values=fv)


def measure(config, checkpoint: str | None, steps: int, batch_size: int, repeats: int, device) -> dict:
    """Median seconds of each pass, and the ratio."""
    held_net, held = load_model(config, checkpoint)
    precision = choose_precision(config)
    own = stage_config(config, Stage(steps, 1, config.train.lr, 0.0))
    batch = random_batch(held, batch_size, config.seed, 0, device)
    training, copied = training_memory(config, held_net, held, batch, precision, device)
    net, description, halving = prepare_halving(own, held_net, held, precision, device)
    net = net.to(device).train()
    student = make_denoiser(torch.compile(net) if config.compute.compile else net, description, precision, device)
    del held_net
    x_0, t = batch.x_0, halving.ts[2 * (batch.positions % steps) + 2]
    taught_by, taught, cond = halving.parts(batch)

    def teacher():
        with torch.no_grad():
            taught_by(x_0, t, taught)

    def learn():
        student(x_0, t, cond).x_0.square().sum().backward()

    def update():
        halving(student, batch).sum().backward()

    seconds = in_turns((teacher, learn, update), net, repeats, device)
    peak = peak_memory(update, nn.ModuleList([net, halving.teacher.net]), device)
    rows = zip(*seconds.values(), strict=True)
    return {"teacher_forward": median(seconds["teacher"]), "student_forward_backward": median(seconds["learn"]),
            "update": median(seconds["update"]), "ratio": median(c / (2 * a + b) for a, b, c in rows),
            "memory_mib": {"update": peak, "training": training, "copy_of_the_weights": copied},
            "batch_size": batch_size, "steps": steps, "precision": precision, "compile": config.compute.compile,
            "repeats": repeats, "machine": machine(device)}


def training_memory(config, net: nn.Module, description: Mapping, batch: Batch, precision: str,
                    device: torch.device) -> tuple[float | None, float]:
    """(most memory of an update of the model's own training, of one copy of its weights as passes compute), in MiB."""
    learner = copy.deepcopy(net).to(device).train()
    denoiser = make_denoiser(torch.compile(learner) if config.compute.compile else learner, description, precision,
                             device)
    peak = peak_memory(lambda: diffusion_loss(denoiser, batch).sum().backward(), learner, device)
    copied = sum(each.nbytes for each in hold(copy.deepcopy(net), precision).parameters()) / 2**20
    return peak, copied


def peak_memory(update: Callable[[], None], nets: nn.Module, device: torch.device) -> float | None:
    """Most memory of tensors in MiB, weights of `nets` included, once what a first update sets up is there."""
    update()
    nets.zero_grad(set_to_none=True)
    synchronize(device)
    with PeakTensors(nets, device) as memory:
        update()
        synchronize(device)
    nets.zero_grad(set_to_none=True)
    return memory.mib


def in_turns(passes: Sequence[Callable[[], None]], net: nn.Module, repeats: int,
             device: torch.device) -> dict[str, list[float]]:
    """Seconds of each pass by its name, in `repeats` rounds after some to warm up. net: whose gradients are let go."""
    seconds = {each.__name__: [] for each in passes}
    for _ in range(WARM_UP + repeats):
        for each in passes:
            net.zero_grad(set_to_none=True)
            synchronize(device)
            start = time.perf_counter()
            each()
            synchronize(device)
            seconds[each.__name__].append(time.perf_counter() - start)
    return {name: times[WARM_UP:] for name, times in seconds.items()}


def random_batch(description: Mapping, batch_size: int, seed: int, step: int, device: torch.device) -> Batch:
    """A batch as the training loop would give it, of noise in place of images."""
    image, classes = description["image"], description["cond"]["num_classes"]
    positions = torch.arange(batch_size)
    shape = (image["channels"], image["size"], image["size"])
    x_0 = normal(positions.to(device), 0, shape, Stream.START).clamp(-1, 1)
    cond = {"y": (positions % classes).to(device)} if classes else None
    return Batch(x_0, cond, positions, seed, step)


def tell(text: str, result: Mapping, out: str | None) -> None:
    """The result as a line, and as a file where --out names one."""
    sys.stdout.write(f"{text}\n")
    if out:
        write_json(out, result)


def speed(config, flags) -> int:
    if "distill" not in config:
        with config.unlocked():
            apply_methods(config, "progressive", METHODS)
    require_json(flags.out)
    result = measure(config, flags.checkpoint, flags.steps, flags.batch_size, flags.repeats,
                     cli.choose_device(config.compute.device))
    result |= origin("-m libs.distillation.speed", config, flags, FLAGS)
    memory = result["memory_mib"]
    told = "" if memory["update"] is None else (
        f"; {memory['update']:.0f} MiB, training {memory['training']:.0f} and a copy of the weights "
        f"{memory['copy_of_the_weights']:.0f}")
    tell(f"teacher forward {result['teacher_forward']:.3f} s, student forward and backward "
         f"{result['student_forward_backward']:.3f} s, update {result['update']:.3f} s: "
         f"{result['ratio']:.3f} x two of the first and one of the second{told}", result, flags.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(speed, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

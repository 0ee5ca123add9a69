"""What an update of Flash Diffusion costs beside the network passes that it cannot do without.

    python -m libs.distillation.flash_speed --config=configs/cifar10_unet.py:flash --out=outputs/flash_speed.json
    python -m libs.distillation.flash_speed --config=configs/sd15.py:flash --config.compute.precision=bf16 \\
        --batch_size=8 --out=outputs/flash_speed_sd15.json

With configs/sd15.py the network is Stable Diffusion 1.5's UNet with random weights, --width, on --latent x --latent
latents that are noise, as its contexts are: nothing is fetched, and text encoder and autoencoder are left out.

The whole objective of the last stage with its backward pass (optimizer apart, as it is training's) and its bare passes:
the teacher's over the rows of the roll-out, the real and the fake score, the student's with gradient, features of both
images, and the discriminator. Both in turns in one run; the ratio is the median over rounds.
"""

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch
from absl import flags as absl_flags
from torch import Tensor, nn

from .. import cli
from ..backbones.recompute import recompute_activations
from ..benchmark import PeakMemory
from ..build import load_model, make_denoiser
from ..codecs import make_codec
from ..errors import UserError
from ..files import require_json
from ..provenance import machine, origin
from ..random import Stream, normal
from ..training import choose_precision
from .flash import draw_starts
from .flash_training import FlashSetup, check, null_condition
from .speed import in_turns, random_batch, tell

FLAGS = ("checkpoint", "batch_size", "repeats", "width", "latent", "out")


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "the teacher; the config's own unless given", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 16, "images in an update", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("repeats", 5, "rounds that count", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_enum("width", "full", ["full", "small", "tiny"], "of a pipeline's UNet: full is its own size",
                           flag_values=fv)
    absl_flags.DEFINE_integer("latent", 64, "side of a pipeline's latents: pixels / 8", flag_values=fv, lower_bound=8)
    absl_flags.DEFINE_string("out", None, "file for the result (.json)", flag_values=fv)


@dataclass(frozen=True)
class Subject:
    """What is trained.

    net, held   the teacher's network on the CPU, and its description
    start       where it came from
    null        see `flash_training.null_condition`
    shown       number of images -> their conditions on the CPU, of a network of texts
    """

    net: nn.Module
    held: Mapping[str, Any]
    start: str
    null: Callable[[dict], dict] | None
    shown: Callable[[int], dict[str, Tensor]] | None = None


def of_chain(config, checkpoint: str | None) -> Subject:
    """The checkpoint's network. Raises UserError for conditions that noise cannot stand for."""
    start = str(checkpoint or config.checkpoint)
    net, held = load_model(config, start)
    if held["cond"]["kind"] not in ("none", "label"):
        raise UserError(f"cond.kind={held['cond']['kind']!r}: only models of classes, or without conditions, are "
                        "timed, and configs/sd15.py:flash")
    return Subject(net, held, start, null_condition(held["cond"], None))


def of_pipeline(config, width: str, latent: int) -> Subject:
    """Stable Diffusion 1.5's UNet with random weights. Its latents stand in the place of pixels."""
    from ..pipelines import untrained  # diffusers takes seconds to import
    from ..pipelines.model import describe_scheduler
    from ..pipelines.networks import StableDiffusionNet

    name = config.pipeline.name
    if name != "sd15":
        raise UserError(f"--config=configs/{name}.py:flash: of pipelines only sd15 has a network with random weights; "
                        "use --config=configs/sd15.py:flash")
    if latent % 8:
        raise UserError(f"--latent={latent} must be a multiple of 8")
    net = untrained.unet(width)
    schedule, denoiser = describe_scheduler(untrained.text_to_image(net, 1)[0].scheduler)
    held = {"backbone": {"name": "pipeline"}, "schedule": schedule, "denoiser": denoiser,
            "cond": {"kind": "text", "num_classes": 0, "null_label": -1, "drop": 0.0}, "codec": {"name": "pixel"},
            "image": {"size": latent, "channels": net.config.in_channels}}

    def texts(count: int, seed: int = 0) -> Tensor:
        return normal(torch.arange(count), seed, (untrained.TOKENS, untrained.CROSS), Stream.START)

    return Subject(StableDiffusionNet(net), held, f"{name}, {width} width, random weights",
                   lambda cond: {"context": texts(1, 1).to(cond["context"]).expand_as(cond["context"])},
                   lambda count: {"context": texts(count)})


def measure(config, subject: Subject, batch_size: int, repeats: int, device) -> dict:
    """Median seconds of update and passes, their ratio, the rows that the teacher sees, and the peak memory."""
    stages = check(config, 1)
    net, held, start = subject.net, subject.held, subject.start
    precision = choose_precision(config)
    codec = make_codec(held["codec"], device)
    setup = FlashSetup(config, stages, net, held, start, codec, subject.null, precision, device)
    net = setup.student.to(device).train()
    if config.train.grad_checkpoint:
        recompute_activations(net)
    flash, teacher = setup.objective, setup.teacher
    student = make_denoiser(torch.compile(net) if config.compute.compile else net, setup.description, precision, device)
    batch = random_batch(held, batch_size, config.seed, sum(stage.updates for stage in stages), device)
    if subject.shown is not None:
        batch = replace(batch, cond={name: each.to(device) for name, each in subject.shown(batch_size).items()})
    stage, starts = stages[-1], draw_starts(stages[-1], batch, flash.start_per)
    times = flash.grids[stage.steps]
    guided = 1 if stage.guidance == (1, 1) else 2
    rollout = [int((starts <= i).sum()) * guided for i in range(int(starts.min()), stage.steps)]
    x, cond = torch.cat([batch.x_0] * 2), batch.cond and {name: torch.cat([each] * 2)
                                                          for name, each in batch.cond.items()}
    t, discriminator = times[starts], flash.modules
    if discriminator is not None:
        discriminator.to(device)

    def run(net, rows: int) -> torch.Tensor:
        return net(x[:rows], times[stage.steps // 2], cond and {name: each[:rows] for name, each in cond.items()}).x_0

    def passes():
        with torch.no_grad():
            for rows in rollout if stage.distil else ():
                run(teacher, rows)
            if stage.dmd:
                run(teacher, guided * batch_size)
                run(student, batch_size)
        loss = f = student(batch.x_0, t, batch.cond).x_0
        if stage.adversarial:
            fake = flash.features(f, t, batch.cond)
            with torch.no_grad():
                real = flash.features(batch.x_0, t, batch.cond)
            loss = discriminator(fake).sum() + discriminator(torch.cat([real, fake.detach()])).sum()
        loss.sum().backward()

    def update():
        flash(student, batch).sum().backward()

    with PeakMemory(device) as memory:
        seconds = in_turns((passes, update), net, repeats, device)
    learned = sum(each.numel() for each in net.parameters() if each.requires_grad)
    return {"model": start, "passes": median(seconds["passes"]), "update": median(seconds["update"]),
            "ratio": median(b / a for a, b in zip(*seconds.values(), strict=True)),
            "rollout_rows": sum(rollout), "batch_size": batch_size, "teacher_steps": stage.steps,
            "lora_rank": config.distill.lora_rank, "precision": precision, "compile": config.compute.compile,
            "grad_checkpoint": config.train.grad_checkpoint, "x": list(batch.x_0.shape),
            "parameters": sum(each.numel() for each in net.parameters()), "learned_parameters": learned,
            "peak_memory_mib": memory.total_mib, "repeats": repeats, "machine": machine(device)}


def speed(config, flags) -> int:
    if config.get("distill", {}).get("name") != "flash":
        raise UserError("--config names no Flash Diffusion; write --config=configs/cifar10_unet.py:flash")
    require_json(flags.out)
    if "pipeline" in config and flags.checkpoint:
        raise UserError(f"--checkpoint={flags.checkpoint} belongs to a config without a pipeline; a pipeline's network "
                        "has random weights here")
    if "pipeline" in config:
        subject = of_pipeline(config, flags.width, flags.latent)
    else:
        subject = of_chain(config, flags.checkpoint)
    result = measure(config, subject, flags.batch_size, flags.repeats, cli.choose_device(config.compute.device))
    result |= origin("-m libs.distillation.flash_speed", config, flags, FLAGS)
    memory = result["peak_memory_mib"]
    tell(f"update {result['update']:.3f} s: {result['ratio']:.3f} x its passes, {result['passes']:.3f} s; "
         f"{result['rollout_rows']} teacher rows in a roll-out of {result['batch_size']} images"
         + ("" if memory is None else f"; peak memory {memory:,.0f} MiB"), result, flags.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(speed, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

"""What an update of Flash Diffusion costs beside the network passes that it cannot do without.

    python -m libs.distillation.flash_speed --config=configs/cifar10_unet.py:flash --out=outputs/flash_speed.json

The whole objective of the last stage with its backward pass (optimizer apart, as it is training's) and its bare passes:
the teacher's over the rows of the roll-out, the real and the fake score, the student's with gradient, features of both
images, and the discriminator. Both in turns in one run; the ratio is the median over rounds.
"""

import sys
from statistics import median

import torch
from absl import flags as absl_flags

from .. import cli
from ..build import load_model, make_denoiser
from ..codecs import make_codec
from ..errors import UserError
from ..provenance import machine
from ..training import choose_precision
from .flash import draw_starts
from .flash_training import FlashSetup, check, null_condition
from .speed import in_turns, random_batch, refuse_other_file, tell


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "the teacher; the config's own unless given", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 16, "images in an update", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("repeats", 5, "rounds that count", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_string("out", None, "file for the result (.json)", flag_values=fv)


def measure(config, checkpoint: str | None, batch_size: int, repeats: int, device) -> dict:
    """Median seconds of update and passes, their ratio, and the rows that the teacher sees."""
    stages = check(config, 1)
    start = str(checkpoint or config.checkpoint)
    net, held = load_model(config, start)
    precision = choose_precision(config)
    codec, null = make_codec(held["codec"], device), null_condition(held["cond"], None)
    setup = FlashSetup(config, stages, net, held, start, codec, null, precision, device)
    net = setup.student.to(device).train()
    flash, teacher = setup.objective, setup.teacher
    student = make_denoiser(torch.compile(net) if config.compute.compile else net, setup.description, precision, device)
    batch = random_batch(held, batch_size, config.seed, sum(stage.updates for stage in stages), device)
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

    seconds = in_turns((passes, update), net, repeats, device)
    return {"passes": median(seconds["passes"]), "update": median(seconds["update"]),
            "ratio": median(b / a for a, b in zip(*seconds.values(), strict=True)),
            "rollout_rows": sum(rollout), "batch_size": batch_size, "teacher_steps": stage.steps,
            "lora_rank": config.distill.lora_rank, "precision": precision, "compile": config.compute.compile,
            "repeats": repeats, "machine": machine(device)}


def speed(config, flags) -> int:
    if config.get("distill", {}).get("name") != "flash":
        raise UserError("--config names no Flash Diffusion; write --config=configs/cifar10_unet.py:flash")
    refuse_other_file(flags.out)
    result = measure(config, flags.checkpoint, flags.batch_size, flags.repeats,
                     cli.choose_device(config.compute.device))
    tell(f"update {result['update']:.3f} s: {result['ratio']:.3f} x its passes, {result['passes']:.3f} s; "
         f"{result['rollout_rows']} teacher rows in a roll-out of {result['batch_size']} images", result, flags.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(speed, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

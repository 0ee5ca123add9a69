"""Distil a model into one that samples in half the steps; the same command again goes on where it stopped.

    python distillate.py --config=configs/digits_uvit.py:progressive --config.distill.steps=16 --workdir=runs/digits_16
    python distillate.py --config=configs/digits_uvit.py:progressive --config.distill.steps=8 \\
        --checkpoint=runs/digits_16 --workdir=runs/digits_8

The teacher is --checkpoint, or else the config's own; one DDIM step of the student learns two of its. WORKDIR is a
training folder as train.py's, and sample.py --checkpoint=WORKDIR takes the number of steps from it.
"""

import copy
import sys
import time

from absl import flags as absl_flags
from absl import logging

from libs import cli
from libs.build import MODEL_SECTIONS, adopt_sampler, load_model, make_denoiser, prepare_backbone
from libs.checkpoint import resolve
from libs.distillation import Halving, student_sampler
from libs.distillation.progressive import refuse_other_steps
from libs.errors import UserError
from libs.processes import Processes
from libs.training import Run, Trainer, choose_precision, load_training_data, validate


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("workdir", None, "folder of the run", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "the teacher: released name, file or training folder",
                             flag_values=fv)
    absl_flags.mark_flag_as_required("workdir", fv)


def distillate(config, flags) -> int:
    began = time.monotonic()
    if "distill" not in config:
        name = flags.config.partition(":")[0]
        raise UserError(f"--config={flags.config} names no distillation; write --config={name}:progressive")
    processes = Processes(cli.choose_device(config.compute.device))
    device = processes.device
    validate(config, processes.count)
    precision = choose_precision(config)

    start = str(flags.checkpoint or config.checkpoint)
    run = Run(cli.output_dir(flags.workdir, "workdir"), config, start, processes)
    saved = run.resume()
    if saved is not None and saved.step >= config.train.steps:
        logging.info("%s is finished: %d steps; a larger --config.train.steps goes on", run.workdir, saved.step)
        return 0

    teacher, held = load_model(config, flags.checkpoint)
    refuse_other_steps(held, config.distill.steps)
    description = {name: held[name] for name in (*MODEL_SECTIONS, "image")}
    student = copy.deepcopy(teacher)
    teacher = prepare_backbone(teacher.requires_grad_(False), config.compute, device)
    halving = Halving(make_denoiser(teacher, description, precision, device), config.distill.steps,
                      config.distill.weighting)
    description["sampler"] = student_sampler(config.distill.steps, halving.teacher.schedule)
    adopt_sampler(config, description)
    logging.info("teacher %s, %d steps; student %d steps", resolve(start), 2 * halving.steps, halving.steps)
    trainer = Trainer(config, run, student, description, halving, precision)
    trainer.restore(saved)
    status = trainer.train(load_training_data(config.data, description, device), began)
    processes.close()
    return status


def main(argv: list[str] | None = None) -> int:
    return cli.run(distillate, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

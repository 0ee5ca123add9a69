"""Distil a model into one that is cheaper to sample; the same command again goes on where it stopped.

    python distillate.py --config=configs/digits_uvit.py:progressive --config.distill.steps=16 --workdir=runs/digits_16
    python distillate.py --config=configs/digits_uvit.py:progressive --config.distill.steps=8 \\
        --checkpoint=runs/digits_16 --workdir=runs/digits_8
    python distillate.py --config=configs/cifar10_unet.py:dpm_solver_pp,clockwork_adaptor --config.sampler.steps=8 \\
        --workdir=runs/adaptor
    python distillate.py --config=configs/sd15.py:clockwork_adaptor --config.pipeline.scheduler=dpm_solver_pp \\
        --config.pipeline.steps=8 --prompts=captions.txt --workdir=runs/sd15_adaptor

progressive: the teacher is --checkpoint, or else the config's own; one DDIM step of the student learns two of its.
WORKDIR is a training folder as train.py's, and sample.py --checkpoint=WORKDIR takes the number of steps from it.

clockwork_adaptor: the model stays as it is, and an adaptor learns from its trajectories, without images. WORKDIR gets
adaptor.safetensors, which --config.policy.adaptor names with :clockwork, the sampler, and its steps.
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
from libs.errors import UserError, choose
from libs.processes import Processes
from libs.training import Run, Trainer, choose_precision, load_training_data, validate


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("workdir", None, "folder of the run", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "the teacher: released name, file or training folder",
                             flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "of a pipeline: a file, .txt, one a line, or COCO's .json",
                             flag_values=fv)
    absl_flags.mark_flag_as_required("workdir", fv)


def halve(config, flags, began: float) -> int:
    """Progressive distillation."""
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


def train_adaptor(config, flags, began: float) -> int:
    """Clockwork's distillation."""
    from libs.distillation.clockwork_adaptor import distil  # diffusers takes seconds to import

    return distil(config, flags.workdir, flags.checkpoint, flags.prompts, flags.overrides, began)


DISTILLATIONS = {"progressive": halve, "clockwork_adaptor": train_adaptor}


def distillate(config, flags) -> int:
    began = time.monotonic()
    of_pipeline = "pipeline" in config
    if "distill" not in config:
        name, method = flags.config.partition(":")[0], "clockwork_adaptor" if of_pipeline else "progressive"
        raise UserError(f"--config={flags.config} names no distillation; write --config={name}:{method}")
    if of_pipeline and flags.checkpoint:
        raise UserError(f"--checkpoint={flags.checkpoint} belongs to a config without a pipeline; use "
                        "--config.pipeline.path")
    if of_pipeline and flags.prompts is None:
        raise UserError("--prompts is missing: a .txt file with one a line, or a .json file of COCO's captions")
    if flags.prompts is not None and not of_pipeline:
        raise UserError(f"--prompts={flags.prompts} belongs to a pipeline, such as configs/sd15.py")
    return choose("distill.name", config.distill.name, DISTILLATIONS)(config, flags, began)


def main(argv: list[str] | None = None) -> int:
    return cli.run(distillate, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

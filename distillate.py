"""Distil a model into one that is cheaper to sample; the same command again goes on where it stopped.

    python distillate.py --config=configs/cifar10_unet.py:progressive --config.distill.start_steps=1024 \\
        --config.distill.end_steps=2 --workdir=runs/students
    python distillate.py --config=configs/digits_uvit.py:progressive --checkpoint=runs/digits --workdir=runs/digits_8
    python distillate.py --config=configs/cifar10_unet.py:flash --workdir=runs/flash
    python distillate.py --config=configs/sd15.py:flash --config.data.path=data/shards --workdir=runs/flash_sd15
    python distillate.py --config=configs/cifar10_unet.py:dpm_solver_pp,clockwork_adaptor --config.sampler.steps=8 \\
        --workdir=runs/adaptor
    python distillate.py --config=configs/sd15.py:clockwork_adaptor --config.pipeline.scheduler=dpm_solver_pp \\
        --config.pipeline.steps=8 --prompts=captions.txt --workdir=runs/sd15_adaptor

progressive: one DDIM step of a student learns two of its teacher's; the student becomes the next teacher. The first is
--checkpoint, or else the config's own. WORKDIR gets stages.json and a training folder as train.py's for each student,
such as steps_0512; sample.py --checkpoint=WORKDIR takes the last one, --checkpoint=WORKDIR/steps_0512 that one, and
each brings its number of steps along.

flash: a student of a few steps learns a teacher's solutions from its noise at once, with the teacher's score and
features; --config.distill.lora_rank=64 trains a LoRA. WORKDIR is a training folder; sample.py --checkpoint=WORKDIR. Of
a pipeline, which learns from the captioned pictures of config.data, WORKDIR/student is the student as load_student
(libs/pipelines), diffusers and peft read it.

clockwork_adaptor: the model stays as it is, and an adaptor learns from its trajectories, without images. WORKDIR gets
adaptor.safetensors, which --config.policy.adaptor names with :clockwork, the sampler, and its steps.
"""

import sys
import time
from functools import partial

from absl import flags as absl_flags

from libs import cli
from libs.errors import UserError, choose
from libs.processes import Processes


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("workdir", None, "folder of the run", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "the teacher: released name, file or training folder",
                             flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "of a pipeline: a file, .txt, one a line, or COCO's .json",
                             flag_values=fv)
    absl_flags.mark_flag_as_required("workdir", fv)


def halve(config, flags, began: float) -> int:
    """Progressive distillation: all stages, or one."""
    from libs.distillation.stages import Stages

    processes = Processes(cli.choose_device(config.compute.device))
    start = str(flags.checkpoint or config.checkpoint)
    status = Stages(config, cli.output_dir(flags.workdir, "workdir"), start, processes, flags.overrides).run(began)
    processes.close()
    return status


def train_adaptor(config, flags, began: float) -> int:
    """Clockwork's distillation."""
    from libs.distillation.clockwork_adaptor import distil  # diffusers takes seconds to import

    return distil(config, flags.workdir, flags.checkpoint, flags.prompts, flags.chosen, began)


def train_few_steps(config, flags, began: float) -> int:
    """Flash Diffusion."""
    from libs.distillation.flash_training import check, distil_chain
    from libs.training import Run

    processes = Processes(cli.choose_device(config.compute.device))
    stages = check(config, processes.count)
    if "pipeline" in config:
        from libs.distillation.flash_pipeline import distil_pipeline  # diffusers takes seconds to import

        start, distil = config.pipeline.path, distil_pipeline
    else:
        start, distil = str(flags.checkpoint or config.checkpoint), partial(distil_chain, overrides=flags.overrides)
    run = Run(cli.output_dir(flags.workdir, "workdir"), config, start, processes)
    status = distil(config, stages, run, began)
    processes.close()
    return status


DISTILLATIONS = {"progressive": halve, "flash": train_few_steps, "clockwork_adaptor": train_adaptor}


def distillate(config, flags) -> int:
    began = time.monotonic()
    of_pipeline = "pipeline" in config
    if "distill" not in config:
        name, method = flags.config.partition(":")[0], "clockwork_adaptor" if of_pipeline else "progressive"
        raise UserError(f"--config={flags.config} names no distillation; write --config={name}:{method}")
    if of_pipeline and flags.checkpoint:
        raise UserError(f"--checkpoint={flags.checkpoint} belongs to a config without a pipeline; use "
                        "--config.pipeline.path")
    if of_pipeline and config.pipeline.student and config.distill.name == "flash":
        raise UserError(f"--config.pipeline.student={config.pipeline.student}: Flash Diffusion starts from the "
                        "pipeline itself; leave it out")
    takes_prompts = of_pipeline and config.distill.name == "clockwork_adaptor"
    if takes_prompts and flags.prompts is None:
        raise UserError("--prompts is missing: a .txt file with one a line, or a .json file of COCO's captions")
    if flags.prompts is not None and not takes_prompts:
        raise UserError(f"--prompts={flags.prompts} belongs to the adaptor of a pipeline, such as "
                        "configs/sd15.py:clockwork_adaptor; other distillations learn from config.data")
    return choose("distill.name", config.distill.name, DISTILLATIONS)(config, flags, began)


def main(argv: list[str] | None = None) -> int:
    return cli.run(distillate, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

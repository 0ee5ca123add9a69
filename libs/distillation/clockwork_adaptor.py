"""Clockwork's distillation (2312.08128, section 3.3): an adaptor learns to stand in for the deep part of a UNet.

The data are trajectories of the frozen network with the sampler, steps and guidance that the adaptor will serve. Over
the steps between two full ones the adaptor goes on from its own last output, as it does when sampling; with clock 2
that is one step, and the paper's loss. What is minimized is the mean over all elements of

    (r_out(t) - phi(r_in(t), r_hat(t + 1), t_emb))^2,    r_hat = r_out at a full step, else phi's own.
"""

from absl import logging
from ml_collections import ConfigDict

from ..cli import choose_device, output_dir
from ..errors import UserError, choose
from ..processes import Processes
from ..prompts import read_prompts
from ..training import Run, choose_precision, validate
from ..training.sharding import asked_for
from .adaptor_training import FILE, LEARNED, AdaptorTraining
from .trajectories import chain_teacher, pipeline_teacher

NAMES = (*LEARNED, "ridge")
AT_LEAST = {"clock": 2, "depth": 0, "width": 0, "protect_first": 0, "protect_last": 0, "trajectories": 1,
            "updates": 1, "rounds_kept": 1}


def check(config: ConfigDict, processes: int) -> None:
    """Refuse, before anything is loaded, settings that make no training."""
    section, train = config.distill, config.train
    choose("distill.adaptor", section.adaptor, NAMES)
    for field, least in AT_LEAST.items():
        if section[field] < least:
            raise UserError(f"--config.distill.{field}={section[field]} must be at least {least}")
    if section.adaptor == "ridge" and processes > 1:
        raise UserError("distill.adaptor='ridge' is fitted by one process; leave accelerate launch out")
    if asked_for(processes):
        raise UserError("accelerate launch --use_fsdp: an adaptor is too small to be sharded; use --multi_gpu")
    if section.trajectories % processes:
        raise UserError(f"--config.distill.trajectories={section.trajectories} cannot be divided among {processes} "
                        "processes")
    if config.policy.name != "full":
        raise UserError(f"policy.name={config.policy.name!r}: the trajectories are of the whole network; leave the "
                        "policy out")
    for field, off in {"grad_checkpoint": False, "preview_every": 0, "eval_every": 0}.items():
        if train[field] != off:
            raise UserError(f"--config.train.{field}={train[field]}: the training of an adaptor has none; leave it out")
    numbers = {"train": train, "eval": config.eval, "seed": config.seed, "cond": {"drop": 0.0}}
    validate(ConfigDict(numbers), processes)


def distil(config: ConfigDict, workdir: str, checkpoint: str | None, prompts: str | None, overrides: frozenset[str],
           began: float) -> int:
    """Train the adaptor of `config.distill` in the folder `workdir`, or go on there. Returns the exit status.

    checkpoint: the frozen model of a chain, None for the config's own; prompts: of a pipeline, as on a command line;
    overrides: fields of the config that the user set; began: see `AdaptorTraining.train`.
    """
    processes = Processes(choose_device(config.compute.device))
    check(config, processes.count)
    config.compute.precision = choose_precision(config)
    of_pipeline = "pipeline" in config
    start = "" if of_pipeline else str(checkpoint or config.checkpoint)
    run = Run(output_dir(workdir, "workdir"), config, start, processes)
    if of_pipeline:
        teacher = pipeline_teacher(config, read_prompts(prompts), processes.device, overrides)
    else:
        teacher = chain_teacher(config, checkpoint, processes.device, overrides)
    training = AdaptorTraining(config, run, teacher)
    training.restore(run.resume())
    if training.finished:
        logging.info("%s is finished: %d steps; a larger --config.train.steps goes on", run.workdir / FILE,
                     training.step)
        return 0
    if training.step:
        logging.info("going on from step %d", training.step)
    status = training.train(began)
    processes.close()
    return status

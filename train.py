"""Train a diffusion model, or an autoencoder for one; the same command again goes on where it stopped.

    python train.py --config=configs/digits_uvit.py --workdir=runs/digits
    python train.py --config=configs/emoji32_autoencoder.py --workdir=runs/emoji32/autoencoder
    accelerate launch --mixed_precision bf16 train.py --config=configs/cifar10_uvit_tiny.py --workdir=runs/uvit_tiny
    python train.py --config=configs/cifar10_uvit_tiny.py --config.train.max_minutes=9 --workdir=runs/uvit_tiny

WORKDIR gets config.json, ckpts/ (the newest few and the best), stats.jsonl, tensorboard/, previews/, loss.png.
"""

import sys
import time

from absl import flags as absl_flags
from absl import logging

from libs import cli
from libs.errors import UserError
from libs.processes import Processes
from libs.training import (
    Run,
    Trainer,
    choose_precision,
    describe_trained,
    load_training_data,
    make_objective,
    start_network,
    validate,
)
from libs.training.autoencoder import AUTOENCODER, AutoencoderTrainer, start_autoencoder


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("workdir", None, "folder of the run", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "weights to start from: released name, file or training folder",
                             flag_values=fv)
    absl_flags.mark_flag_as_required("workdir", fv)


def train(config, flags) -> int:
    began = time.monotonic()
    if "pipeline" in config:
        raise UserError(f"--config={flags.config}: a pipeline is not trained here; take a config with a backbone")
    processes = Processes(cli.choose_device(config.compute.device))
    validate(config, processes.count)
    precision = choose_precision(config)

    run = Run(cli.output_dir(flags.workdir, "workdir"), config, flags.checkpoint, processes)
    saved = run.resume()
    if saved is not None and saved.step >= config.train.steps:
        logging.info("%s is finished: %d steps; a larger --config.train.steps goes on", run.workdir, saved.step)
        return 0

    if config.backbone.name == AUTOENCODER:
        net, description = start_autoencoder(config, flags.checkpoint)
        trainer = AutoencoderTrainer(config, run, net, description, precision)
    else:
        net, description = start_network(config, flags.checkpoint, flags.overrides)
        objective = make_objective(config, net, description, precision, processes.device)
        trainer = Trainer(config, run, net, describe_trained(config, description), objective, precision)
    trainer.restore(saved)
    status = trainer.train(load_training_data(config.data, description, processes.device), began)
    processes.close()
    return status


def main(argv: list[str] | None = None) -> int:
    return cli.run(train, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

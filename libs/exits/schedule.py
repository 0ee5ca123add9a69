"""Calibrates early exit's mode `schedule` once and keeps the result: a depth for every call of the network.

    python -m libs.exits.schedule --config=configs/cifar10_uvit_small.py:early_exit --checkpoint=runs/early_exit \\
        --config.policy.target_layer_ratio=0.55 --out=outputs/schedule.json
    python sample.py --config=configs/cifar10_uvit_small.py:early_exit --checkpoint=runs/early_exit \\
        --config.policy.mode=schedule --config.policy.schedule=outputs/schedule.json --out=outputs/samples

It is for this depth, sampler and number of steps; a run with others refuses it.
"""

import sys

from absl import flags as absl_flags
from absl import logging

from .. import build, cli
from ..errors import UserError
from ..files import require_json
from ..policies.exit_calibration import FIRST_SEED
from ..policies.exit_schedule import write_schedule
from ..provenance import file_sha256

SETTINGS = ("target_layer_ratio", "by_step", "quantile", "check_every", "patience", "joint", "calibration_images")


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "of a text model: a text, a file, or a folder of run_vis features",
                             flag_values=fv)
    absl_flags.DEFINE_string("out", None, "the schedule, a .json file", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def calibrate(config, flags) -> None:
    if config.policy.name != "early_exit":
        raise UserError(f"policy.name={config.policy.name!r} has no schedule to calibrate; use "
                        f"--config={flags.config}:early_exit")
    if config.policy.schedule:
        raise UserError(f"--config.policy.schedule={config.policy.schedule} is a schedule already")
    require_json(flags.out)
    config.policy.mode = "schedule"
    device = cli.choose_device(config.compute.device)
    chain, source = build.load_chain(config, flags.checkpoint, device, flags.chosen, flags.prompts)
    policy = chain.policy
    policy.ready()
    settings = {name: config.policy[name] for name in SETTINGS}
    write_schedule(flags.out, policy.schedule, policy.layers, policy.made_for, {
        "threshold": policy.threshold, **settings, "first_seed": FIRST_SEED, "sampler": config.sampler.to_dict(),
        "model": flags.checkpoint or config.checkpoint, "checkpoint_sha256": file_sha256(source)})
    logging.info("%s: %s", flags.out, " ".join(map(str, policy.schedule)))


def main(argv: list[str] | None = None) -> int:
    return cli.run(calibrate, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

"""A checkpoint of ours as U-ViT's and AdaDiff's `.pth`, for their evaluation scripts.

    python -m libs.uvit_checkpoint --checkpoint=runs/cifar10_early_exit --out=cifar10_adadiff.pth
    python -m libs.uvit_checkpoint --checkpoint=runs/cifar10_early_exit --noheads --out=cifar10_uvit.pth

--checkpoint is a file or a training folder, whose newest EMA weights are taken; the other way round, every command of
ours reads such a file. It is a plain state dict by the published names and no word of anything else, so what the other
code takes for granted must hold: eps, on the linear VP-SDE or Stable Diffusion's 1000 steps. --noheads leaves the
uncertainty heads out, which U-ViT's own code does not know.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from absl import logging
from torch import Tensor

from . import cli
from .checkpoint import read, resolve_file, save_pth
from .errors import UserError
from .heads import infer_form

HEADS = "lte_classifer."
PROCESSES = (  # schedule and unit of time in which their scripts train
    ({"name": "vp_linear", "beta_min": 0.1, "beta_max": 20.0}, "999t"),
    ({"name": "scaled_linear", "steps": 1000, "beta_start": 0.00085, "beta_end": 0.012}, "step"),
)


def state_dict(tensors: Mapping[str, Tensor], description: Mapping[str, Any], heads: bool = True) -> dict[str, Tensor]:
    """The tensors of such a file, in float32.

    heads: with the uncertainty heads, if there are any. Raises UserError, naming the field of `description`, where
    the other code would make another model of them.
    """
    if not description:
        raise UserError("--checkpoint does not describe itself; want one of train.py's or distillate.py's")
    backbone, denoiser, schedule = (description[name] for name in ("backbone", "denoiser", "schedule"))
    if backbone["name"] != "uvit":
        raise UserError(f"backbone.name={backbone['name']!r} cannot be written as U-ViT's .pth")
    if backbone.get("guidance_embed"):
        raise UserError("backbone.guidance_embed=True cannot be written as U-ViT's .pth, whose networks take no scale")
    if heads and infer_form(tensors, backbone["embed_dim"], backbone["depth"] + 1) == "paper":
        raise UserError("backbone.uem='paper' cannot be written as AdaDiff's .pth, whose heads are of the released "
                        "form; --noheads leaves them out")
    if denoiser["prediction"] != "eps":
        raise UserError(f"denoiser.prediction={denoiser['prediction']!r} cannot be written as U-ViT's .pth, whose "
                        "networks predict eps")
    time = denoiser["time_input"]
    if denoiser.get("time_scale", 1) != 1 or not any({**full, **schedule} == full and time == unit
                                                     for full, unit in PROCESSES):
        raise UserError(f"schedule.name={schedule['name']!r} with denoiser.time_input={time!r} cannot be written as "
                        "U-ViT's .pth, whose networks are trained on vp_linear with 999t, or on the 1000 steps of "
                        "scaled_linear with step")
    return {name: each.float() for name, each in tensors.items() if heads or not name.startswith(HEADS)}


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "the file to write, such as cifar10_uvit_small.pth", flag_values=fv)
    absl_flags.DEFINE_boolean("heads", True, "write the uncertainty heads, if there are any", flag_values=fv)
    for name in ("checkpoint", "out"):
        absl_flags.mark_flag_as_required(name, fv)


def convert(_, flags) -> None:
    path = resolve_file(flags.checkpoint)
    if Path(flags.out).suffix != ".pth":
        raise UserError(f"--out={flags.out} must end in .pth")
    tensors = state_dict(*read(path), flags.heads)
    save_pth(flags.out, tensors)
    logging.info("%s: %d tensors of %s", flags.out, len(tensors), path)


def main(argv: list[str] | None = None) -> int:
    return cli.run(convert, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

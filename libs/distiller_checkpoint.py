"""A checkpoint of ours as diffusion_distiller's `checkpoint.pt`, for its sample.py and distillate.py.

    python -m libs.distiller_checkpoint --checkpoint=runs/celeba --out=checkpoint.pt

--checkpoint is a file or a training folder, as everywhere; the other way round, every command of ours reads such a
file. It holds {"G": weights, "n_timesteps": N, "time_scale": s} and no word of anything else, so what the other code
takes for granted must hold: the cosine schedule of N steps, v, the label s * i at step i, no classes.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import flags as absl_flags
from absl import logging
from torch import Tensor, nn

from . import cli
from .checkpoint import distiller_description, read, resolve_file, save_pth
from .errors import UserError

BACKBONES = ("ddpm_unet", "factory")  # its own UNet, and models made for it
UNSAID = {  # fields that a description may leave out, and what they are then
    "schedule": {"s": 0.008, "beta_max": 0.999},
    "denoiser": {"time_scale": 1},
    "codec": {"order": "rgb"},
}


def save(path: str | Path, net: nn.Module | Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Write a network, or its state dict, as a `checkpoint.pt`.

    Raises UserError, naming the field of `description`, where that format cannot say what the model is.
    """
    steps, scale = steps_and_scale(description)
    tensors = net.state_dict() if isinstance(net, nn.Module) else net
    save_pth(path, {"G": {name: each.detach().cpu() for name, each in tensors.items()}, "n_timesteps": steps,
                    "time_scale": scale})


def steps_and_scale(description: Mapping[str, Any]) -> tuple[int, float]:
    """(n_timesteps, time_scale) of the model that `description` is of."""
    if not description:
        raise UserError("--checkpoint does not describe itself; want one of train.py's or distillate.py's")
    backbone, cond = description["backbone"]["name"], description["cond"]
    if backbone not in BACKBONES:
        raise UserError(f"backbone.name={backbone!r} cannot be written for diffusion_distiller; choose from "
                        f"{', '.join(BACKBONES)}")
    if cond["kind"] != "none" or "guidance" in cond:
        raise UserError(f"cond.kind={cond['kind']!r} cannot be written for diffusion_distiller, whose models take no "
                        "condition")
    steps = description["schedule"].get("steps", 1000)
    scale = description["denoiser"].get("time_scale", 1)
    said = distiller_description(steps, scale)
    for section in ("schedule", "denoiser", *(["codec"] if backbone == "ddpm_unet" else [])):
        there, here = ({**UNSAID[section], **each[section]} for each in (said, description))
        for field in ("name", *sorted({*there, *here})):
            if there.get(field) != here.get(field):
                raise UserError(f"{section}.{field}={here.get(field)!r} cannot be written for diffusion_distiller, "
                                f"which has {there.get(field)!r}")
    sampled = description.get("sampler", {}).get("steps", steps)
    if sampled != steps:
        raise UserError(f"a student of {sampled} steps on a schedule of {steps} cannot be written for "
                        f"diffusion_distiller: step i of the student has the time {steps // sampled} (i + 1) - 1, the "
                        "format says i * time_scale; --config.distill.time_label=legacy makes students of that kind")
    return steps, int(scale) if scale == int(scale) else scale


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "the file to write, such as checkpoint.pt", flag_values=fv)
    for name in ("checkpoint", "out"):
        absl_flags.mark_flag_as_required(name, fv)


def convert(_, flags) -> None:
    path = resolve_file(flags.checkpoint)
    if Path(flags.out).suffix not in (".pt", ".pth"):
        raise UserError(f"--out={flags.out} must end in .pt")
    tensors, description = read(path)
    if description and "backbone" not in description:
        raise UserError(f"--checkpoint={flags.checkpoint} is diffusion_distiller's already")
    save(flags.out, tensors, description)
    logging.info("%s: %d tensors of %s", flags.out, len(tensors), path)


def main(argv: list[str] | None = None) -> int:
    return cli.run(convert, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

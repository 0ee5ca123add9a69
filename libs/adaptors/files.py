"""Adaptors on disk: safetensors whose metadata says what rebuilds the adaptor and which UNet it was made for."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..checkpoint import ROOT, load_weights, read, save_backbone
from ..errors import UserError
from . import make_adaptor

FIELD = "policy.adaptor"
TRAINING_FREE = ("identity", "extrapolation")  # adaptors that need no file
NEEDED = ("depth", "cut", "c_in", "c_out", "temb_dim")
RELEASED = ROOT / "assets" / "adaptors"
WEIGHTS, STEM = "adaptor.", "made_for.stem"
TOLERANCE = 2e-2  # relative change of the UNet's first convolution; rounding to fp16 or bf16 stays below


def resolve_adaptor(name: str | Path) -> Path:
    """The file of an adaptor: a path, or a name in assets/adaptors. Raises UserError if there is neither."""
    path, released = Path(name), RELEASED / f"{name}.safetensors"
    if path.is_file() or not released.is_file():
        if path.suffix != ".safetensors" or not path.is_file():
            names = ", ".join(sorted(each.stem for each in RELEASED.glob("*.safetensors")))
            raise UserError(f"{FIELD}={str(name)!r}: {'no adaptor file' if path.is_file() else 'no such file'}; choose "
                            f"from identity, extrapolation, {names}, or give the path of an adaptor's .safetensors")
        return path
    return released


def save_adaptor(path: str | Path, adaptor: nn.Module, name: str, options: Mapping[str, Any],
                 made_for: Mapping[str, Any], stem: Tensor | None = None) -> None:
    """Write an adaptor with what `load_adaptor` and `check_adaptor` need.

    name, options: of `make_adaptor`
    made_for: what it was fitted on, as JSON: at least depth, cut ("before", "after", "any"), c_in, c_out, temb_dim;
        further fields (network, sampler, steps, clock, ...) are kept
    stem: weight of the first convolution of the UNet it was fitted on, by which another UNet is told; kept in fp16
    """
    missing = [field for field in NEEDED if field not in made_for]
    if missing:
        raise ValueError(f"made_for lacks {', '.join(missing)}")
    tensors = {WEIGHTS + key: tensor for key, tensor in adaptor.state_dict().items()}
    if stem is not None:
        tensors[STEM] = stem.half()
    save_backbone(Path(path), tensors, {"adaptor": {"name": name, **options}, "made_for": dict(made_for)})


def load_adaptor(path: str | Path) -> tuple[nn.Module, dict[str, Any]]:
    """(adaptor in eval mode, made_for) of a file or a released name.

    made_for["stem"] is the first convolution of the UNet it was fitted on, in fp16, or None.
    Raises UserError for a file that is missing, truncated, or holds no adaptor.
    """
    source = f"{FIELD}={str(path)!r}"
    path = resolve_adaptor(path)
    tensors, description = read(path, FIELD)
    section, made_for = description.get("adaptor"), description.get("made_for")
    if not (isinstance(section, dict) and isinstance(made_for, dict) and "name" in section
            and set(NEEDED) <= set(made_for)):
        raise UserError(f"{source} holds no adaptor")
    sizes = {field: made_for[field] for field in ("c_in", "c_out", "temb_dim")}
    try:
        adaptor = make_adaptor(**section | sizes)
    except UserError as error:
        raise UserError(f"{source}: {error}") from error
    stem = tensors.pop(STEM, None)
    load_weights(adaptor, {key.removeprefix(WEIGHTS): tensor for key, tensor in tensors.items()}, source)
    return adaptor.eval(), made_for | {"stem": stem}


def check_adaptor(path: str | Path, made_for: Mapping[str, Any], depth: int, cut: str, c_in: int, c_out: int,
                  temb_dim: int, stem: Tensor | None = None) -> None:
    """Raise UserError if an adaptor was made for another UNet than this one, or for another cut through it.

    path, made_for: of `load_adaptor`; the rest describes this UNet. stem: weight of its first convolution, (c, 3, 3, 3)
    or so; compared where both sides have one.
    """
    source = f"{FIELD}={str(path)!r}"
    here = {"depth": depth, "cut": cut, "c_in": c_in, "c_out": c_out, "temb_dim": temb_dim}
    for field, value in here.items():
        if made_for[field] != value and not (field == "cut" and made_for[field] == "any"):
            raise UserError(f"{source} was made for {field}={made_for[field]!r}, but here {field}={value!r}")
    held = made_for.get("stem")
    if held is None or stem is None:
        return
    if held.shape != stem.shape:
        raise UserError(f"{source} was made for another UNet: its first convolution is {tuple(held.shape)}, "
                        f"here {tuple(stem.shape)}")
    held, stem = (each.detach().to("cpu", torch.float32) for each in (held, stem))
    difference = float((stem - held).norm() / held.norm())
    if not difference <= TOLERANCE:
        raise UserError(f"{source} was made for another UNet: its first convolution differs by {difference:.1%}, "
                        f"{TOLERANCE:.0%} allowed")


def check_sizes(adaptor: nn.Module, here: Mapping[str, int]) -> None:
    """Raise UserError if an adaptor that was handed over as a module has other sizes than this UNet's.

    here: c_in, c_out and temb_dim of this UNet. Of an adaptor without `sizes`, one of the user's own, nothing is known.
    """
    for field, value in getattr(adaptor, "sizes", {}).items():
        if value != here[field]:
            raise UserError(f"{FIELD}: this {type(adaptor).__name__} has {field}={value}, but here {field}="
                            f"{here[field]}")

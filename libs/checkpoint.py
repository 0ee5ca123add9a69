"""Weights on disk. Ours are safetensors whose metadata holds the config that rebuilds the network.

`load_backbone` also reads U-ViT's `.pth` files and diffusers folders. No file is ever unpickled as code.
"""

import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from .backbones import BACKBONES
from .errors import UserError, choose
from .files import atomic_path

ROOT = Path(__file__).resolve().parents[1]
RELEASED = ROOT / "assets" / "checkpoints"
FORMAT = "diffusion-shortcuts-1"


def build_backbone(section: Mapping) -> nn.Module:
    """The network of a config's `backbone` section: `name`, the rest its constructor's arguments."""
    options = dict(section)
    cls = choose("backbone.name", options.pop("name"), BACKBONES)()
    try:
        return cls(**options)
    except (TypeError, ValueError) as error:
        raise UserError(f"backbone: {error}") from error


def resolve(name: str, field: str = "checkpoint") -> Path:
    """A path, or a name in assets/checkpoints, or a training folder (its newest EMA weights)."""
    if not name:
        raise UserError(f"{field} is empty: name a file, or one of {released_names()}")
    path, released = Path(name), RELEASED / f"{name}.safetensors"
    if path.is_dir() and (path / "ckpts").is_dir():
        weights = sorted(path.glob("ckpts/[0-9]*/backbone_ema.safetensors"))
        if not weights:
            raise UserError(f"{field}={name!r}: no ckpts/*/backbone_ema.safetensors in that folder")
        return weights[-1]
    if path.exists():
        return path
    if released.exists():
        return released
    raise UserError(f"{field}={name!r} is not there; give a path, or one of {released_names()}")


def released_names() -> str:
    return ", ".join(sorted(path.stem for path in RELEASED.glob("*.safetensors"))) or "(none released)"


def save_backbone(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any],
                  dtype: torch.dtype | None = None) -> None:
    """Save a state dict with its description, such as `{"backbone": {...}, "schedule": {...}, ...}`.

    dtype: of the floating-point tensors on disk (torch.float16 halves a release); None keeps them.
    """
    def stored(tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu().contiguous()
        return tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor

    metadata = {"format": FORMAT, "config": json.dumps(description, sort_keys=True)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({name: stored(each) for name, each in tensors.items()}, metadata))


def read(path: str | Path, field: str = "checkpoint") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, description) of a file. The description is {} where the file holds none.

    Raises UserError for a file that is missing, truncated, or of another kind.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{field}={str(path)!r}: no such file")
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return tensors, json.loads(metadata.get("config", "{}"))
        if path.suffix in (".pth", ".pt"):
            tensors = torch.load(path, map_location="cpu", weights_only=True)
            if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
                raise UserError(f"{field}={str(path)!r}: not a state dict of tensors")
            return tensors, {}
    except (SafetensorError, json.JSONDecodeError, RuntimeError, EOFError, ValueError, KeyError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{field}={str(path)!r} cannot be read (truncated or another format): "
                        f"{str(error).splitlines()[0]}") from error
    except Exception as error:
        if type(error).__name__ == "UnpicklingError":
            raise UserError(f"{field}={str(path)!r} holds more than tensors; refused, since loading it "
                            "would run code") from error
        raise
    raise UserError(f"{field}={str(path)!r}: want .safetensors, .pth, .pt, or a diffusers folder")


def infer_uvit(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `backbone` section of a U-ViT state dict, from its names and shapes.

    The number of heads leaves no trace in the weights: the published models have heads of 64, and of 72 in
    the H models (width 1152).
    """
    if not {"patch_embed.proj.weight", "pos_embed", "decoder_pred.weight"} <= set(tensors):
        raise UserError("these weights are not a U-ViT's: patch_embed, pos_embed or decoder_pred is missing")
    width, channels, patch, _ = tensors["patch_embed.proj.weight"].shape
    num_classes = tensors["label_emb.weight"].shape[0] if "label_emb.weight" in tensors else -1
    clip_dim = tensors["context_embed.weight"].shape[1] if "context_embed.weight" in tensors else None
    text = 77 if clip_dim is not None else 0
    patches = tensors["pos_embed"].shape[1] - 1 - (num_classes > 0) - text
    in_blocks = {int(m[1]) for m in (re.match(r"in_blocks\.(\d+)\.", name) for name in tensors) if m}
    return {
        "name": "uvit", "img_size": patch * round(patches**0.5), "patch_size": patch, "in_chans": channels,
        "embed_dim": width, "depth": 2 * len(in_blocks), "num_heads": width // (72 if width == 1152 else 64),
        "mlp_ratio": tensors["mid_block.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "mid_block.attn.qkv.bias" in tensors, "mlp_time_embed": "time_embed.0.weight" in tensors,
        "num_classes": num_classes, "conv": "final_layer.weight" in tensors,
        "skip": "out_blocks.0.skip_linear.weight" in tensors, "clip_dim": clip_dim, "num_clip_token": text,
    }


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Strict load, in the network's own precision; the first difference is named in one line."""
    own = net.state_dict()
    problems = [f"{name} is missing" for name in own if name not in tensors]
    problems += [f"{name} is unknown" for name in tensors if name not in own]
    problems += [f"{name} has shape {tuple(tensors[name].shape)}, the network wants {tuple(own[name].shape)}"
                 for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if problems:
        more = f" (and {len(problems) - 1} more differences)" if len(problems) > 1 else ""
        raise UserError(f"{source} is of another architecture: {problems[0]}{more}")
    net.load_state_dict(tensors)


def load_backbone(path: str | Path, backbone: Mapping | None = None) -> nn.Module:
    """A network in eval mode from our safetensors, a U-ViT `.pth`, or a diffusers folder of a UNet2DModel.

    backbone: a `backbone` section to check against, or to use where the file does not describe itself.
    """
    return load_described(path, backbone)[0]


def load_described(path: str | Path, backbone: Mapping | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_backbone`, with the file's description ({} for foreign files)."""
    path = Path(path)
    if path.is_dir():
        return _load_diffusers(path), {}
    tensors, description = read(path)
    section = description.get("backbone") or backbone or infer_uvit(tensors)
    if backbone is not None and description.get("backbone"):
        _same_architecture(path, description["backbone"], backbone)
    net = build_backbone(section)
    load_weights(net, tensors, str(path))
    return net.eval(), description


def _same_architecture(path: Path, held: Mapping, wanted: Mapping) -> None:
    wanted = json.loads(json.dumps(dict(wanted)))  # tuples become lists, as in the file
    fields = [name for name in sorted({*held, *wanted}) if held.get(name) != wanted.get(name)]
    if fields:
        name = fields[0]
        raise UserError(f"checkpoint {path} is of another architecture: its backbone.{name} is "
                        f"{held.get(name)!r}, the config's {wanted.get(name)!r}")


def _load_diffusers(path: Path) -> nn.Module:
    folder = path / "unet" if (path / "unet").is_dir() else path
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
        name = json.loads((folder / "config.json").read_text())["_class_name"]
        if name in ("UNet2DModel", "UNet2D"):
            return BACKBONES["unet2d"]().from_pretrained(folder, use_safetensors=True).eval()
        raise UserError(f"checkpoint={str(path)!r} holds a {name}; a UNet2DModel can be loaded")
    raise UserError(f"checkpoint={str(path)!r}: no training folder and no diffusers folder (config.json)")

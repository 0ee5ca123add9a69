"""Weights on disk. Ours are safetensors whose metadata holds the config that rebuilds the network.

`load_backbone` also reads U-ViT's `.pth` files, diffusion_distiller's `checkpoint.pt` and diffusers folders. No file
is ever unpickled as code, and none chooses a Python file that runs.
"""

import contextlib
import io
import itertools
import json
import math
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
from .files import atomic_path, reason
from .heads import infer_form
from .weights import has_lora, refuse_other_tensors

ROOT = Path(__file__).resolve().parents[1]
RELEASED = ROOT / "assets" / "checkpoints"
FORMAT = "diffusion-shortcuts-1"
CONSTANTS = ("inv_freq",)  # frequencies, multiplied by times up to 1000: half precision would turn their phases
WRAPPER = "module."  # before every name of a network that was saved inside DistributedDataParallel
STAGES = "stages.json"  # in the folder of a distillation in stages


def build_backbone(section: Mapping) -> nn.Module:
    """The network of a config's `backbone` section: `name`, the rest its constructor's arguments."""
    options = dict(section)
    cls = choose("backbone.name", options.pop("name"), BACKBONES)()
    try:
        return cls(**options)
    except UserError:
        raise
    except (TypeError, ValueError) as error:
        raise UserError(f"backbone: {error}") from error


def resolve(name: str, field: str = "checkpoint") -> Path:
    """A path, or a name in assets/checkpoints, or a training folder (its newest EMA weights), or the folder of a
    distillation in stages (its last finished student).
    """
    if not name:
        raise UserError(f"{field} is empty: name a file, or one of {released_names()}")
    path, released = Path(name), RELEASED / f"{name}.safetensors"
    if (path / STAGES).is_file():
        path = _last_student(path, field)
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


def _last_student(folder: Path, field: str) -> Path:
    """The training folder of the last finished student, by the manifest of `distillation.stages`."""
    try:
        stages = json.loads((folder / STAGES).read_text())["stages"]
        finished = [stage["name"] for stage in stages if stage["finished"] and stage["steps"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{field}={str(folder)!r}: {STAGES} cannot be read ({reason(error)})") from error
    if not finished:
        raise UserError(f"{field}={str(folder)!r}: no student there is finished yet; a stage that is under way can be "
                        f"named itself: {', '.join(str(folder / stage['name']) for stage in stages)}")
    return folder / finished[-1]


def released_names() -> str:
    return ", ".join(sorted(path.stem for path in RELEASED.glob("*.safetensors"))) or "(none released)"


def save_backbone(path: Path, tensors: Mapping[str, Tensor], description: Mapping[str, Any],
                  dtype: torch.dtype | None = None) -> None:
    """Save a state dict with its description, such as `{"backbone": {...}, "schedule": {...}, ...}`.

    dtype: of the floating-point tensors on disk (torch.float16 halves a release); None keeps them.
    """
    def stored(name: str, tensor: Tensor) -> Tensor:
        tensor = tensor.detach().cpu().contiguous()
        halved = dtype is not None and tensor.is_floating_point() and not name.endswith(CONSTANTS)
        return tensor.to(dtype) if halved else tensor

    metadata = {"format": FORMAT, "config": json.dumps(description, sort_keys=True)}
    with atomic_path(path) as temporary:
        temporary.write_bytes(save({name: stored(name, each) for name, each in tensors.items()}, metadata))


def resolve_file(name: str, flag: str = "--checkpoint") -> Path:
    """As `resolve`, for what must be one file: a diffusers folder is refused."""
    path = resolve(name)
    if path.is_dir():
        raise UserError(f"{flag}={name}: want a file or a training folder")
    return path


def save_pth(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write tensors as torch.save does, for other code's formats."""
    buffer = io.BytesIO()  # torch.save reports a full disk as an error of its own kind
    torch.save(content, buffer)
    with atomic_path(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def read(path: str | Path, field: str = "checkpoint") -> tuple[dict[str, Tensor], dict[str, Any]]:
    """(state dict, description) of a file. The description is {} where the file holds none, and all but the backbone
    for diffusion_distiller's.

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
            tensors, description = torch.load(path, map_location="cpu", weights_only=True), {}
            if isinstance(tensors, dict) and set(tensors) == {"G", "n_timesteps", "time_scale"}:
                steps, scale, tensors = tensors["n_timesteps"], tensors["time_scale"], tensors["G"]
                if type(steps) is not int or steps < 1 or type(scale) not in (int, float) or not 0 < scale < math.inf:
                    raise UserError(f"{field}={str(path)!r}: n_timesteps={steps!r} and time_scale={scale!r} must be "
                                    "positive numbers")
                description = distiller_description(steps, scale)
            if not isinstance(tensors, dict) or not all(isinstance(v, Tensor) for v in tensors.values()):
                raise UserError(f"{field}={str(path)!r}: not a state dict of tensors")
            return dict(tensors), description
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
    depth = 2 * len({m[1] for m in (re.match(r"in_blocks\.(\d+)\.", name) for name in tensors) if m})
    return {
        "name": "uvit", "img_size": patch * round(patches**0.5), "patch_size": patch, "in_chans": channels,
        "embed_dim": width, "depth": depth, "num_heads": width // (72 if width == 1152 else 64),
        "mlp_ratio": tensors["mid_block.mlp.fc1.weight"].shape[0] / width,
        "qkv_bias": "mid_block.attn.qkv.bias" in tensors, "mlp_time_embed": "time_embed.0.weight" in tensors,
        "num_classes": num_classes, "conv": "final_layer.weight" in tensors,
        "skip": "out_blocks.0.skip_linear.weight" in tensors, "clip_dim": clip_dim, "num_clip_token": text,
    } | ({"uem": form} if (form := infer_form(tensors, width, depth + 1)) else {})


def infer_ddpm_unet(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `backbone` section of a DDPMUNet's state dict, from its names and shapes.

    The number of heads leaves no trace in the weights; the published model has 4. Nor has the dropout.
    """
    if not {"time.0.inv_freq", "down.0.weight", "mid.0.resblocks.conv1.weight", "out.2.weight"} <= set(tensors):
        raise UserError("these weights are not a DDPMUNet's: time.0, down.0, mid.0 or out.2 is missing")
    channel, stacked = tensors["down.0.weight"].shape[:2]
    out_stacked = tensors["out.2.weight"].shape[0]
    fold = math.isqrt(out_stacked // 3)  # images of 3 channels: a fold of n stacks 3 n^2
    if fold < 1 or 3 * fold**2 != out_stacked or stacked % fold**2:
        fold = 1
    widths, attention = [[]], set()
    for i in itertools.count(1):
        if f"down.{i}.0.weight" in tensors:  # a downsampling: the next level begins
            widths.append([])
        elif f"down.{i}.resblocks.conv1.weight" in tensors:
            widths[-1].append(tensors[f"down.{i}.resblocks.conv1.weight"].shape[0])
            if f"down.{i}.attention.qkv.weight" in tensors:
                attention.add(2 ** (len(widths) - 1))
        else:
            break
    if not all(widths):
        raise UserError("these weights are not a DDPMUNet's: a level has no block")
    section = {
        "name": "ddpm_unet", "in_channels": stacked // fold**2, "channel": channel,
        "channel_multiplier": [level[0] // channel for level in widths], "n_res_blocks": len(widths[0]),
        "attn_strides": sorted(attention), "attn_heads": 4,
        "use_affine_time": "mid.0.resblocks.norm2.weight" not in tensors, "dropout": 0.0, "fold": fold,
    }
    if out_stacked != stacked:
        section["out_channels"] = out_stacked // fold**2
    if "label_emb.weight" in tensors:
        section["num_classes"] = tensors["label_emb.weight"].shape[0]
    return section


def unwrapped(tensors: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
    """A state dict without DistributedDataParallel's `module.`, where every name begins so.

    >>> [*unwrapped({"module.a": 1, "module.b": 2})], [*unwrapped({"module.a": 1, "b": 2})]
    (['a', 'b'], ['module.a', 'b'])
    """
    if not all(name.startswith(WRAPPER) for name in tensors):
        return tensors
    return {name.removeprefix(WRAPPER): each for name, each in tensors.items()}


def infer_backbone(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The `backbone` section of a state dict that comes without one."""
    return infer_ddpm_unet(tensors) if "time.0.inv_freq" in tensors else infer_uvit(tensors)


def distiller_description(n_timesteps: int, time_scale: float) -> dict[str, Any]:
    """What diffusion_distiller's {"G": ..., "n_timesteps": N, "time_scale": s} says, all but the backbone and the size
    of the images.

    Its schedule is made anew for every N, its network is given s times the index of the step and outputs v, its images
    are BGR, and its sampler is DDPM's over all N steps with x_0 clipped.
    """
    denoiser = {"prediction": "v", "time_input": "index"}
    return {
        "schedule": {"name": "squared_cosine", "steps": n_timesteps},
        "denoiser": denoiser if time_scale == 1 else denoiser | {"time_scale": time_scale},
        "cond": {"kind": "none", "num_classes": 0, "null_label": -1, "drop": 0.0},
        "codec": {"name": "pixel", "order": "bgr"},
        "sampler": {"name": "ddpm", "steps": n_timesteps, "grid": "trailing", "t_start": 1.0, "t_end": 0.0,
                    "variance": "small", "threshold": "static", "threshold_value": 1.0},
    }


def load_weights(net: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """Strict load, in the network's own precision; the first difference is named in one line."""
    refuse_other_tensors(net.state_dict(), tensors, f"{source} is of another architecture")
    net.load_state_dict(tensors)


def drop_heads(net: nn.Module) -> bool:
    """Take a network's uncertainty heads away. Whether it had any."""
    had = getattr(net, "lte_classifer", None) is not None
    if had:
        net.lte_classifer = None
    return had


def learned_state(net: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What the checkpoints of a training hold: the whole network, or its LoRA alone.

    tensors: those of its state dict, by their names there, in place of its own.
    """
    tensors = net.state_dict() if tensors is None else tensors
    if not has_lora(net):
        return dict(tensors)
    from .lora import lora_state  # peft takes seconds to import

    return lora_state(tensors)


def load_learned(net: nn.Module, tensors: Mapping[str, Tensor], source: str) -> None:
    """`learned_state` back into the network; strict, as `load_weights`."""
    if not has_lora(net):
        return load_weights(net, tensors, source)
    from .lora import load_lora

    return load_lora(net, tensors, source)


def load_backbone(path: str | Path, backbone: Mapping | None = None) -> nn.Module:
    """A network in eval mode from our safetensors, a U-ViT `.pth`, diffusion_distiller's `checkpoint.pt`, or a
    diffusers folder of a UNet2DModel. Names may be those of a network inside DistributedDataParallel.

    backbone: a `backbone` section to check against, or to use where the file does not describe itself.
    """
    return load_described(path, backbone)[0]


def load_described(path: str | Path, backbone: Mapping | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """As `load_backbone`, with the file's description ({} for U-ViT's and diffusers' files).

    The code of a user's own model is `backbone`'s, whatever file the weights name.
    """
    path = Path(path)
    if path.is_dir():
        return _load_diffusers(path), {}
    tensors, description = read(path)
    if "lora" in description:
        return _with_lora(path, tensors, description, backbone)
    own_model = backbone is not None and backbone["name"] == "factory"
    held = description.get("backbone")
    if held is None:
        section = _foreign_section(unwrapped(tensors), description, backbone)
    else:
        if held["name"] == "factory" and not own_model:
            raise UserError(f"checkpoint {path} holds a model of the user's own ({held.get('factory')}), and weights "
                            "choose no code: use configs/own_model.py and name it by --config.backbone.factory")
        if backbone is not None:
            _same_architecture(path, held, backbone)
        section = backbone if own_model else held
    net = build_backbone(section)
    if held is None and tensors.keys() != net.state_dict().keys():  # a user's own model may have a `module`
        tensors = unwrapped(tensors)
    load_weights(net, tensors, str(path))
    if description:
        description = description | {"backbone": dict(section)}
        if held is None and own_model:
            description.pop("codec")  # the order of the channels is that of the user's own images
    return net.eval(), description


def _with_lora(path: Path, tensors: Mapping[str, Tensor], description: dict[str, Any],
               backbone: Mapping | None) -> tuple[nn.Module, dict[str, Any]]:
    """(the network that a LoRA was trained on, with the LoRA merged into it, the description of the whole)."""
    from .lora import add_lora, fingerprint, load_lora, merge_lora, same_weights

    lora = description["lora"]
    try:
        net, _ = load_described(resolve(lora["base"], "the LoRA's base"), backbone)
    except UserError as error:
        raise UserError(f"checkpoint {path} is a LoRA of {lora['base']!r}, which does not load: {error}") from error
    if not description["backbone"].get("uem"):
        drop_heads(net)  # as the training did, whose base this was
    if not same_weights(fingerprint(net), lora["base_fingerprint"]):
        raise UserError(f"checkpoint {path} is a LoRA of other weights than {lora['base']!r} holds now")
    add_lora(net, lora["rank"], lora["alpha"], lora["targets"])
    load_lora(net, tensors, str(path))
    return merge_lora(net).eval(), {name: value for name, value in description.items() if name != "lora"}


def _foreign_section(tensors: Mapping[str, Tensor], description: Mapping, wanted: Mapping | None) -> Mapping:
    """The `backbone` section of a file that holds none: the config's, if there is one.

    For diffusion_distiller's UNet the file wins; what leaves no trace in its weights is the config's.
    """
    if wanted is None:
        return infer_backbone(tensors)
    if wanted["name"] == "uvit":  # U-ViT's files have no uncertainty heads, AdaDiff's do
        form = infer_form(tensors, wanted["embed_dim"], wanted["depth"] + 1)
        return {name: value for name, value in wanted.items() if name != "uem"} | ({"uem": form} if form else {})
    if not description or wanted["name"] != "ddpm_unet":
        return wanted
    with torch.device("meta"):
        shapes = {name: each.shape for name, each in build_backbone(wanted).state_dict().items()}
    if shapes == {name: each.shape for name, each in tensors.items()}:
        return wanted
    return infer_ddpm_unet(tensors) | {name: wanted[name] for name in ("attn_heads", "dropout") if name in wanted}


def _same_architecture(path: Path, held: Mapping, wanted: Mapping) -> None:
    wanted = json.loads(json.dumps(dict(wanted)))  # tuples become lists, as in the file
    # A student's scale input comes by distillation, from a teacher without; heads come by fine-tuning.
    added = {"guidance_embed", "uem"}
    fields = [name for name in sorted({*held, *wanted} - added) if held.get(name) != wanted.get(name)]
    if held.get("name") == wanted.get("name") == "factory":
        fields = [name for name in fields if name != "factory"]  # the file may have moved; the weights tell
    if fields:
        name = fields[0]
        raise UserError(f"checkpoint {path} is of another architecture: its backbone.{name} is "
                        f"{held.get(name)!r}, the config's {wanted.get(name)!r}; choose another --checkpoint or "
                        "--config")


def _load_diffusers(path: Path) -> nn.Module:
    folder = path / "unet" if (path / "unet").is_dir() else path
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError):
        name = json.loads((folder / "config.json").read_text())["_class_name"]
        if name in ("UNet2DModel", "UNet2D"):
            return BACKBONES["unet2d"]().from_pretrained(folder, use_safetensors=True).eval()
        raise UserError(f"checkpoint={str(path)!r} holds a {name}; a UNet2DModel can be loaded")
    raise UserError(f"checkpoint={str(path)!r}: no training folder and no diffusers folder (config.json)")

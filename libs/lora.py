"""LoRA (2106.09685) on any backbone, by peft: a layer gives W x + (alpha / rank) B A x, and W stays as it is.

One network has two roles: with its LoRA on it is the student, with it off (`AdaptersOff`) the network it was before,
bit for bit.
"""

import base64
import contextlib
import hashlib
import json
import re
import warnings
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn

from .backbones.recompute import Switched
from .errors import UserError
from .files import reason
from .weights import has_lora, refuse_other_tensors

_ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
_TRANSFORMER = (*_ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear", "linear_1",
                "linear_2")
LORA_TARGETS = {  # ends of layers' names, by the name of a class in the network's ancestry
    "UNet2DConditionModel": _ATTENTION,
    # Those without text have attention at few levels, or one: convolutions too.
    "UNet2DModel": (*_ATTENTION, "conv1", "conv2", "conv_shortcut", "time_emb_proj", "conv"),
    "DDPMUNet": ("attention.qkv", "attention.out", "conv1", "conv2", "skip", "resblocks.time.1"),
    "UViT": ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "skip_linear"),
    "PixArtTransformer2DModel": _TRANSFORMER,
    "SD3Transformer2DModel": _TRANSFORMER,
}
TOLERANCE = 2e-2  # relative difference of two fingerprints' weights; rounding to fp16 or bf16 stays below


def family_of(net: nn.Module) -> tuple[str, nn.Module, str]:
    """(name in `net`, network, family) of the first network of a family in LORA_TARGETS, `net` itself or one that it
    wraps; ("", net, "") where there is none.
    """
    for name, module in net.named_modules():
        for cls in type(module).__mro__:
            if cls.__name__ in LORA_TARGETS:
                return name, module, cls.__name__
    return "", net, ""


def add_lora(net: nn.Module, rank: int, alpha: float = 0, targets: Sequence[str] = ()) -> list[str]:
    """Give `net` a LoRA that changes nothing before it is trained; only the LoRA takes gradients from now on.

    alpha: the strength is alpha / rank; 0 is alpha = rank. targets: ends of the names of linear and convolution
    layers; without any, those that LORA_TARGETS has for this family. Returns the targets. A and B are float32, whatever
    the precision of `net` is; A is normal with deviation 1 / rank, from torch's global random state, and B is 0.
    """
    family = family_of(net)[2]
    if has_lora(net):
        raise UserError(f"--config.distill.lora_rank={rank}: a {type(net).__name__} that has a LoRA already; "
                        "merge it first")
    if not targets and not family:
        raise UserError(f"--config.distill.lora_targets: the layers of a {type(net).__name__} are not known, only "
                        f"those of {', '.join(LORA_TARGETS)}; choose from {_ends(net)}")
    for end in targets:
        if not any(f".{name}".endswith(f".{end}") for name in _layers(net)):
            raise UserError(f"--config.distill.lora_targets={end!r}: a {type(net).__name__} has no such linear or "
                            f"convolution layer; choose from {_ends(net)}")
    used = list(targets or LORA_TARGETS[family])
    config = LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=used, init_lora_weights="gaussian")
    try:
        inject_adapter_in_model(config, net)
    except ValueError as error:  # a name that also ends those of layers of another kind; a rank below 1
        raise UserError(f"--config.distill.lora_rank={rank}, --config.distill.lora_targets={','.join(used)}: "
                        f"{reason(error)}") from error
    for layer in _lora_layers(net):  # half precision would round an update away
        nn.ModuleList([layer.lora_A, layer.lora_B]).float()
    return used


def attach_lora(net: nn.Module, tensors: Mapping[str, Tensor], alpha: float, source: str,
                adapter: str = "default") -> None:
    """Give `net` the LoRA `tensors`, named as `lora_state` names them: its layers, rank and values, for inference.

    alpha: 0 is the rank. adapter: peft's name of it, beside others that `net` may have, which stay at work.
    Raises UserError, and leaves `net` as it was, for a LoRA of another network, and beside one that is fused or off.
    """
    ranks = {tensor.shape[0] for name, tensor in tensors.items() if name.endswith(".lora_A.weight")}
    if len(ranks) != 1:
        raise UserError(f"{source}: a LoRA has one rank, this one has {sorted(ranks) or 'none'}")
    rank, others = ranks.pop(), _lora_layers(net)
    layers = sorted({name.rpartition(".lora_")[0] for name in tensors})
    if unknown := sorted({*layers} - _layers(net).keys()):
        raise UserError(f"{source} is a LoRA of another network: the {type(net).__name__} here has no layer "
                        f"{unknown[0]}")
    if any(layer.merged or layer.disable_adapters for layer in others):  # a layer has one state for all that it has
        raise UserError(f"{source}: this {type(net).__name__} has a LoRA that is fused or disabled; undo that, or "
                        "unload it, first")
    active = list(others[0].active_adapters) if others else []
    with _unchanged_gradients(net), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Already found a `peft_config`")
        try:
            inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha or rank, target_modules=layers), net, adapter,
                                    state_dict=dict(tensors))
            for layer in _lora_layers(net):
                layer.set_adapter([*active, adapter])
            load_lora(net, tensors, source, adapter)
        except UserError:
            remove_lora(net, adapter)
            raise
    for tensor in lora_state(dict(net.named_parameters()), adapter).values():
        tensor.requires_grad_(False)


@contextlib.contextmanager
def _unchanged_gradients(net: nn.Module) -> Iterator[None]:
    """What takes gradients in `net` does so afterwards too: peft changes it, which is no business of inference."""
    held = [(each, each.requires_grad) for each in net.parameters()]
    try:
        yield
    finally:
        for each, wanted in held:
            each.requires_grad_(wanted)


def _layers(net: nn.Module) -> dict[str, nn.Module]:
    """What a LoRA can be added to, by the names without one."""
    return {name.removesuffix(".base_layer"): module for name, module in net.named_modules()
            if name and ".lora_" not in name and isinstance(module, nn.Linear | nn.Conv2d)}


def _ends(net: nn.Module) -> str:
    """The last parts of the layers' names, numbers together with what they count."""
    return ", ".join(sorted({re.search(r"[^.]+(\.\d+)*$", name)[0] for name in _layers(net)}))


def _lora_layers(net: nn.Module) -> list[nn.Module]:
    return [module for module in net.modules() if isinstance(module, LoraLayer)]


class AdaptersOff:
    """`net` with its LoRA off, called as `net` is: the network as it was before `add_lora`, bit for bit.

    net   has its LoRA already; it is back on when a call ends, even by an exception
    """

    def __init__(self, net: nn.Module):
        self.net = net
        self.off = dict.fromkeys(_lora_layers(net), True)
        if not self.off:
            raise ValueError(f"this {type(net).__name__} has no LoRA")

    def __call__(self, *args, **kwargs):
        with Switched(self.off):
            return self.net(*args, **kwargs)


def lora_state(net: nn.Module | Mapping[str, Tensor], adapter: str = "") -> dict[str, Tensor]:
    """{name: tensor} of the LoRA alone, such as `mid_block.conv1.lora_A.weight`; the tensors are those of `net`, a
    network or its state dict.

    adapter: peft's name of the one that is meant, where there are several.
    """
    state = net.state_dict() if isinstance(net, nn.Module) else net
    inside = f".{adapter}." if adapter else ""
    return {re.sub(r"(\.lora_[AB])\.[^.]+\.", r"\1.", name): tensor for name, tensor in state.items()
            if ".lora_" in name and inside in name.partition(".lora_")[2]}


def lora_config(net: nn.Module) -> LoraConfig:
    """peft's config (r, lora_alpha, target_modules) of the LoRA of `net`, whatever is wrapped around it."""
    for module in net.modules():
        if hasattr(module, "peft_config"):
            return next(iter(module.peft_config.values()))
    raise ValueError(f"this {type(net).__name__} has no LoRA")


def load_lora(net: nn.Module, tensors: Mapping[str, Tensor], source: str, adapter: str = "") -> None:
    """`lora_state` back into a network with a LoRA; strict, the first difference is named in one line."""
    own = lora_state(net, adapter)
    refuse_other_tensors(own, tensors, f"{source} is a LoRA of another network, or of other layers or rank")
    for name, tensor in own.items():
        tensor.copy_(tensors[name])


@torch.no_grad()
def merge_lora(net: nn.Module) -> nn.Module:
    """W + (alpha / rank) B A in place of every W: `net` itself, a plain network again, and as fast as one."""
    for layer in _lora_layers(net):
        layer.merge()
    return remove_lora(net)


def remove_lora(net: nn.Module, adapter: str = "") -> nn.Module:
    """`net` itself, without its LoRA; `adapter`: without the one of that name, the others as they are."""
    with _unchanged_gradients(net):
        for name, layer in list(net.named_modules()):
            if not isinstance(layer, LoraLayer):
                continue
            if adapter:
                layer.set_adapter([each for each in layer.active_adapters if each != adapter])
                layer.delete_adapter(adapter)  # which would turn another one on in place of one that is active
            if not adapter or not any(len(getattr(layer, each)) for each in layer.adapter_layer_names):
                parent, _, own = name.rpartition(".")
                setattr(net.get_submodule(parent), own, layer.get_base_layer())
    held = vars(net).get("peft_config", {})
    held.pop(adapter, None)
    if not adapter or not held:
        vars(net).pop("peft_config", None)
    return net


def fingerprint(net: nn.Module | Mapping[str, Tensor]) -> str:
    """What tells the weights of a network, or of its state dict, from others: SHA-256 of names and shapes, and the
    middle element of every matrix in fp16. A LoRA does not count.
    """
    state = net.state_dict() if isinstance(net, nn.Module) else net
    base = {name.replace(".base_layer.", "."): tensor for name, tensor in sorted(state.items()) if ".lora_" not in name}
    shapes = json.dumps({name: list(tensor.shape) for name, tensor in base.items()}, sort_keys=True)
    middle = [tensor.detach().flatten()[tensor.numel() // 2].float() for tensor in base.values() if tensor.dim() > 1]
    values = torch.stack(middle).half().cpu().numpy().tobytes()
    return f"{hashlib.sha256(shapes.encode()).hexdigest()[:16]}-{base64.b64encode(values).decode()}"


def same_weights(one: str, other: str) -> bool:
    """Whether two fingerprints are of the same weights, as far as their precisions can tell."""
    (shapes, a), (other_shapes, b) = (text.split("-", 1) for text in (one, other))
    if shapes != other_shapes:
        return False
    a, b = (np.frombuffer(base64.b64decode(values), np.float16).astype(np.float64) for values in (a, b))
    return float(np.linalg.norm(a - b)) <= TOLERANCE * float(np.linalg.norm(a))

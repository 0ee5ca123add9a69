"""What weights a network has: their names, their shapes, and a digest of them."""

import hashlib
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from .errors import UserError


def refuse_other_tensors(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor], problem: str) -> None:
    """Raise UserError, `problem` and the first difference, where `tensors` differ from `own` in names or shapes."""
    found = [f"{name} is missing" for name in own if name not in tensors]
    found += [f"{name} is unknown" for name in tensors if name not in own]
    found += [f"{name} has shape {tuple(tensors[name].shape)}, the network wants {tuple(own[name].shape)}"
              for name in own if name in tensors and tensors[name].shape != own[name].shape]
    if found:
        more = f" (and {len(found) - 1} more differences)" if len(found) > 1 else ""
        raise UserError(f"{problem}: {found[0]}{more}")


def weights_digest(net: nn.Module) -> str:
    """SHA-256 of every tensor's name, type, shape and bits."""
    digest = hashlib.sha256()
    for name, each in net.state_dict().items():
        digest.update(f"{name} {each.dtype} {tuple(each.shape)}\n".encode())
        digest.update(each.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def has_lora(net: nn.Module) -> bool:
    """Whether a LoRA's weights are among them."""
    return any(".lora_" in name for name, _ in net.named_parameters())

"""Gradient checkpointing that recomputes a block with its LoRA as it was in the forward pass, on or off."""

import contextlib
from collections.abc import Callable, Mapping

import torch
from torch import nn
from torch.utils import checkpoint as torch_checkpoint

from ..errors import UserError

OFF = "_disable_adapters"  # the attribute by which peft's layers leave out what was added to them


class Switched:
    """A context in which LoRA layers are off or on, as `off` says of each; afterwards they are as they were."""

    def __init__(self, off: Mapping[nn.Module, bool]):
        self.off, self.before = off, {}

    def __enter__(self) -> None:
        self.before = {layer: getattr(layer, OFF) for layer in self.off}
        for layer, off in self.off.items():
            setattr(layer, OFF, off)

    def __exit__(self, *error) -> None:
        for layer, off in self.before.items():
            setattr(layer, OFF, off)


def checkpoint(function: Callable, *args, use_reentrant: bool = False, **options):
    """`torch.utils.checkpoint` of a module, or of a method of one.

    The backward pass runs with LoRA on, whatever the pass was whose activations it recomputes: without this, gradients
    through a teacher (LoRA off) would be those through the student. A compiled graph has either built in, and what it
    recomputes is the graph itself; the compiler takes no context besides.
    """
    if torch.compiler.is_compiling():
        return torch_checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant, **options)
    block = function if isinstance(function, nn.Module) else function.__self__
    off = {layer: getattr(layer, OFF) for layer in block.modules() if hasattr(layer, OFF)}
    if off:
        options["context_fn"] = lambda: (contextlib.nullcontext(), Switched(off))
    return torch_checkpoint.checkpoint(function, *args, use_reentrant=use_reentrant, **options)


def recompute_activations(net: nn.Module) -> None:
    """Trade time for memory: activations are computed again in the backward pass."""
    blocks = [module for module in net.modules() if hasattr(module, "use_checkpoint")]
    models = [module for module in net.modules() if getattr(module, "_supports_gradient_checkpointing", False)]
    if not blocks and not models:
        raise UserError(f"--config.train.grad_checkpoint=True: {type(net).__name__} has no such option")
    for block in blocks:
        block.use_checkpoint = True
    for model in models:  # diffusers'
        model.enable_gradient_checkpointing(checkpoint)

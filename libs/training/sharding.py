"""Sharded training (FSDP, 2304.11277), as `accelerate launch --use_fsdp` asks for it, by torch's `fully_shard`.

Every process holds a part of each weight, of its gradient, of the optimizer's moments and of the average. A block
gathers its weights while it runs, forward and backward. What is written to disk is whole, as one process writes it.
"""

import contextlib
import copy
import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from ..checkpoint import learned_state
from ..errors import UserError, choose
from ..processes import Processes
from ..weights import has_lora, refuse_other_tensors

RESHARD = {"true": True, "full_shard": True, "1": True,  # after the forward pass, in words of FSDP's two versions
           "false": False, "shard_grad_op": False, "2": False}


def _diffusers_unet(net: nn.Module) -> list[nn.Module | None]:
    return [*net.down_blocks, net.mid_block, *net.up_blocks]


UNITS: dict[str, Callable[[nn.Module], list[nn.Module | None]]] = {  # by the name of a class in a module's ancestry
    "UViT": lambda net: net.block_list(),
    "DDPMUNet": lambda net: [*net.down, *net.mid, *net.up],
    "UNet2DModel": _diffusers_unet,
    "UNet2DConditionModel": _diffusers_unet,
    "PixArtTransformer2DModel": lambda net: [*net.transformer_blocks],
    "SD3Transformer2DModel": lambda net: [*net.transformer_blocks],
}


def asked_for(processes: int) -> bool:
    """Whether the launcher wants the network sharded, and there are processes to share it."""
    return processes > 1 and _launcher("ACCELERATE_USE_FSDP") == "true"


def read_launcher(config: ConfigDict, precision: str, alone: bool = True) -> bool:
    """Whether a block parts its weights again after its forward pass. Raises UserError for what is not served.

    Which blocks there are is the network's affair (`UNITS`), and checkpoints are whole: the launcher's wrap policy and
    state dict type say nothing here.

    alone: whether nothing learns beside the network, since torch unscales gradients of one kind, sharded or not.
    """
    if precision == "fp16" and not alone:
        raise UserError("accelerate launch --use_fsdp --mixed_precision=fp16: a discriminator learns beside the "
                        "sharded network, and their gradients are not scaled together; use bf16 or no")
    if config.compute.compile:
        raise UserError("--config.compute.compile=True: a network that accelerate launch --use_fsdp shards is not "
                        "compiled; leave one of them out")
    for option, instead in (("offload_params", "leave it out"),
                            ("activation_checkpointing", "use --config.train.grad_checkpoint=true")):
        if _launcher(f"FSDP_{option.upper()}") == "true":
            raise UserError(f"accelerate launch --fsdp_{option}=true is not served; {instead}")
    return all(choose(f"accelerate launch --{option}", _launcher(option.upper(), "true"), RESHARD)
               for option in ("fsdp_sharding_strategy", "fsdp_reshard_after_forward"))


def _launcher(name: str, usual: str = "false") -> str:
    return os.environ.get(name, usual).lower()


def shard(net: nn.Module, processes: Processes, reshard: bool = True) -> None:
    """Part the network among the processes, in place: its parameters become `DTensor`s, under their own names.

    reshard: whether a block parts its weights again after its forward pass, else after the backward pass.
    """
    blocks, total = units(net), sum(each.numel() for each in net.parameters())
    options = {"mesh": init_device_mesh(processes.device.type, (processes.count,)), "reshard_after_forward": reshard}
    try:
        for block in blocks:
            fully_shard(block, **options)
        fully_shard(net, **options)
    except ValueError as error:  # parameters without a dimension
        raise UserError(f"accelerate launch --use_fsdp: {error}") from error
    # What to gather next in a backward pass. By itself, torch takes it from the calls before, which differ among
    # processes where each has called the whole network by itself.
    for block, after in zip([net, *blocks], [*blocks, net], strict=True):
        if after is not block:
            after.set_modules_to_backward_prefetch([block])
    held = sum(local(each).numel() for each in net.parameters())
    logging.info("sharded: %s of %s parameters here, gathered in %d parts", f"{held:,}", f"{total:,}", len(blocks) + 1)


def units(net: nn.Module) -> list[nn.Module]:
    """The blocks of a network that gather their weights each by itself, in the order in which they run; what is in no
    block is gathered during the whole pass, and so is all of a network of an unknown family.
    """
    for module in net.modules():  # outermost first
        for cls in type(module).__mro__:
            if cls.__name__ in UNITS:
                return [block for block in UNITS[cls.__name__](module) if block is not None]
    return []


@contextlib.contextmanager
def unsharded(net: nn.Module, reshard: bool = True) -> Iterator[None]:
    """Every process holds the whole network inside, and calls it without gradients as often as it likes. All of them
    come here together.

    reshard: as `shard` was told.
    """
    parts = [module for module in net.modules() if isinstance(module, FSDPModule)]
    for part in parts:
        part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            part.set_reshard_after_forward(reshard, recurse=False)


def local(tensor: Tensor) -> Tensor:
    """This process's part of a sharded tensor, in the same memory; any other as it is."""
    return tensor.detach().to_local() if isinstance(tensor, DTensor) else tensor


def whole(tensor: Tensor) -> Tensor:
    """The shards of all processes put together, on every process; any other tensor as it is. All of them come here
    together.
    """
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def gathered(value: Any, keep: bool) -> Any:
    """Likewise every tensor of a dict of dicts, one after the other, those that were sharded in host memory.

    keep: whether this process wants them, else it gets None for those.
    """
    if isinstance(value, Mapping):
        return {name: gathered(each, keep) for name, each in value.items()}
    if not isinstance(value, DTensor):
        return value
    full = whole(value)
    return full.cpu() if keep else None


def shards(tensors: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """This process's parts of whole tensors, of those that are sharded in `own`."""
    return {name: _like(tensor, own.get(name)) for name, tensor in tensors.items()}


def optimizer_shards(state: Mapping[int, Mapping], optimizer: torch.optim.Optimizer) -> dict[int, dict]:
    """Likewise the moments of an optimizer, which are sharded as the parameters are."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]
    return {index: {name: _like(value, parameters[index]) for name, value in held.items()}
            for index, held in state.items()}


def _like(tensor: Any, own: Any) -> Any:
    if not isinstance(own, DTensor) or not isinstance(tensor, Tensor) or tensor.shape != own.shape:
        return tensor
    tensor = tensor.to(own.device)
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)  # each has read the file


class ShardedEMA:
    """As `EMA`, of a network that is sharded after this is made; `follow` comes then.

    net   a plain network on the device, in eval mode, which has weights inside `whole` only
    """

    def __init__(self, net: nn.Module, decay: float, device: torch.device):
        self.decay, self.device = decay, device
        self.net = copy.deepcopy(net).eval().requires_grad_(False)
        self._forget()
        for each in self.net.buffers():
            each.data = each.to(device)

    def follow(self, net: nn.Module) -> None:
        """net: the sharded network."""
        followed, lora = net.state_dict(), has_lora(net)  # tensors that share memory with the network's
        learning = [name for name, tensor in followed.items()
                    if self.decay and tensor.is_floating_point() and (".lora_" in name or not lora)]
        self._tensors = {**followed} | {name: followed[name].clone() for name in learning}
        self._average, self._source = ([local(held[name]) for name in learning] for held in (self._tensors, followed))

    @torch.no_grad()
    def update(self) -> None:
        """average = decay * average + (1 - decay) * weights, of this process's parts."""
        if self._average:
            torch._foreach_lerp_(self._average, self._source, 1 - self.decay)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint holds of it, sharded."""
        return learned_state(self.net, self._tensors)

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor], source: str) -> None:
        own = self.state()
        refuse_other_tensors(own, tensors, f"{source} is of another architecture")
        for name, tensor in shards(tensors, own).items():
            own[name].copy_(tensor)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        """`net` has its weights inside, on every process. All of them come here together."""
        for name, each in self.net.named_parameters(remove_duplicate=False):
            each.data = whole(self._tensors[name])
        for name, each in self.net.named_buffers():
            each.copy_(self._tensors.get(name, each))
        try:
            yield
        finally:
            self._forget()

    def _forget(self) -> None:
        """The parameters keep their shapes, in the memory of one number, with which no sampling goes unnoticed."""
        for each in self.net.parameters():
            each.data = each.new_full((), math.nan, device=self.device).expand(each.shape)

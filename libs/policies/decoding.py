"""Parallel decoding: encoder propagation's decoders of the steps up to the next key step, as one batch.

Faster Diffusion (2312.09608), parallel encoder propagation: between two key steps the decoder reads the key step's
encoder features and the time, nothing of x_t, so the outputs of those steps are made before the sampler gets there.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..errors import UserError, is_out_of_memory
from .clocks import Position
from .hooks import outside
from .trees import equal, repeat_argument, tensor_map

BATCHED = ("encoder_hidden_states", "class_labels", "timestep_cond", "attention_mask", "added_cond_kwargs",
           "down_block_additional_residuals", "mid_block_additional_residual", "down_intrablock_additional_residuals",
           "encoder_attention_mask", "y", "context", "guidance", "concat", "vector")  # arguments with one row an image


@dataclass
class Ahead:
    """What one guidance branch has of the steps to come: step -> output, and what they were made for."""

    outputs: dict[int, Any] = field(default_factory=dict)
    condition: tuple[Any, ...] = ()


class ParallelDecoding:
    """How a network decodes several steps in one call of its forward, and which of their outputs may be used.

    names    the arguments of the network's forward by name: its input, its time, the rest
    is_full  (index, total) -> whether step `index` runs the whole network, as of `Settings`
    window   steps in one batch at most; halved when a batch does not fit in memory
    warn     says something once
    """

    def __init__(self, names: list[str], is_full: Callable[[int, int | None], bool], window: int,
                 warn: Callable[[str], None]):
        self.names, self.is_full, self.window, self.warn = names, is_full, window, warn
        self.counts = {"decoder_batches": 0, "decoded_steps": 0}

    def steps(self, where: Position) -> list[int]:
        """The steps up to the next key step, none of which depends on its x_t."""
        if where.times is None:
            raise UserError("policy.parallel=True needs the times to come, which this network's caller does not give; "
                            "use apply_policy(pipe, ...), start(times), or parallel=False")
        ahead = range(where.index + 1, where.total)
        return list(itertools.takewhile(lambda step: not self.is_full(step, where.total), ahead))

    @outside
    def widened(self, given: dict, where: Position, window: list[int]) -> dict:
        """Arguments of one call that decodes the k steps of `window`: k b rows, one step after another."""
        times = where.times[window[0]:window[-1] + 1]
        sample, timestep = given[self.names[0]], given[self.names[1]]
        k, b = len(window), len(sample)
        _refuse_unbatchable(given)
        wide = {name: repeat_argument(value, k) if name in BATCHED else value for name, value in given.items()}
        wide[self.names[0]] = sample.repeat(k, *[1] * (sample.dim() - 1))  # its values do not matter
        times = times.to(sample.device, timestep.dtype if isinstance(timestep, Tensor) else times.dtype)
        rows = times.repeat_interleave(b) if times.dim() == 1 else times.repeat(1, b // times.shape[1]).flatten()
        wide[self.names[1]] = rows
        return wide

    @outside
    def keep(self, ahead: Ahead, window: list[int], decoded: Any) -> None:
        """Keep each step's rows of what the batch gave."""
        k = len(window)
        for i, step in enumerate(window):
            ahead.outputs[step] = tensor_map(lambda x, i=i: x.chunk(k)[i].clone(), decoded)
        self.counts["decoder_batches"] += 1
        self.counts["decoded_steps"] += len(window)

    @outside
    def shrink(self, error: Exception, window: list[int]) -> None:
        """Halve the batches after `error`, raised again if it is not of memory or nothing is left to halve."""
        if not is_out_of_memory(error) or len(window) == 1:
            raise error
        self.window = len(window) // 2
        self.warn(f"a decoder batch of {len(window)} steps does not fit in memory; going on with "
                  f"max_parallel={self.window}")

    def take(self, ahead: Ahead, index: int, condition: tuple[Any, ...]) -> Any:
        """The output of step `index`, None where there is none. If a callback changed the prompt or LoRA's scale,
        all that were made ahead go.
        """
        if not all(map(equal, ahead.condition, condition)):
            ahead.outputs.clear()
        return ahead.outputs.pop(index, None)


def condition_of(given: dict, announced: bool, replayed_control: bool) -> tuple[Any, ...]:
    """What an output depends on beside the features and the time.

    Of what is made anew for each step only the shapes, lest the host waits for the device to compare it: an adapter's
    residuals are copies of one another, and a ControlNet that we replay tells when they change. `announced`: `start`
    announces a loop of one condition, which guidance and casts put together anew at each call.
    """
    made_anew = {"down_intrablock_additional_residuals"}
    if announced:
        made_anew.update(BATCHED)
    elif replayed_control:
        made_anew |= {"down_block_additional_residuals", "mid_block_additional_residual"}
    # cross_attention_kwargs: LoRA's scale, in a copy that stays as it is; tensors in it are refused elsewhere.
    made_anew.add("cross_attention_kwargs")
    return tuple(tensor_map(lambda x: x.shape, given.get(name)) if name in made_anew else given.get(name)
                 for name in (*BATCHED, "cross_attention_kwargs"))


def _refuse_unbatchable(given: dict) -> None:
    """Raise a UserError for arguments whose rows nobody can repeat."""
    extra = given.get("cross_attention_kwargs") or {}
    tensors: list[Tensor] = []
    tensor_map(tensors.append, dict(extra))
    if tensors:
        raise UserError(f"policy.parallel=True: cross_attention_kwargs with tensors ({', '.join(extra)}) cannot be "
                        "decoded in one batch; use parallel=False")

"""The processes of `accelerate launch` (or torchrun), which share the seeds among them; one with plain `python`."""

from datetime import timedelta
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object
from torch import Tensor

TIMEOUT = timedelta(days=1)


class Processes:
    """This process among `count`.

    rank     its number; 0 writes the results
    device   where it computes: its own GPU where several processes run on GPUs
    """

    def __init__(self, device: torch.device):
        # cpu: else two processes without a GPU do not find each other. timeout: one may be done long before another.
        self._state = PartialState(cpu=device.type == "cpu", timeout=TIMEOUT)
        self._hosts = None  # a process group over host memory
        self.rank, self.count = self._state.process_index, self._state.num_processes
        self.is_main = self.rank == 0
        self.device = self._state.device if self.count > 1 else device

    def share(self, seeds: list[int], rows: int) -> list[int]:
        """This process's part of `seeds`, in whole groups of `rows`, so that few calls are padded."""
        groups = [seeds[start:start + rows] for start in range(0, len(seeds), rows)]
        return [seed for group in groups[self.rank::self.count] for seed in group]

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum over the processes of a tensor that lies on `device`; on every process."""
        if self.count > 1:
            torch.distributed.all_reduce(tensor)
        return tensor

    def mean(self, tensor: Tensor) -> Tensor:
        """Likewise, their mean."""
        return self.sum(tensor) / self.count if self.count > 1 else tensor

    def agree(self, value: int) -> int:
        """The largest of the processes' values, on every process; none waits for its device."""
        if self.count == 1:
            return value
        if self._hosts is None:
            self._hosts = torch.distributed.new_group(backend="gloo", timeout=TIMEOUT)
        shared = torch.tensor(value, dtype=torch.int64)
        torch.distributed.all_reduce(shared, torch.distributed.ReduceOp.MAX, group=self._hosts)
        return int(shared)

    def gather(self, value: Any) -> list[Any]:
        """What each process gave, in the order of the processes; on every process."""
        return gather_object([value]) if self.count > 1 else [value]

    def close(self) -> None:
        """Part from the others: each goes on, or ends, alone."""
        if self.count > 1:
            self._state.destroy_process_group()

"""How much memory tensors take at most, on any device."""

import os
from itertools import accumulate

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from .benchmark import PeakMemory


class PeakTensors:
    """Most memory of tensors in a `with` block in MiB, weights included: on a GPU as torch tells, on a CPU by a record
    of every allocation, since the system's own numbers are too coarse. `mib` is None on other devices.
    """

    def __init__(self, net: nn.Module, device: torch.device):
        self.device = device
        self.weights = sum(each.nbytes for each in [*net.parameters(), *net.buffers()])

    def __enter__(self):
        if self.device.type == "cpu":
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it tells of every start and stop
            self._record = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
            self._record.__enter__()
        else:
            self._peak = PeakMemory(self.device)
            self._peak.__enter__()
        return self

    def __exit__(self, *error):
        if self.device.type != "cpu":
            self._peak.__exit__(*error)
            self.mib = self._peak.mib
            return
        self._record.__exit__(*error)
        events = [event for event in self._record.profiler.kineto_results.events() if event.name() == "[memory]"]
        taken = accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns()))
        self.mib = (self.weights + max(taken, default=0)) / 2**20

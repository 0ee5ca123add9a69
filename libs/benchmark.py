"""How fast a chain samples: images a second, latency, memory, and what the loop costs beside its network."""

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .errors import UserError
from .generate import Chain

PROTOCOL = ("a timed loop goes from seeds to uint8 images on the device: noise, sampler, network, codec; {warm_up} "
            "untimed loop, then the median of {repeats} loops, the device synchronised before and after each; "
            "images_per_second = rows / (nfe * seconds_per_call), where seconds_per_call = seconds of a loop / its "
            "nfe_timed network calls; loop_over_network = seconds of a loop / seconds inside its network calls, "
            "both of the same loop ({clock})")
TEXTS = "; prompts are embedded before the timed loops"
CLOCKS = {"cuda": "CUDA events around each call", "cpu": "the host's clock around each call"}
SYNCHRONISED = "the host's clock around each call, the device synchronised"
WARM_UP = 1


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class CallClock:
    """Stands in for a network (or a policy) and takes the time inside its calls.

    CUDA events lie in the stream beside the kernels, so they need no wait that would slow the loop down. They
    also take in the gaps in which the device waits for the host to launch the network's own kernels.
    """

    def __init__(self, net: Callable[..., Tensor], device: torch.device):
        self.net, self.device = net, device
        self.marks: list[tuple[Any, Any]] = []

    def __call__(self, *args, **kwargs) -> Tensor:
        start = self._mark()
        out = self.net(*args, **kwargs)
        self.marks.append((start, self._mark()))
        return out

    def _mark(self):
        if self.device.type == "cuda":
            event = torch.cuda.Event(enable_timing=True)
            event.record(torch.cuda.current_stream(self.device))
            return event
        synchronize(self.device)
        return time.perf_counter()

    def seconds(self) -> float:
        """Time inside all calls so far; the device must be synchronised."""
        if self.device.type == "cuda":
            return sum(start.elapsed_time(end) for start, end in self.marks) / 1000
        return sum(end - start for start, end in self.marks)


def timed_loop(chain: Chain, seeds: list[int], labels: list[int] | None = None) -> tuple[float, float]:
    """(seconds from the seeds to their images, seconds of these inside the network's calls)."""
    clock = CallClock(chain.denoiser.net, chain.device)
    denoiser = copy.copy(chain.denoiser)
    denoiser.net = clock
    chain = replace(chain, denoiser=denoiser)
    synchronize(chain.device)
    start = time.perf_counter()
    for _ in chain.images(seeds, labels):
        synchronize(chain.device)
    seconds = time.perf_counter() - start
    return seconds, clock.seconds()


class PeakMemory:
    """Peak memory of a `with` block in MiB: allocated on a GPU; on a CPU the growth of the resident memory.

    `mib` is None where the system does not tell (a CPU without Linux's /proc). `whole_mib` counts what was there
    before, too: on a CPU the peak of the resident memory itself.
    """

    def __init__(self, device: torch.device):
        self.device, self.mib, self.whole_mib = device, None, None

    def __enter__(self):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        elif self.device.type == "cpu":
            try:
                Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to the present size
                self._before = _resident("VmRSS")
            except OSError:
                self._before = None
        return self

    def __exit__(self, *error):
        if self.device.type == "cuda":
            self.mib = self.whole_mib = torch.cuda.max_memory_allocated(self.device) / 2**20
        elif self.device.type == "cpu" and self._before is not None:
            self.whole_mib = _resident("VmHWM")
            self.mib = max(0.0, self.whole_mib - self._before)


def _resident(field: str) -> float:
    """A memory field of this process in MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:")) / 1024


def check_benchmark(rows: Sequence[int], steps: int, repeats: int) -> None:
    """Refuse what `benchmark` cannot do, before hours of sampling."""
    if repeats < 2:
        raise UserError(f"eval.benchmark_repeats={repeats} must be at least 2: quartiles are reported")
    if not rows or min(rows) < 1:
        raise UserError(f"eval.benchmark_rows={tuple(rows)}: want numbers of at least 1")
    if steps < 0:
        raise UserError(f"eval.benchmark_steps={steps} must be at least 1, or 0 for all")


def benchmark(chain: Chain, timed: Chain, rows: Sequence[int] = (1, 16), repeats: int = 5) -> dict[str, Any]:
    """Time loops at each number of `rows`, and at 1 for the latency.

    timed: the chain whose loops are timed: `chain` itself, or the same with fewer sampler steps; then times
        scale with the network calls, which the result says (`nfe_timed` beside `nfe`).

    Returns what `PROTOCOL` explains; per batch also `latency_ms` of a whole image (median and quartiles) and
    `peak_memory_mib`.
    """
    sizes = sorted({1, *rows})
    with tqdm(total=len(sizes) * (WARM_UP + repeats), desc="benchmark", unit="loop") as bar:
        batches = [_time_batch(timed, size, chain.nfe, repeats, bar) for size in sizes]
    device = chain.device.type
    memory = {"cuda": "peak_memory_mib: most memory allocated by torch, weights included",
              "cpu": "peak_memory_mib: growth of the resident memory over the loops, weights not included"}
    clock = CLOCKS.get(device, SYNCHRONISED)
    return {"protocol": PROTOCOL.format(warm_up=WARM_UP, repeats=repeats, clock=clock)
            + (TEXTS if chain.texts([0]) is not None else "") + (f"; {memory[device]}" if device in memory else ""),
            "nfe": chain.nfe, "nfe_timed": timed.nfe, "repeats": repeats,
            "latency_ms": batches[0]["latency_ms"], "batches": batches}


def _time_batch(chain: Chain, rows: int, nfe: int, repeats: int, bar: tqdm) -> dict[str, Any]:
    chain = replace(chain, rows=rows)
    seeds = list(range(rows))
    labels = [seed % chain.num_classes for seed in seeds] if chain.num_classes else None
    times = []
    with PeakMemory(chain.device) as memory:
        for _ in range(WARM_UP + repeats):
            times.append(timed_loop(chain, seeds, labels))
            bar.update()
    times = times[WARM_UP:]
    loops = [seconds / chain.nfe for seconds, _ in times]  # seconds a call
    low, middle, high = (1000 * nfe * each for each in quantiles(loops, n=4, method="inclusive"))
    return {"rows": rows,
            "images_per_second": rows / (nfe * median(loops)),
            "latency_ms": {"median": middle, "lower_quartile": low, "upper_quartile": high},
            "seconds_per_call": median(loops),
            "loop_over_network": median(seconds / inside for seconds, inside in times),
            "peak_memory_mib": memory.mib}

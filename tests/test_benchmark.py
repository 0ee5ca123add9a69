"""The benchmark's arithmetic, on a clock that the test turns: no timings."""

import mmap
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from libs import benchmark as bench
from libs import build
from libs import config as config_files
from libs.backbones import UViT
from libs.errors import UserError


@pytest.fixture
def clock(monkeypatch):
    """Seconds that pass only where the test says so."""
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(bench.time, "perf_counter", lambda: clock.now)
    return clock


@pytest.fixture
def chain(clock):
    """Four network calls of 2 s + 0.25 s a row each, and 1 s a loop outside of them."""
    config = config_files.load("configs/cifar10_uvit_tiny.py")
    config.unlock()
    config.update({"sampler": {"steps": 4}, "data": {"image_size": 8}, "compute": {"rows": 4}})
    config.cond.update(num_classes=3, null_label=3)
    net = UViT(img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=1)
    chain = build.make_chain(config, net, build.describe(config), torch.device("cpu"))

    def slow(x, timesteps, y=None, context=None):
        clock.now += 2 + 0.25 * len(x)
        return torch.zeros_like(x)

    def decode(x, decode=chain.codec.decode):
        clock.now += 1
        return decode(x)

    chain.denoiser.net = slow
    chain.codec = SimpleNamespace(decode=decode)
    return chain


def test_one_loop(chain):
    assert bench.timed_loop(replace(chain, rows=2), [0, 1], [0, 1]) == (4 * 2.5 + 1, 4 * 2.5)
    assert bench.timed_loop(replace(chain, rows=8), list(range(8)), [0] * 8) == (4 * 4 + 1, 4 * 4)


def test_whole_loops(chain):
    result = bench.benchmark(chain, chain, rows=(8, 2), repeats=3)
    assert [batch["rows"] for batch in result["batches"]] == [1, 2, 8]  # 1 is always timed
    assert (result["nfe"], result["nfe_timed"], result["repeats"]) == (4, 4, 3)
    one, _, eight = result["batches"]
    assert one["latency_ms"] == {"median": 10_000, "lower_quartile": 10_000, "upper_quartile": 10_000}
    assert result["latency_ms"] == one["latency_ms"]
    assert eight["images_per_second"] == pytest.approx(8 / 17)
    assert eight["seconds_per_call"] == pytest.approx(17 / 4)
    assert eight["loop_over_network"] == pytest.approx(17 / 16)


def test_fewer_steps_scale_with_the_calls(chain):
    section = {"name": "ddim", "order": 1, "steps": 2, "grid": "uniform", "t_start": 1.0, "t_end": 0.0}
    two = replace(chain, ts=build.make_times(section, chain.denoiser.schedule))
    result = bench.benchmark(chain, two, rows=(4,), repeats=2)
    assert (result["nfe"], result["nfe_timed"]) == (4, 2)
    batch = result["batches"][-1]
    assert batch["seconds_per_call"] == pytest.approx((2 * 3 + 1) / 2)
    assert batch["images_per_second"] == pytest.approx(4 / (4 * 3.5))
    assert batch["latency_ms"]["median"] == pytest.approx(4 * 3500)


def test_median_and_quartiles_leave_the_warm_up_out(chain, clock, monkeypatch):
    seconds = iter([1000.0, 8.0, 4.0, 16.0, 20.0, 12.0])
    monkeypatch.setattr(bench, "timed_loop", lambda *args: (next(seconds), 4.0))
    [batch] = bench.benchmark(chain, chain, rows=(1,), repeats=5)["batches"]
    assert batch["latency_ms"] == {"median": 12_000, "lower_quartile": 8_000, "upper_quartile": 16_000}
    assert batch["loop_over_network"] == 3.0


def test_the_chain_is_left_as_it_was(chain):
    net = chain.denoiser.net
    bench.benchmark(chain, chain, rows=(1,), repeats=2)
    assert chain.denoiser.net is net
    assert chain.rows == 4


def test_peak_memory():
    with bench.PeakMemory(torch.device("cpu")) as nothing:
        pass
    # 64 MiB of new pages: malloc may have kept as much from other tests.
    with bench.PeakMemory(torch.device("cpu")) as memory, mmap.mmap(-1, 2**26) as pages:
        for at in range(0, 2**26, mmap.PAGESIZE):
            pages[at] = 1
    if not Path("/proc/self/clear_refs").exists():
        assert memory.mib is None
        return
    assert nothing.mib < 8
    assert 56 < memory.mib < 128


@pytest.mark.parametrize(("arguments", "line"), [
    (((1,), 0, 1), "eval.benchmark_repeats=1 must be at least 2"),
    (((), 0, 5), r"eval.benchmark_rows=\(\): want numbers"),
    (((4, 0), 0, 5), r"eval.benchmark_rows=\(4, 0\): want numbers"),
    (((4,), -1, 5), "eval.benchmark_steps=-1 must be at least 1, or 0"),
])
def test_bad_settings(arguments, line):
    with pytest.raises(UserError, match=line):
        bench.check_benchmark(*arguments)

"""The speed benchmark's counts and arithmetic on a network that takes no time: no timings."""

import json
from types import SimpleNamespace

import pytest
import torch

from libs.errors import UserError
from libs.pipelines import speed, untrained


def test_the_full_network_is_that_of_stable_diffusion_15():
    with torch.device("meta"):
        net = untrained.unet()
    assert sum(each.numel() for each in net.parameters()) == 859_520_964


REFERENCE = """
class ClockworkWrapper:
    # every clock-th call since the last reset runs, the others repeat it
    def __init__(self, unet, clock):
        self.unet, self.clock, self.calls, self.config = unet, clock, 0, unet.config

    def reset(self):
        self.calls = 0

    def modules(self):
        return self.unet.modules()

    def __call__(self, *args, **kwargs):
        if self.calls % self.clock == 0:
            self.held = self.unet(*args, **kwargs)
        self.calls += 1
        return self.held
"""


def test_a_run(tmp_path, run_main):
    (tmp_path / "clockwork.py").write_text(REFERENCE)
    out = tmp_path / "speed.json"
    ran = run_main(speed.main, "--width=tiny", "--latent=8", "--steps=5", "--repeats=2", "--dtype=fp32", "--device=cpu",
                   "--policies=clockwork:4,encoder_propagation:parallel:1", f"--reference={tmp_path}", f"--out={out}")
    assert ran.status == 0, ran.stderr
    result = json.loads(out.read_text())
    rows = {row["policy"]: row for row in result["policies"]}
    assert list(rows) == ["plain", "clockwork:4", "reference_clockwork:4", "encoder_propagation:parallel:1"]
    assert rows["plain"]["time_ratio"] == rows["plain"]["macs_ratio"] == 1
    assert rows["plain"]["bookkeeping"] == 0
    assert rows["reference_clockwork:4"]["macs_ratio"] == 0.4  # it was reset before every loop
    assert 0.4 < rows["clockwork:4"]["macs_ratio"] < rows["encoder_propagation:parallel:1"]["macs_ratio"] < 1
    calls = rows["clockwork:4"]["calls_of_a_loop"]
    assert (calls["full_calls"], calls["reuse_calls"]) == (2, 3)
    for row in rows.values():
        assert row["ms"]["lower_quartile"] <= row["ms"]["median"] <= row["ms"]["upper_quartile"]
        assert 0 < row["ms_outside"] < row["ms"]["upper_quartile"]
    assert ran.stdout.strip() == speed.read_table([out])
    assert "| clockwork:4 |" in ran.stdout


def test_ratios_are_of_the_same_round():
    def runner(*times):
        device = torch.device("cpu")
        return SimpleNamespace(name="", device=device, times=[speed.Times(*each) for each in times], gmacs=3.0,
                               calls={}, peak_mib=None)

    base = runner((1.0, 0.9, 8.0), (2.0, 1.8, 4.0), (4.0, 3.6, 1.0))
    row = speed.row(runner((0.5, 0.3, 2.0), (1.0, 0.6, 2.0), (1.0, 0.4, 2.0)), base)
    assert (row["time_ratio"], row["processor_time_ratio"]) == (0.5, 0.5)
    assert row["ms"] == {"lower_quartile": 750, "median": 1000, "upper_quartile": 1000}
    assert row["ms_outside"] == pytest.approx(400)
    assert row["bookkeeping"] == pytest.approx(0.2)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_networks_stay_whole_behind_the_clock():
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    class Net(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x) + x

    net = Net(4, 4)
    clock = net.forward = speed.NetworkClock(net.forward, torch.device("cpu"))
    compiled = torch.compile(net, backend=backend)
    for _ in range(3):
        compiled(torch.ones(1, 4))
    assert len(graphs) == 1
    assert len(clock.marks) == 3


@pytest.mark.parametrize(("flag", "line"), [
    ("--policies=clockwork", "--policies=clockwork: want"),
    ("--policies=clockwork:0", "--policies=clockwork:0: '0' must be a whole number of at least 1"),
    ("--policies=encoder_propagation:serial", "--policies=encoder_propagation:serial: want"),
    ("--policies=plane", "--policies='plane' is unknown; choose from plain, "),
    ("--latent=12", "--latent=12 must be a multiple of 8"),
    ("--dtype=fp8", "--dtype=fp8: want one of fp32, "),
    ("--reference=nowhere", "--reference=nowhere: there is no module `clockwork`"),
    ("--compile --compile_mode=fast", "--compile_mode='fast' is unknown"),
])
def test_bad_flags_in_one_line(flag, line, run_main, tmp_path):
    ran = run_main(speed.main, *flag.split(), "--width=tiny", f"--out={tmp_path}/speed.json")
    assert ran.status == 2
    assert ran.stderr.startswith(f"error: {line}")
    assert ran.stderr.count("\n") == 1


def test_what_is_no_result(tmp_path):
    (tmp_path / "none.json").write_text('{"policies": [{}]}')
    with pytest.raises(UserError, match="none.json is no result of libs.pipelines.speed"):
        speed.read_table([tmp_path / "none.json"])

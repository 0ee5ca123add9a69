"""The speed of early exit: what is timed, at which exits, and what is made of the times (no timing is checked)."""

import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_exits
import torch

from libs import build
from libs import config as config_files
from libs.exits import speed as exit_speed
from libs.exits.random_heads import leaving_share, needed_biases
from libs.exits.speed import Released, Variant, goal
from libs.exits.watch import every_layer, plain_denoiser, watch
from libs.peak_tensors import PeakTensors
from libs.policies.exit_schedule import depths_of

LAYERS, CALLS = 5, 6
VARIANTS = ["full", "schedule", "schedule_never", "per_sample", "per_sample_never", "released"]


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_exits.write(tmp_path_factory.mktemp("tiny"))


def load(path, **policy):
    config = config_files.load(f"{path}:early_exit")
    config.policy.update(policy)
    net, description = build.load_model(config)
    return net, build.make_chain(config, net, description, tiny_exits.CPU)


@pytest.mark.parametrize("patience", [1, 2])
def test_the_released_algorithm_leaves_where_ours_does_and_gives_the_same(path, patience):
    """Image by image, also under guidance, where it calls the two rows of a pair one after the other."""
    net, chain = load(path, patience=patience, joint=False)
    policy = Released(net, tiny_exits.THRESHOLD, patience)
    for scale in (1.0, 2.0):
        ours = replace(chain, cfg_scale=scale)
        alone = replace(ours, rows=1, policy=policy, denoiser=plain_denoiser(chain))
        alone.denoiser.net = policy
        x_0 = ours.sample([0, 1, 2, 3], [5, 6, 7, 8])
        exits = ours.policy.exits.unflatten(1, (-1, 4)).permute(2, 0, 1)
        assert len(exits.unique()) > 2
        for i in range(4):
            assert torch.allclose(alone.sample([i], [5 + i])[0], x_0[i], atol=1e-4)
            assert policy.exits[-1].shape == (CALLS, 2 if scale != 1 else 1)
            assert torch.equal(policy.exits[-1], exits[i])
        policy = alone.policy = alone.denoiser.net = Released(net, tiny_exits.THRESHOLD, patience)


def test_the_report_of_the_released_algorithm(path):
    net, chain = load(path)
    policy = Released(net, 0.9999999, 1)
    denoiser = plain_denoiser(chain)
    denoiser.net = policy
    replace(chain, rows=1, policy=policy, denoiser=denoiser).sample([0], [1])
    assert policy.report() == {"layer_ratio": 1.0, "executed_ratio": 1.0}


@pytest.mark.parametrize(("ratio", "layers"), [(0.55, 13), (0.3, 5), (0.9, 21)])
def test_leaving_share(ratio, layers):
    h = leaving_share(ratio, layers)
    there, mean = 1.0, 0.0
    for layer in range(1, layers):
        mean, there = mean + there * h * layer, there * (1 - h)
    assert (mean + there * layers) / layers == pytest.approx(ratio)


def test_a_needed_bias_makes_a_row_just_certain_enough(path):
    net, chain = load(path)
    for head in net.lte_classifer:
        torch.nn.init.zeros_(head.lte.bias)
    biases = needed_biases(chain, 0.7)
    assert biases.shape == (LAYERS, 4 * CALLS)
    [call] = watch(chain, [0], list(range(4)), list(range(4)))
    torch.nn.init.constant_(net.lte_classifer[2].lte.bias, float(biases[2, 1]))
    _, certainty = every_layer(plain_denoiser(chain), call)
    assert certainty[2].mean(dim=(1, 2, 3))[1] == pytest.approx(0.7, abs=1e-5)


def test_random_heads_mix_exits_at_about_the_ratio_wanted(path):
    _, chain = load(path)  # whose heads were made for 0.6
    chain.sample(list(range(4)), list(range(4)))
    report = chain.policy.report()
    assert report["layer_ratio"] == pytest.approx(0.6, abs=0.2)
    assert len(chain.policy.exits.unique()) >= 4
    assert max(report["spread"]) > 0.5  # within a call too


def test_one_run_has_everything(path, tmp_path, run_main):
    out = tmp_path / "speed.json"
    ran = run_main(exit_speed.main, f"--config={path}:early_exit", "--rows=2,3", "--repeats=1", "--steps=4",
                   "--config.policy.target_layer_ratio=0.7", "--config.policy.calibration_images=4", f"--out={out}")
    assert ran.status == 0, ran.stderr
    result = json.loads(out.read_text())
    assert [row["variant"] for row in result["variants"]] == 2 * VARIANTS
    assert [row["rows"] for row in result["variants"]] == [2] * 5 + [1] + [3] * 5 + [1]
    assert result["sampler"]["steps"] == 4
    rows = {row["variant"]: row for row in result["variants"][6:]}
    depths = depths_of(result["schedule"], LAYERS)
    assert len(depths) == 4
    assert rows["schedule"]["executed_ratio"] == pytest.approx(sum(depths) / 4 / LAYERS)
    for name in ("full", "schedule_never", "per_sample_never"):
        assert rows[name]["executed_ratio"] == rows[name]["layer_ratio"] == 1
    assert rows["per_sample"]["layer_ratio"] < 1
    assert rows["per_sample"]["executed_ratio"] >= rows["per_sample"]["layer_ratio"]
    for row in result["variants"]:
        assert row["images_per_second"] > 0
        if row["variant"] != "released":
            assert row["share"] == pytest.approx(row["speed_up"] * row["executed_ratio"])
    assert rows["released"]["equal_exits"] == 1
    assert rows["per_sample"]["times_released"] == pytest.approx(
        rows["per_sample"]["images_per_second"] / rows["released"]["images_per_second"])
    assert rows["schedule_never"]["peak_memory_ratio"] == pytest.approx(1, abs=0.02)
    assert rows["schedule"]["goal"] == "share >= 0.93, peak memory <= 1.02"
    assert result["command"] == (
        f"python -m libs.exits.speed --config={path}:early_exit --config.policy.calibration_images=4 "
        f"--config.policy.target_layer_ratio=0.7 --rows=2,3 --repeats=1 --steps=4 --released_images=2 "
        f"--random_heads=0.0 --out={out}")
    assert ran.stdout.count("\n| ") == 1 + 12


def test_random_heads_serve_a_checkpoint_without(tmp_path, run_main):
    path = tiny_exits.write(tmp_path, heads=False)
    ran = run_main(exit_speed.main, f"--config={path}:early_exit", "--rows=2", "--repeats=1", "--random_heads=0.5",
                   "--released_images=0", "--config.sampler.cfg_scale=2", f"--out={tmp_path}/a.json")
    assert ran.status == 0, ran.stderr
    result = json.loads((tmp_path / "a.json").read_text())
    assert [row["variant"] for row in result["variants"]] == VARIANTS[:-1]
    assert 0.2 < result["variants"][3]["layer_ratio"] < 0.9
    assert result["random_heads"] == 0.5
    assert "--released_images=0 --random_heads=0.5 " in result["command"]
    ran = run_main(exit_speed.main, f"--config={path}:early_exit", f"--out={tmp_path}/b.json")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert "needs uncertainty heads" in ran.stderr


def test_what_is_made_of_times():
    """Ratios are of the same round, the first round is left out."""
    def variant(name, seconds, ratio):
        held = Variant.__new__(Variant)
        held.name, held.seeds, held.seconds, held.processor, held.mib = name, [0, 1], seconds, seconds, 2.0
        held.chain = SimpleNamespace(rows=2, device=tiny_exits.CPU)
        held.told = {"layer_ratio": ratio, "executed_ratio": ratio}
        return held

    full = variant("full", [99.0, 4.0, 8.0, 6.0], 1.0)
    row = variant("per_sample", [50.0, 2.0, 2.0, 4.0], 0.6).row(full)
    assert row["images_per_second"] == 1  # of the median loop
    assert (row["speed_up"], row["share"], row["overhead"]) == (2, 1.2, -0.5)
    assert row["processor_share"] == 1.2
    assert row["peak_memory_ratio"] == 1
    assert goal(row, "cuda") == "share >= 0.75, peak memory <= 1.02"
    assert goal(row | {"times_released": 9.0}, "cuda") == goal(row, "cuda")  # which is wanted at 128 rows
    assert goal(row | {"times_released": 9.0, "rows": 128}, "cpu") == "share >= 0.9, peak memory <= 1.02"
    assert goal(row | {"times_released": 9.0, "rows": 128}, "cuda").endswith(", x released >= 20")
    assert goal({"variant": "per_sample_never"}, "cuda") == "overhead <= 10%"
    assert goal({"variant": "full"}, "cpu") == goal(row, "mps") == ""


def test_peak_of_tensors():
    net = torch.nn.Linear(256, 256)
    with PeakTensors(net, tiny_exits.CPU) as peak:
        a = torch.ones(1 << 20)
        del a
        b = torch.ones(1 << 19)
        c = b + 1
    assert peak.mib == pytest.approx(4 + (256 * 256 + 256) * 4 / 2**20, abs=0.01)
    assert c[0] == 2


@pytest.mark.parametrize(("methods", "flags", "text"), [
    ("", [], "samples without early exit; name the method"),
    ("early_exit", ["--rows=0"], "--rows=0: want numbers of at least 1"),
    ("early_exit", ["--rows=a,2"], "--rows=a,2: want numbers of at least 1"),
    ("early_exit", ["--random_heads=1.5"], "--random_heads=1.5 must be a layer ratio between 0 and 1"),
    ("early_exit", ["--repeats=0"], "--repeats=0"),
    ("early_exit", ["--config.policy.by_step=true"], "leave it out by --released_images=0"),
])
def test_bad_input_gets_one_line(path, tmp_path, run_main, methods, flags, text):
    ran = run_main(exit_speed.main, f"--config={path}:{methods}", f"--out={tmp_path}/a.json", *flags)
    assert (ran.status, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert text in ran.stderr
    ran = run_main(exit_speed.main, f"--config={path}:early_exit", f"--out={tmp_path}/a")
    assert f"--out={tmp_path}/a must end in .json" in ran.stderr
    assert not list(tmp_path.iterdir())

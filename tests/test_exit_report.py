"""The report of early exit: what it counts, what it shows, and whether certainties are called true that are."""

import json
from copy import copy

import pytest
import tiny_exits
import torch
from matplotlib.axes import Axes
from PIL import Image

from libs import build
from libs import config as config_files
from libs.checkpoint import load_described, save_backbone
from libs.denoiser import PREDICTIONS, Denoiser
from libs.distillation.progressive import student_sampler
from libs.exits import report as exit_report
from libs.exits.calibration import Certainties, calibration, certainties
from libs.exits.pictures import uncertainty_rows
from libs.exits.watch import every_layer, exit_uncertainty, plain_denoiser, watch
from libs.processes import Processes
from libs.training.batches import Batches, load_training_data

LAYERS, CALLS = 5, 6


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return tiny_exits.write(tmp_path_factory.mktemp("tiny"))


def load(path, methods="early_exit", **fields):
    config = config_files.load(f"{path}:{methods}")
    for name, text in fields.items():
        config_files.override(config, name.replace("__", "."), str(text))
    net, description = build.load_model(config)
    return config, build.make_chain(config, net, description, tiny_exits.CPU), description


def test_the_report_of_a_label_model(path, tmp_path, run_main):
    ran = run_main(exit_report.main, f"--config={path}:early_exit", "--seeds=0-9", f"--out={tmp_path}/out", "--shown=3",
                   "--shown_steps=2", "--data_images=24", "--benchmark", "--config.sampler.cfg_scale=2")
    assert ran.status == 0, ran.stderr
    result = json.loads((tmp_path / "out/report.json").read_text())
    counts = torch.tensor(result["policy"]["histogram"])
    assert counts.shape == (CALLS, LAYERS)
    assert (counts.sum(1) == 2 * 10).all()  # both rows of a guided pair; those that pad the last group do not count
    layer = torch.arange(1.0, LAYERS + 1)
    assert result["policy"]["layer_ratio"] == pytest.approx(float((counts * layer).sum() / counts.sum() / LAYERS))
    assert (counts > 0).sum() > CALLS  # mixed exits
    assert len(result["policy"]["spread"]) == len(result["times"]) == CALLS
    assert result["policy"]["threshold"] == tiny_exits.THRESHOLD
    assert (result["samples"], result["gmacs_per_image"]["counted_images"]) == (10, 4)
    assert result["sampling"]["images_per_second"] > 0
    assert [batch["rows"] for batch in result["benchmark"]["batches"]] == [1]
    assert result["command"].startswith("python -m libs.exits.report --config=")
    assert result["calibration"]["images"] == 24
    for name in ("exits", "calibration", "uncertainty"):
        with Image.open(tmp_path / f"out/{name}.png") as image:
            assert image.width > 200
    assert image.height == 4 + 4 * (64 + 4)  # two steps, two rows each
    assert sorted(each.name for each in (tmp_path / "out").iterdir()) == [
        "calibration.png", "exits.png", "report.json", "uncertainty.png"]


def test_watching_a_loop_changes_nothing_and_sees_what_the_sampler_sees(path):
    _, chain, _ = load(path, sampler__cfg_scale=2)
    plain = chain.sample([3, 4, 5], [1, 2, 3])
    exits = chain.policy.exits
    calls = watch(chain, [0, 2, CALLS - 1], [3, 4, 5], [1, 2, 3])
    assert [call.index for call in calls] == [0, 2, CALLS - 1]
    assert torch.equal(calls[-1].x_0[:3], plain)  # DDIM ends on the last prediction
    for call in calls:
        assert call.x.shape[0] == 8  # pairs, padded to 4 rows
        kept = torch.cat([call.exit_layer[:3], call.exit_layer[4:7]])
        assert torch.equal(kept.cpu(), exits[call.index])
        assert float(call.t) == float(chain.times[call.index])


def test_the_map_is_that_of_each_images_own_exit_layer(path):
    _, chain, _ = load(path)
    [call] = watch(chain, [3], [0, 1, 2, 3], [0, 1, 2, 3])
    out, certainty = every_layer(plain_denoiser(chain), call)
    assert out.shape == certainty.shape == (LAYERS, 4, 1, 8, 8)
    maps = exit_uncertainty(certainty, call.exit_layer, 3)
    assert maps.shape == (3, 8, 8)
    for i, layer in enumerate(call.exit_layer[:3].tolist()):
        assert torch.equal(maps[i], 1 - certainty[layer - 1, i, 0])
        if layer < LAYERS:
            assert maps[i].mean() < 1 - tiny_exits.THRESHOLD


def test_certainties_are_means_over_the_image_in_its_bin(path):
    config, chain, description = load(path)
    data = load_training_data(config.data, description, tiny_exits.CPU)
    [batch] = Batches(data, chain.codec, description["cond"], False, 0, 6).parts(1)
    denoiser = plain_denoiser(chain)
    seen = []
    spy = copy(denoiser)
    spy.call = lambda x, t, cond, **options: seen.append((x, t)) or denoiser.call(x, t, cond, **options)
    held = certainties(spy, batch, 4)
    x_t, t = seen[0][0].clone(), seen[0][1]  # no more of inference mode
    assert held.bin.tolist() == [2, 3, 0, 1, 2, 3]  # positions 6 to 11
    assert ((t * 4).floor() == held.bin).all()
    with torch.no_grad():
        out, certainty = denoiser.call(x_t, t, batch.cond, every_layer=True)
        assert torch.allclose(out[-1], denoiser.output(x_t, t, batch.cond), atol=1e-6)
    assert torch.allclose(held.predicted, certainty.mean(dim=(2, 3, 4)))
    error = (out[1, 2] - batch.noise()[2]).abs()  # this network predicts eps
    assert held.eps_error[1, 2] == pytest.approx(float((1 - error.tanh()).mean()), abs=1e-6)
    gap = (out[1, 2] - out[-1, 2]).abs()
    assert held.final_gap[1, 2] == pytest.approx(float((1 - gap.tanh()).mean()), abs=1e-6)
    assert (held.final_gap[-1] == 1).all()


def test_differences_of_damped_eps_are_those_of_v(path):
    config, chain, description = load(path)
    [batch] = Batches(load_training_data(config.data, description, tiny_exits.CPU), chain.codec, description["cond"],
                      False, 0, 6).parts(1)
    plain = plain_denoiser(chain)
    damped = Denoiser(plain.net, plain.schedule, "eps_damped", config.denoiser.time_input)
    t = torch.tensor([0.9], dtype=torch.float64)
    held = certainties(damped, batch, 1, t)
    rows = t.expand(6)
    x_t = damped.diffuse(batch.x_0, batch.noise(), rows)
    with torch.no_grad():
        first, *_, last = damped.call(x_t, rows, batch.cond, every_layer=True)[0]
    first, last = (PREDICTIONS["eps_damped"](x_t, out, *damped.alpha_sigma(rows, x_t)) for out in (first, last))
    v = Denoiser(None, plain.schedule, "v")
    gap = (v.target(*first, rows) - v.target(*last, rows)).abs()
    torch.testing.assert_close(held.final_gap[0], (1 - gap.tanh()).mean(dim=(1, 2, 3)).float(), rtol=1e-4, atol=1e-5)


def test_times_of_a_discrete_schedule_are_its_steps(tmp_path):
    path = tiny_exits.write(tmp_path)
    config, chain, description = load(path)
    chain.denoiser.schedule = build.make_schedule(name="squared_cosine", steps=8)
    [batch] = Batches(load_training_data(config.data, description, tiny_exits.CPU), chain.codec, description["cond"],
                      False, 0, 32).parts(0)
    denoiser, seen = plain_denoiser(chain), []
    spy = copy(denoiser)
    spy.call = lambda x, t, cond, **options: seen.append(t) or denoiser.call(x, t, cond, **options)
    held = certainties(spy, batch, 4)
    assert set((seen[0] * 8).tolist()) == set(range(1, 9))
    assert (((seen[0] * 8 - 1) // 2) == held.bin).all()


def test_a_student_is_asked_at_its_own_times(tmp_path, run_main, monkeypatch):
    """And the report says which truth to read."""
    path = tiny_exits.write(tmp_path)
    net, description = load_described(tmp_path / "tiny.safetensors")
    description["sampler"] = student_sampler(4, build.make_schedule(**description["schedule"]))
    save_backbone(tmp_path / "tiny.safetensors", net.state_dict(), description)
    asked, whole = [], exit_report.certainties

    def spied(denoiser, batch, bins, times):
        spy = copy(denoiser)
        spy.call = lambda x, t, cond, **options: asked.extend(t.tolist()) or denoiser.call(x, t, cond, **options)
        return whole(spy, batch, bins, times)

    monkeypatch.setattr(exit_report, "certainties", spied)
    titles, set_title = [], Axes.set_title
    monkeypatch.setattr(Axes, "set_title", lambda axes, text, **style: titles.append(text) or set_title(axes, text))
    ran = run_main(exit_report.main, f"--config={path}:early_exit", "--seeds=0-3", f"--out={tmp_path}/out",
                   "--data_images=24")
    assert ran.status == 0, ran.stderr
    result = json.loads((tmp_path / "out/report.json").read_text())
    assert result["times"] == pytest.approx([1, 0.75, 0.5, 0.25])
    assert set(asked) == set(result["times"])
    held = result["calibration"]
    assert held["bins"] == [[t, t] for t in result["times"]]
    assert len(held["predicted"][0]) == len(held["final_gap"]["true"][0]) == 4
    assert held["truths"] == {"eps_error": "against the data, which is not what a student learns",
                              "final_gap": "against the last layer: the one to read for a student"}
    for name, text in held["truths"].items():
        assert any(title.startswith(f"{name}, {text}\n") for title in titles)


def test_numbers_of_a_calibration_by_hand():
    held = Certainties(predicted=torch.tensor([[0.5, 0.7, 0.9], [0.6, 0.6, 0.8]]),
                       eps_error=torch.tensor([[0.4, 0.8, 0.9], [0.6, 0.5, 0.4]]),
                       final_gap=torch.tensor([[0.5, 0.6, 0.7], [1.0, 1.0, 1.0]]), bin=torch.tensor([0, 0, 2]))
    found = calibration(held, 3)
    assert found["images"] == 3
    assert found["bins"][1] == [1 / 3, 2 / 3]
    assert found["predicted"] == [[pytest.approx(0.6), None, pytest.approx(0.9)],
                                  [pytest.approx(0.6), None, pytest.approx(0.8)]]
    assert found["eps_error"]["true"][0] == [pytest.approx(0.6), None, pytest.approx(0.9)]
    assert found["eps_error"]["error_of"][0][0] == pytest.approx(0.1)  # not of the means, which are equal
    assert found["eps_error"]["error"] == pytest.approx((0.1 + 0.1 + 0 + 0 + 0.1 + 0.4) / 6)
    assert found["eps_error"]["correlation_of"][0][0] == pytest.approx(1)
    assert found["final_gap"]["correlation_of"][1] == [None, None, None]  # constant, or one image, or none
    json.dumps(found)


class Share(Processes):
    """One of two processes that never meet."""

    def __init__(self, rank):
        self.rank, self.count, self.is_main = rank, 2, False

    def gather(self, value):
        return [value]


def test_processes_share_the_images_of_the_calibration(path):
    config, chain, description = load(path)
    alone = exit_report.calibrate(config, chain, description, Processes(tiny_exits.CPU), 10)
    halves = [exit_report.calibrate(config, chain, description, Share(rank), 10) for rank in (0, 1)]
    order = [0, 1, 2, 3, 8, 9]  # positions of the first process, in groups of 4 rows; the second has 4 to 7
    assert torch.allclose(halves[0].predicted, alone.predicted[:, order], atol=1e-6)
    assert torch.equal(halves[0].bin, alone.bin[order])
    assert torch.allclose(halves[1].eps_error, alone.eps_error[:, 4:8], atol=1e-6)


def test_maps_are_enlarged_to_their_images_on_one_scale():
    maps = torch.tensor([[[0.1, 0.3], [0.1, 0.1]]])
    images = torch.zeros(1, 4, 4, 1, dtype=torch.uint8)
    rows = uncertainty_rows([("first", images, maps), ("second", images, maps + 0.2)])
    assert [caption for caption, _ in rows] == ["first", "uncertainty, 0.1 to 0.5", "second", "uncertainty, 0.1 to 0.5"]
    first, second = rows[1][1][0], rows[3][1][0]
    assert first.shape == (4, 4, 3)
    assert (first[:2, 2:] == first[0, 3]).all()  # one pixel of the map
    assert torch.equal(first[0, 3], second[0, 0])  # 0.3 in both
    assert second[0, 3].sum() > first[0, 3].sum() > first[0, 0].sum()


@pytest.mark.parametrize(("nfe", "number", "calls"), [(50, 4, [0, 16, 33, 49]), (3, 8, [0, 1, 2]), (9, 1, [0])])
def test_shown_calls(nfe, number, calls):
    assert exit_report.shown_calls(nfe, number) == calls


@pytest.mark.parametrize(("methods", "flags", "text"), [
    ("", [], "samples without early exit; name the method, as in"),
    ("early_exit", ["--seeds=3-1"], "--seeds=3-1"),
    ("early_exit", ["--labels=11"], "--labels=11"),
    ("early_exit", ["--shown=0"], "--shown=0"),
    ("early_exit", ["--config.data.image_size=16"], "data.image_size=16"),
    ("early_exit", ["--config.policy.threshold=0"], "policy.threshold=0"),
])
def test_bad_input_gets_one_line(path, tmp_path, run_main, methods, flags, text):
    ran = run_main(exit_report.main, f"--config={path}:{methods}", f"--out={tmp_path}/out", *flags)
    assert (ran.status, ran.stderr.count("\n")) == (2, 1), ran.stderr
    assert text in ran.stderr
    assert not list(tmp_path.glob("out/*"))


def test_a_checkpoint_without_heads_is_refused(tmp_path, run_main):
    path = tiny_exits.write(tmp_path, heads=False)
    ran = run_main(exit_report.main, f"--config={path}:early_exit", f"--out={tmp_path}/out")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert f"tiny.safetensors' has no uncertainty heads; train them by train.py --config={path}" in ran.stderr

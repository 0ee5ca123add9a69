"""The grid: equal-cost cells, going on, sample counts, drift, times, the picture, and every bad input in one line."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import tiny_exits
import torch
from matplotlib.axes import Axes
from PIL import Image

from libs import compare
from libs.compare import TimeLimit
from libs.compare_grid import Cell, equal_cell, load_grid, plan, select
from libs.compare_run import Grid, psnr
from libs.config import ROOT
from libs.files import atomic_path
from libs.image_folder import ImageFolder
from libs.plots import digest, draw, drawn_digest, points
from libs.policies.early_exit import EarlyExit
from libs.policies.exit_schedule import depths_of
from libs.tables import read_cells

DIGITS = {"config": "configs/digits_uvit.py", "sampler": "ddim"}
REUSE = {"label": "reuse", "policy": "encoder_propagation", "settings": {"key_steps": "every:2"}}


def result_of(cell: Cell, gmacs: float, frechet: float = 3.0, seconds: float | None = None) -> dict:
    """What a finished cell's file holds, as far as tables, pictures and plans read it."""
    sampler = {"name": cell.sampler, "steps": cell.steps, "eta": 0.0, "cfg_scale": 1.0}
    result = {"model": "net", "method": {"name": cell.policy, **cell.settings}, "sampler": sampler, "nfe": cell.steps,
              "samples": 500, "compute": {"precision": "fp32"},
              "metrics": {"frechet_cifar10": {"value": frechet, "samples": 500}},
              "gmacs_per_image": {"with_attention_products": gmacs, "without_attention_products": gmacs},
              "cell": {"name": cell.name, "settings": dict(cell.settings), "fingerprint": ""}}
    if seconds is not None:
        result["timing"] = {"seconds_per_image": seconds, "ratio_to_plain": {cell.plain.name: seconds / 2}}
    return result


@pytest.fixture
def run(tmp_path, run_main):
    """Run the grid of `cells` with outputs below tmp_path; (what it left behind, {name: result})."""
    def call(cells, *argv):
        (tmp_path / "grid.py").write_text(f"def get_grid():\n    return {cells!r}\n")
        ran = run_main(compare.main, f"--grid={tmp_path}/grid.py", f"--out={tmp_path}/out", "--rows=4",
                       f"--keep_images={tmp_path}/images", "--samples=4", "--benchmark=false", *argv)
        held = {path.stem: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
        return ran, held

    return call


def test_names_and_commands_of_the_declared_grid():
    cells = load_grid("configs/compare.py")
    assert [cell.steps for cell in cells] == sorted(cell.steps for cell in cells)  # cheap ones first
    cell = next(cell for cell in cells if cell.name == "cifar10_unet_clockwork_2_extrapolation_dpm_solver_pp_8")
    assert cell.config_flag == "configs/cifar10_unet.py:clockwork,dpm_solver_pp"
    assert cell.overrides == {"policy.clock": "2", "policy.adaptor": "extrapolation", "sampler.steps": "8"}
    assert cell.plain.name == "cifar10_unet_full_dpm_solver_pp_8"
    assert cell.plain in cells
    for model in ("cifar10_unet", "cifar10_uvit"):  # policies come on top of the students of either family
        assert {f"{model}_student_{steps}_{label}_ddim_{steps}" for steps in (4, 8)
                for label in ("full", "clockwork_2", "encoder_every2")} <= {cell.name for cell in cells}
    student = Cell("configs/a.py", "ddim", 4, checkpoint="runs/student")
    assert student.name == "student_full_ddim_4"
    assert student.overrides == {"sampler.name": "ddim", "sampler.steps": "4"}


def test_every_method_brings_plain_sampling_of_equal_steps_and_of_equal_cost():
    slow, fast = (Cell("a.py", "ddim", 10, name, "clockwork", {"clock": clock})
                  for name, clock in (("slow", 2), ("fast", 4)))
    assert [cell.name for cell in plan([slow, fast], {})] == ["a_full_ddim_10", "a_slow_ddim_10", "a_fast_ddim_10"]
    results = {cell.name: result_of(cell, gmacs) for cell, gmacs in ((slow.plain, 20), (slow, 12.9), (fast, 11.1))}
    names = ["a_full_ddim_10", "a_slow_ddim_10", "a_full_ddim_6", "a_fast_ddim_10"]
    assert [cell.name for cell in plan([slow, fast], results)] == names  # both are worth 6 steps
    assert equal_cell(slow.plain, results) == slow.plain
    assert equal_cell(slow, {slow.name: results[slow.name]}) is None  # until the plain cell is there
    student = replace(slow, fixed=True)
    assert plan([student], results) == [student.plain, student]  # it has one number of steps


def test_a_finished_cell_is_skipped_and_an_interrupted_one_goes_on(run, tmp_path):
    cells = [DIGITS | {"steps": 2}, DIGITS | {"steps": 3}]
    ran, held = run(cells)
    assert ran.status == 0, ran.stderr
    assert sorted(held) == ["digits_uvit_full_ddim_2", "digits_uvit_full_ddim_3"]
    result = held["digits_uvit_full_ddim_2"]
    assert (result["samples"], result["nfe"], result["rows"], result["sampling"]["images"]) == (4, 2, 4, 4)
    assert "4 of 4 images to make; cells to go: 1; about 1 min left" in ran.stderr

    path, images = tmp_path / "out/digits_uvit_full_ddim_2.json", tmp_path / "images/digits_uvit_full_ddim_2"
    lost = (images / "000003.png").read_bytes()
    path.unlink()
    (images / "000003.png").unlink()
    (tmp_path / "out/digits_uvit_full_ddim_3.json").touch()
    changed = (tmp_path / "out/digits_uvit_full_ddim_3.json").stat().st_mtime_ns
    ran, held = run(cells)
    assert "digits_uvit_full_ddim_2: 1 of 4 images to make; cells to go: 1" in ran.stderr
    assert held["digits_uvit_full_ddim_2"]["sampling"]["images"] == 1
    assert (images / "000003.png").read_bytes() == lost
    assert (tmp_path / "out/digits_uvit_full_ddim_3.json").stat().st_mtime_ns == changed


def test_other_settings_or_counts_are_no_finished_cell(run, tmp_path):
    cells = [DIGITS | {"steps": 2}]
    run(cells)
    ran, held = run(cells, "--samples=6")
    assert (held["digits_uvit_full_ddim_2"]["samples"], held["digits_uvit_full_ddim_2"]["sampling"]["images"]) == (6, 2)
    ran, _ = run(cells)
    assert ran.status == 2
    assert "--samples=4" in ran.stderr
    assert "has 6, which fewer shall not replace" in ran.stderr

    ran, held = run(cells, "--samples=6", "--rows=3")  # other images: those that are kept do not serve
    assert ran.status == 2
    assert "holds images of another chain (compute.rows is 4 there and 3 here)" in ran.stderr
    assert "cells that failed, each with its reason above: digits_uvit_full_ddim_2" in ran.stderr
    assert held["digits_uvit_full_ddim_2"]["rows"] == 4


def test_times_are_kept_beside_what_was_measured_before(run):
    cells = [DIGITS | {"steps": 2}]
    _, before = run(cells)
    ran, after = run(cells, "--time_only", "--repeats=2")
    assert ran.status == 0, ran.stderr
    timing = after["digits_uvit_full_ddim_2"].pop("timing")
    assert after == before
    assert timing["seconds_per_image"] > 0
    assert (timing["rows"], timing["repeats"]) == (4, 2)
    assert timing["ratio_to_plain"] == {"digits_uvit_full_ddim_2": 1.0}
    ran, _ = run(cells, "--benchmark")
    assert "timing" not in ran.stderr  # there is a time already


def test_a_policy_cell_has_drift_times_and_a_row_of_equal_macs(run, tmp_path):
    ran, held = run([DIGITS | {"steps": 6} | REUSE], "--benchmark", "--repeats=1")
    assert ran.status == 0, ran.stderr
    plain, reuse = held["digits_uvit_full_ddim_6"], held["digits_uvit_reuse_ddim_6"]
    costs = [result["gmacs_per_image"]["with_attention_products"] for result in (reuse, plain)]
    assert 0.2 < costs[0] / costs[1] < 0.95
    steps = math.floor(6 * costs[0] / costs[1] + 0.5)
    equal = held[f"digits_uvit_full_ddim_{steps}"]
    assert 5 < reuse["metrics"]["psnr_to_plain"]["value"] < 60
    assert reuse["metrics"]["psnr_to_plain"]["samples"] == 4
    assert "psnr_to_plain" not in plain["metrics"]
    for result in (plain, reuse, equal):
        assert result["timing"]["ratio_to_plain"]["digits_uvit_full_ddim_6"] > 0
    ran, _ = run([DIGITS | {"steps": 6} | REUSE], "--list")
    assert ran.stdout.count("| finished |") == 3


def test_psnr(tmp_path):
    folders = [ImageFolder(tmp_path / name, {}) for name in "ab"]
    images = np.random.default_rng(0).integers(0, 245, (3, 8, 8, 3), dtype=np.uint8)
    folders[0].save(range(3), torch.from_numpy(images))
    folders[1].save(range(3), torch.from_numpy(images + np.array([0, 0, 10], dtype=np.uint8)[:, None, None, None]))
    assert psnr(*folders, range(3)) == pytest.approx(10 * math.log10(255**2 / (100 / 3)))
    assert psnr(*folders, [0, 1]) == math.inf


def test_time_limit():
    with TimeLimit(0.001) as limit:
        while True:
            pass
    assert limit.expired
    with pytest.raises(KeyboardInterrupt), TimeLimit(1):  # of Ctrl-C
        raise KeyboardInterrupt
    with TimeLimit(0):
        pass


def test_a_cell_without_its_file_is_left_out(run):
    ran, held = run([DIGITS | {"steps": 2, "label": "net", "policy": "net", "needs": "nowhere.safetensors"}])
    assert ran.status == 0, ran.stderr
    assert list(held) == ["digits_uvit_full_ddim_2"]
    assert "digits_uvit_net_ddim_2 is left out: nowhere.safetensors is missing" in ran.stderr


def test_cells_of_a_missing_checkpoint_are_left_out_with_their_plain_ones(run):
    cell = DIGITS | REUSE | {"steps": 2, "checkpoint": "runs/nowhere"}
    ran, held = run([cell, DIGITS | {"steps": 2}])
    assert ran.status == 0, ran.stderr
    assert list(held) == ["digits_uvit_full_ddim_2"]
    for label in ("full", "reuse"):
        assert f"nowhere_{label}_ddim_2 is left out: checkpoint runs/nowhere is missing" in ran.stderr


def test_an_early_exit_cell_says_how_deep_its_images_went(run, tmp_path):
    """Beside quality and cost, which is counted over as many images as the cell asks for."""
    (tmp_path / "tiny").mkdir()
    cell = {"config": str(tiny_exits.write(tmp_path / "tiny")), "sampler": "ddim", "steps": 6, "label": "exit",
            "policy": "early_exit", "settings": {"threshold": 0.5}, "cost_images": 4, "family": "per sample"}
    ran, held = run([cell])
    assert ran.status == 0, ran.stderr
    result = held["tiny_exit_ddim_6"]
    assert result["cell"]["family"] == "per sample"
    assert "family" not in held["tiny_full_ddim_6"]["cell"]
    assert result["gmacs_per_image"]["counted_images"] == 4
    costs = [held[f"tiny_{label}_ddim_6"]["gmacs_per_image"]["with_attention_products"] for label in ("exit", "full")]
    assert 0.2 < result["policy"]["layer_ratio"] <= result["policy"]["executed_ratio"] < 0.95
    assert costs[0] / costs[1] == pytest.approx(result["policy"]["executed_ratio"], abs=0.1)
    assert any(name.startswith("tiny_full_ddim_") and name != "tiny_full_ddim_6" for name in held)  # of equal cost
    other = load_grid(str(tmp_path / "grid.py"))
    prints = {Grid(other, tmp_path, tmp_path, 4).fingerprint(replace(other[0], cost_images=count)) for count in (0, 4)}
    assert len(prints) == 2


def test_names_and_schedules_of_the_sweep_of_early_exit():
    cells = load_grid("configs/early_exit.py")
    assert [cell.steps for cell in cells] == sorted(cell.steps for cell in cells)
    for before, sampler, steps, thresholds in (
        ("cifar10_uvit_tiny", "dpm_solver_pp", 8, 6), ("cifar10_uvit_tiny", "dpm_solver_pp", 20, 6),
        ("cifar10_uvit_tiny", "dpm_solver", 50, 6), ("cifar10_uvit_student_8", "ddim", 8, 8),
    ):
        own = {cell.name: cell for cell in cells if (cell.sampler, cell.steps) == (sampler, steps)}
        assert f"{before}_full_{sampler}_{steps}" in own  # before fine-tuning
        assert f"{before}_early_exit_full_{sampler}_{steps}" in own
        families = [cell.family for cell in own.values() if cell.family]
        assert sorted({name: families.count(name) for name in families}.values()) == [1, 3, 4, 4, 4, 5, thresholds]
        schedules = [cell.settings["schedule"] for cell in own.values() if "schedule" in cell.settings]
        assert [len(depths_of(text, 13, torch.arange(steps))) for text in schedules] == [steps] * 8
    for cell in cells:
        EarlyExit(**cell.settings)
        assert cell.policy == "full" or cell.cost_images >= 32
    students = [cell for cell in select(cells, "*student_8_early_exit*") if cell.policy != "full"]
    assert {cell.settings.get("threshold") for cell in students} >= {0.9, 0.95, 0.99}
    assert [cell.name for cell in cells if cell.fixed] == [f"cifar10_uvit_student_{n}_full_ddim_{n}" for n in (4, 8)]
    costs = {cell.name: result_of(cell, 6.0 if cell in students else 10.0) for cell in cells}
    assert {equal_cell(cell, costs).name for cell in students} == {"cifar10_uvit_student_8_early_exit_full_ddim_5"}


def test_the_released_results_are_cells_of_the_declared_grid():
    """And early exit's cells there are those of its own grid, so that their files serve both."""
    cells = load_grid("configs/compare.py")
    results = {path.stem: result for path in sorted((ROOT / "assets/results/compare").glob("*.json"))
               for result in read_cells([path])}
    assert results.keys() <= {cell.name for cell in plan(cells, results)}
    sweep = {cell.name: cell for cell in load_grid("configs/early_exit.py")}
    shared = [cell for cell in cells if cell.name in sweep]
    assert len(shared) == 22
    assert all(cell in shared for cell in cells if "early_exit" in cell.name)
    for cell in shared:  # but for what decides only about their neighbours
        assert replace(sweep[cell.name], family="", fixed=cell.fixed) == cell


def test_outputs_are_named_after_the_grid(run_main, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "sweep.py").write_text(f"def get_grid():\n    return [{DIGITS | {'steps': 2}!r}]\n")
    ran = run_main(compare.main, "--grid=sweep.py", "--samples=2", "--benchmark=false")
    assert ran.status == 0, ran.stderr
    assert (tmp_path / "assets/results/sweep/digits_uvit_full_ddim_2.json").is_file()
    assert len(list((tmp_path / "outputs/sweep/digits_uvit_full_ddim_2").glob("*.png"))) == 2
    path = tmp_path / "assets/results/sweep/digits_uvit_full_ddim_2.json"
    result = json.loads(path.read_text())
    result["metrics"]["frechet_cifar10"] = {"value": 3.0, "samples": 2}
    path.write_text(json.dumps(result))
    assert run_main(compare.main, "--grid=sweep.py", "--plot").status == 0
    assert drawn_digest(tmp_path / "assets/sweep.png") == digest(points([result]))


def test_picture_holds_the_digest_of_what_it_shows(tmp_path):
    plain = [Cell("a.py", "ddim", steps) for steps in (5, 10)]
    methods = [Cell("a.py", "ddim", 10, f"m{clock}", "clockwork", {"clock": clock}) for clock in range(2, 14)]
    results = [result_of(cell, cell.steps, 3.0, 2.0) for cell in plain]
    results += [result_of(cell, 10 / cell.settings["clock"], 4.0) for cell in methods]
    drawn = points(results)
    assert len(drawn) == 14
    draw(drawn, tmp_path / "a.png")
    assert drawn_digest(tmp_path / "a.png") == digest(points(reversed(results)))
    results[0]["metrics"]["frechet_cifar10"]["value"] = 3.1
    assert drawn_digest(tmp_path / "a.png") != digest(points(results))
    with Image.open(tmp_path / "a.png") as image:
        assert image.width > image.height  # two panels, since some cells have a time
    with pytest.raises(ValueError, match="no cell has the metric"):
        draw(points(results, "fid"), tmp_path / "b.png")


def test_cells_of_a_family_are_joined_in_the_picture(tmp_path, monkeypatch):
    """At each number of steps; the cells of no family are drawn as before."""
    cells = [Cell("a.py", "ddim", steps, f"exit{threshold}", "early_exit", {"threshold": threshold})
             for steps in (5, 10) for threshold in (0.8, 0.9)]
    results = [result_of(cell, cell.steps * cell.settings["threshold"]) for cell in cells]
    alone = points(results)
    assert all("line" not in point for point in alone)
    for result in results[:3]:
        result["cell"]["family"] = "per sample"
    drawn = points(results)
    assert [(point["method"], point.get("line")) for point in drawn] == [
        ("per sample", 5), ("per sample", 5), ("per sample", 10), ("early_exit threshold=0.9", None)]
    lines, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda axes, x, y, **style: lines.append(x) or plot(axes, x, y, **style))
    draw(drawn, tmp_path / "a.png")
    assert [tuple(x) for x in lines if isinstance(x, tuple)] == [(4.0, 4.5), (8.0,)]


def test_the_released_picture_is_that_of_the_result_files():
    paths = sorted((ROOT / "assets/results/compare").glob("*.json"))
    picture = ROOT / "assets/compare.png"
    assert picture.exists() == bool(paths)
    if paths:
        assert drawn_digest(picture) == digest(points(read_cells(paths)))


@pytest.mark.parametrize(("flags", "text"), [
    (["--grid=nowhere.py"], "--grid=nowhere.py: no such file"),
    (["--cells=x*"], "--cells=x* matches no cell; --list shows their names"),
    (["--samples=1"], "--samples=1"),
    (["--max_minutes=-1"], "--max_minutes=-1"),
    (["--list", "--plot"], "--list and --plot: give one of them"),
])
def test_bad_flags_get_one_line(run_main, tmp_path, flags, text):
    ran = run_main(compare.main, f"--out={tmp_path}", *flags)
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert text in ran.stderr


@pytest.mark.parametrize(("body", "text"), [
    ("return [{'config': 'a.py'}]", "TypeError: .*missing 2 required"),
    ("return [{'config': 'a.py', 'sampler': 'ddim', 'steps': 2}] * 2", "two cells are called a_full_ddim_2"),
    ("return 1 / 0", "ZeroDivisionError: division by zero"),
    ("return (", "SyntaxError: "),
])
def test_bad_grids_get_one_line(tmp_path, body, text):
    (tmp_path / "grid.py").write_text(f"def get_grid():\n    {body}\n")
    with pytest.raises(ValueError, match=f"grid.py: {text}"):
        load_grid(str(tmp_path / "grid.py"))


def test_foreign_files_in_the_result_folder_are_named(tmp_path, run):
    with atomic_path(tmp_path / "out/digits_uvit_full_ddim_2.json") as temporary:
        temporary.write_text('{"model": "a", "metrics": {}}')
    ran, _ = run([DIGITS | {"steps": 2}])
    assert ran.status == 2
    assert "digits_uvit_full_ddim_2.json is no cell of libs.compare" in ran.stderr


def test_rows_and_precision_enter_the_fingerprint(tmp_path):
    cell = Cell(**DIGITS, steps=2)
    precisions = ("", "fp32", "bf16")
    prints = {Grid([cell], tmp_path, tmp_path, 4, 0, precision).fingerprint(cell) for precision in precisions}
    assert len(prints) == 2  # the config's own is fp32
    prints = {Grid([cell], tmp_path, tmp_path, 4, rows).fingerprint(cell) for rows in (0, 4, 50)}
    assert len(prints) == 2  # the config's own are 50

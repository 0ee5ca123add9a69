"""Result files as rows of a table."""

import json

import pytest

from libs.errors import UserError
from libs.tables import compare_table, fill_tables, result_row, results_table, updates_table

RESULT = {
    "model": "net", "method": {"name": "full"}, "nfe": 50, "samples": 500,
    "sampler": {"name": "ddim", "cfg_scale": 1.0},
    "metrics": {"frechet_cifar10": {"value": 4.5678, "samples": 500}},
    "gmacs_per_image": {"with_attention_products": 163.54, "without_attention_products": 141.56, "counted_images": 4},
}


def test_the_sample_count_stands_beside_every_number():
    row = result_row(RESULT | {"metrics": {"fid": {"value": 3.1, "samples": 50_000},
                                           "recall": {"value": 0.5, "samples": 4_000}}})
    assert (row["fid"], row["recall"]) == ("3.100 (50,000 images)", "0.500 (4,000 images)")


def test_psnr_stands_beside_that_of_a_plain_answer():
    row = result_row(RESULT | {"metrics": {
        "psnr": {"value": 27.1234, "bicubic": 26.5, "samples": 500, "pixels": "all"}}})
    assert (row["psnr"], row["psnr, bicubic"]) == ("27.123 (500 images)", "26.500")
    hole = result_row(RESULT | {"metrics": {"psnr": {"value": 18.0, "samples": 5, "pixels": "hole"}}})
    assert [name for name in hole if name.startswith("psnr")] == ["psnr"]


def test_cost_cells():
    row = result_row(RESULT)
    assert (row["NFE"], row["GMACs"], row["attention"]) == ("50", "163.5", "13.4%")
    assert "cfg_scale" not in row
    assert "latency" not in row
    batches = [{"rows": 1, "images_per_second": 0.5}, {"rows": 16, "images_per_second": 0.751}]
    row = result_row(RESULT | {"sampler": {"name": "ddim", "cfg_scale": 1.5},
                               "benchmark": {"latency_ms": {"median": 2012.3}, "batches": batches}})
    assert (row["cfg_scale"], row["latency"], row["images/s"]) == ("1.5", "2,012 ms", "0.751 (16 rows)")


def test_a_policy_that_leaves_early_shows_how_deep_it_went(tmp_path):
    write_cell(tmp_path, "full_10", "full", 10, 35.3, frechet_cifar10=2)
    write_cell(tmp_path, "exit", "early_exit", 10, 21.0, {"threshold": 0.9}, frechet_cifar10=3)
    held = json.loads((tmp_path / "exit.json").read_text())
    (tmp_path / "exit.json").write_text(json.dumps(held | {"policy": {"layer_ratio": 0.6, "executed_ratio": 0.61}}))
    head, _, *rows = compare_table(sorted(tmp_path.glob("*.json"))).splitlines()
    assert head.endswith("| layer_ratio | executed_ratio |")
    assert [row[-17:] for row in rows] == ["images) | - | - |", "| 0.600 | 0.610 |"]
    assert "layers" not in result_row(RESULT | {"policy": {"layer_ratio": None}})  # no image was sampled


def test_table_of_files(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(RESULT))
    folder = {"model": "outputs/x", "metrics": {"fid": {"value": 9.0, "samples": 3}}}
    (tmp_path / "b.json").write_text(json.dumps(folder))
    assert results_table([tmp_path / "a.json", tmp_path / "b.json"]).splitlines() == [
        "| model | method | sampler | NFE | GMACs | attention | frechet_cifar10 | fid |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
        "| net | full | ddim | 50 | 163.5 | 13.4% | 4.568 (500 images) | - |",
        "| outputs/x | - | - | - | - | - | - | 9.000 (3 images) |",
    ]


def write_cell(folder, name, policy, steps, nfe_gmacs, settings=(), time=None, precision="fp32", **metrics):
    """time: seconds an image, where plain sampling takes 0.5."""
    result = RESULT | {
        "method": {"name": policy}, "nfe": steps, "compute": {"precision": precision},
        "sampler": {"name": "ddim", "eta": 0.0, "steps": steps},
        "gmacs_per_image": {"with_attention_products": nfe_gmacs}, "cell": {"name": name, "settings": dict(settings)},
        "metrics": {key: {"value": value, "samples": 500} for key, value in metrics.items()},
    }
    if time:
        result["timing"] = {"seconds_per_image": time, "ratio_to_plain": {"full_10": time / 0.5}}
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_every_method_stands_before_plain_sampling_of_equal_macs(tmp_path):
    write_cell(tmp_path, "full_10", "full", 10, 35.3, time=0.5, frechet_cifar10=2)
    write_cell(tmp_path, "clock_2", "clockwork", 10, 21.0, {"clock": 2}, 0.3125, frechet_cifar10=3, psnr_to_plain=30)
    write_cell(tmp_path, "keys", "encoder_propagation", 10, 22.0, {"key_steps": "paper"}, frechet_cifar10=3)
    write_cell(tmp_path, "clock_4", "clockwork", 10, 14.0, {"clock": 4}, frechet_cifar10=4)
    write_cell(tmp_path, "full_6", "full", 6, 21.2, time=0.299, frechet_cifar10=2.5)
    write_cell(tmp_path, "full_3", "full", 3, 10.6, frechet_cifar10=5)  # 14 GMACs are worth 4 steps, not 3
    lines = [[cell.strip() for cell in line.strip("|").split("|")]
             for line in compare_table(sorted(tmp_path.glob("*.json"))).splitlines()]
    assert lines[0] == ["model", "method", "settings", "precision", "sampler", "NFE", "GMACs", "MACs", "time",
                        "images/s", "frechet_cifar10", "psnr_to_plain"]
    rows = [[line[1], line[2], *line[5:]] for line in lines[2:]]
    assert rows == [
        ["full", "-", "3", "10.6", "1.000", "-", "-", "5.000 (500 images)", "-"],
        ["full", "-", "10", "35.3", "1.000", "1.000", "2", "2.000 (500 images)", "-"],
        ["encoder_propagation", "key_steps=paper", "10", "22", "0.623", "-", "-", "3.000 (500 images)", "-"],
        ["clockwork", "clock=2", "10", "21", "0.595", "0.625", "3.2", "3.000 (500 images)", "30.000 (500 images)"],
        ["full", "equal MACs", "6", "21.2", "0.601", "0.598", "3.34", "2.500 (500 images)", "-"],
        ["clockwork", "clock=4", "10", "14", "0.397", "-", "-", "4.000 (500 images)", "-"],
    ]


def test_a_method_needs_its_plain_cell(tmp_path):
    write_cell(tmp_path, "clock_2", "clockwork", 10, 21.0, frechet_cifar10=3)
    write_cell(tmp_path, "full_9", "full", 9, 31.8, frechet_cifar10=2)
    write_cell(tmp_path, "full_10_bf16", "full", 10, 35.3, precision="bf16", frechet_cifar10=2)
    with pytest.raises(UserError, match="cell clock_2: there is no plain cell"):
        compare_table(tmp_path.glob("*.json"))


def test_both_markers_are_filled_and_the_rest_is_left(tmp_path):
    (tmp_path / "results/compare").mkdir(parents=True)
    (tmp_path / "results/a.json").write_text(json.dumps(RESULT))
    write_cell(tmp_path / "results/compare", "full_10", "full", 10, 35.3, frechet_cifar10=2)
    page = "a\n<!-- results: results/*.json -->\n| old |\n\nb\n<!-- compare: results/compare/*.json -->\nc\n"
    filled = fill_tables(page, tmp_path)
    assert filled == page.replace("| old |\n", results_table([tmp_path / "results/a.json"]) + "\n").replace(
        "-->\nc", f"-->\n{compare_table([tmp_path / 'results/compare/full_10.json'])}\nc")
    assert fill_tables(filled, tmp_path) == filled


def test_curve_of_updates(tmp_path):
    scores = [{"updates": 50, "frechet_cifar10": 2.54488, "images": 500}, {"updates": 1000, "frechet_cifar10": 2.3604,
                                                                          "images": 4000}]
    (tmp_path / "updates.json").write_text(json.dumps({"student": "net", "scores": scores}))
    table = ("| updates | frechet_cifar10 |\n| --- | --- |\n| 50 | 2.545 (500 images) |\n"
             "| 1,000 | 2.360 (4,000 images) |\n")
    assert fill_tables("a\n<!-- updates: *.json -->\n| old |\n\nb\n", tmp_path) == (
        f"a\n<!-- updates: *.json -->\n{table}\nb\n")
    (tmp_path / "updates.json").write_text("{}")
    with pytest.raises(UserError, match="updates.json is no curve of updates"):
        updates_table([tmp_path / "updates.json"])


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "x"}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a.json is no result of eval.py"):
        results_table([tmp_path / "a.json"])
    with pytest.raises(UserError, match=r"b.json is no result of eval.py"):
        results_table([tmp_path / "b.json"])

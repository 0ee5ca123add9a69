"""Result files as rows of a table."""

import json

import pytest

from libs.errors import UserError
from libs.tables import result_row, results_table

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


def test_cost_cells():
    row = result_row(RESULT)
    assert (row["NFE"], row["GMACs"], row["attention"]) == ("50", "163.5", "13.4%")
    assert "cfg_scale" not in row
    assert "latency" not in row
    batches = [{"rows": 1, "images_per_second": 0.5}, {"rows": 16, "images_per_second": 0.751}]
    row = result_row(RESULT | {"sampler": {"name": "ddim", "cfg_scale": 1.5},
                               "benchmark": {"latency_ms": {"median": 2012.3}, "batches": batches}})
    assert (row["cfg_scale"], row["latency"], row["images/s"]) == ("1.5", "2,012 ms", "0.751 (16 rows)")


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


@pytest.mark.parametrize("text", ["{", "[]", '{"model": "x"}'])
def test_other_files_are_refused(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"a.json is no result of eval.py"):
        results_table([tmp_path / "a.json"])
    with pytest.raises(UserError, match=r"b.json is no result of eval.py"):
        results_table([tmp_path / "b.json"])

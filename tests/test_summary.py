"""The table and the picture at the end of the quickstart."""

import json

import pytest
from PIL import Image

from libs import summary


def test_table_and_picture(tmp_path, capsys):
    for i, name in enumerate(("a", "b", "c", "d")):
        (tmp_path / name).mkdir()
        Image.new("L" if i else "RGB", (20 + i, 10), 40 * i).save(tmp_path / name / "grid.png")
        held = {"model": f"net_{name}", "sampler": "ddim", "nfe": 50, "images": 16, "seconds_per_image": 1.23456}
        if i:
            held["gmacs_per_image"] = {"with_attention_products": 163.54}
        (tmp_path / name / "summary.json").write_text(json.dumps(held))
    assert summary.main([str(tmp_path)]) == 0
    table = (tmp_path / "table.md").read_text()
    assert "| a | net_a | ddim | 50 |  | 1.23 | 16 |" in table
    assert "| d | net_d | ddim | 50 | 164 | 1.23 | 16 |" in table
    assert table.strip() in capsys.readouterr().out
    assert Image.open(tmp_path / "grids.png").size[0] > 3 * 340


@pytest.mark.parametrize("argv", [["nowhere"], []])
def test_bad_input(argv, capsys):
    assert summary.main(argv) == 2
    assert capsys.readouterr().err.count("\n") == 1

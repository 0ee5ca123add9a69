"""The table of Flash Diffusion's ablation: means and deviations over the seeds, by hand."""

import json

import pytest

from libs.errors import UserError
from libs.tables import fill_tables, flash_ablation_table


def write(folder, name, value, samples=500, nfe=4):
    result = {"model": f"runs/{name}", "nfe": nfe, "metrics": {"frechet_cifar10": {"value": value, "samples": samples}}}
    (folder / f"{name}.json").write_text(json.dumps(result))


def test_mean_and_deviation_of_each_arm(tmp_path):
    for name, value in (("modes_0", 3.0), ("modes_1", 5.0), ("modes_10", 7.0), ("distil_0", 4.25)):
        write(tmp_path, name, value)
    assert fill_tables("<!-- flash_ablation: *.json -->\n| old |\nend\n", tmp_path) == (
        "<!-- flash_ablation: *.json -->\n"
        "| losses | starts | calls | seeds | frechet_cifar10 (500 images) | frechet_cifar10 of each |\n"
        "| --- | --- | --- | --- | --- | --- |\n"
        "| distillation | pi_s | 4 | 1 | 4.250 | 4.250 |\n"
        "| all three | pi_s | 4 | 3 | 5.000 ± 2.000 | 3.000, 5.000, 7.000 |\n"
        "end\n")


def test_nothing_measured_is_no_table(tmp_path):
    page = "a\n<!-- flash_ablation: none/*.json -->\nb\n"
    assert fill_tables(page, tmp_path) == page


@pytest.mark.parametrize(("name", "given", "said"), [
    ("both_0", {}, "both_0.json is no score of scripts/flash_ablation.sh"),
    ("modes_a", {}, "modes_a.json is no score of scripts/flash_ablation.sh"),
    ("modes_1", {"samples": 100}, "differ in network calls or images"),
    ("modes_1", {"nfe": 2}, "differ in network calls or images"),
])
def test_what_cannot_stand_in_one_table_is_refused(tmp_path, name, given, said):
    write(tmp_path, "distil_0", 4.0)
    write(tmp_path, name, 3.0, **given)
    with pytest.raises(UserError, match=said):
        flash_ablation_table(sorted(tmp_path.glob("*.json")))

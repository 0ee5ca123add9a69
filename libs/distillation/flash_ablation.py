"""The table of scripts/flash_ablation.sh: what each loss and the start times bring, over several trainings."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from ..errors import UserError
from ..markdown import markdown_table
from ..tables import read_result

ARMS = {  # by the beginning of a file's name, ARM_SEED.json
    "distil": ("distillation", "pi_s"),
    "dmd": ("distillation, DMD", "pi_s"),
    "adversarial": ("distillation, adversarial", "pi_s"),
    "uniform": ("all three", "uniform"),
    "modes": ("all three", "pi_s"),
}


def read_table(paths: Iterable[str | Path]) -> str:
    """A row an arm: its losses, its starts, mean and sample standard deviation of each metric over the seeds.

    Raises UserError for a file of another name, and where the students were not scored in one way, on as many images.
    """
    held: dict[str, list[Mapping[str, Any]]] = {arm: [] for arm in ARMS}
    first = None
    for path in map(Path, paths):
        arm, _, seed = path.stem.rpartition("_")
        if arm not in held or not seed.isdecimal():
            raise UserError(f"{path} is no score of scripts/flash_ablation.sh: ARM_SEED.json, ARM one of "
                            f"{', '.join(ARMS)}")
        result = read_result(path)
        way = result.get("nfe"), _samples(result)
        first = first or (path, way)
        if way != first[1]:
            raise UserError(f"{path} and {first[0]} differ in network calls or images: {way} and {first[1]}")
        held[arm].append(result)
    return markdown_table(_row(arm, results) for arm, results in held.items() if results)


def _samples(result: Mapping[str, Any]) -> dict[str, int]:
    return {name: metric["samples"] for name, metric in result["metrics"].items()}


def _row(arm: str, results: list[Mapping[str, Any]]) -> dict[str, str]:
    losses, starts = ARMS[arm]
    row = {"losses": losses, "starts": starts, "calls": str(results[0]["nfe"]), "seeds": str(len(results))}
    for name, samples in _samples(results[0]).items():
        values = [result["metrics"][name]["value"] for result in results]
        spread = f" ± {stdev(values):.3f}" if len(values) > 1 else ""
        row[f"{name} ({samples:,} images)"] = f"{mean(values):.3f}{spread}"
        row[f"{name} of each"] = ", ".join(f"{value:.3f}" for value in values)
    return row

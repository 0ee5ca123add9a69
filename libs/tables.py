"""Result files (one JSON a run, by eval.py) as rows of a Markdown table: the tables of README and docs are made here.

    python -m libs.tables README.md docs/*.md
"""

import json
import math
import re
import sys
from collections.abc import Iterable, Mapping
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

from .errors import UserError
from .files import atomic_path, reason
from .markdown import EMPTY, markdown_table


def result_row(result: Mapping[str, Any]) -> dict[str, str]:
    """The cells of one run. GMACs are multiply-adds an image, over all its network calls, with attention
    products; "attention" is their share. Every metric has its sample count beside it.
    """
    row = {"model": result["model"]}
    if "sampler" in result:
        sampler, gmacs = result["sampler"], result["gmacs_per_image"]
        whole, rest = gmacs["with_attention_products"], gmacs["without_attention_products"]
        row |= {"method": result["method"]["name"], "sampler": sampler["name"], "NFE": str(result["nfe"])}
        row |= {"cfg_scale": f"{sampler['cfg_scale']:g}"} if sampler["cfg_scale"] != 1 else {}
        row |= {"GMACs": f"{whole:.4g}", "attention": f"{1 - rest / whole:.1%}"}
    if result.get("policy", {}).get("layer_ratio") is not None:  # early exit
        row |= {"method": f"{row['method']}, {result['method']['mode']}",
                "layers": f"{result['policy']['layer_ratio']:.3f}"}
    row |= metric_columns(result)
    if "benchmark" in result:
        fastest = max(result["benchmark"]["batches"], key=lambda batch: batch["images_per_second"])
        row["latency"] = f"{result['benchmark']['latency_ms']['median']:,.0f} ms"
        row["images/s"] = f"{fastest['images_per_second']:.4g} ({fastest['rows']} rows)"
    return row


def metric_columns(result: Mapping[str, Any]) -> dict[str, str]:
    """Every metric with its sample count; beside PSNR that of a plain answer to the task, such as bicubic, if any."""
    columns = {}
    for name, metric in result["metrics"].items():
        columns[name] = f"{metric['value']:.3f} ({metric['samples']:,} images)"
        columns |= {f"{name}, {plain}": f"{value:.3f}" for plain, value in metric.items()
                    if name == "psnr" and plain not in ("value", "samples", "pixels")}
    return columns


def results_table(paths: Iterable[str | Path]) -> str:
    """The table of several result files, one row each, in the order given."""
    return markdown_table(result_row(read_result(path)) for path in paths)


def read_result(path: str | Path) -> dict[str, Any]:
    """A result file of eval.py. Raises UserError for a file that is missing or of another kind."""
    try:
        result = json.loads(Path(path).read_text())
        result["model"], result["metrics"]  # what every result has
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no result of eval.py ({reason(error)})") from error
    return result


def equal_steps(steps: int, ratio: float) -> int:
    """Steps of plain sampling whose multiply-adds are nearest to `ratio` times those of `steps` steps; at least 1.
    Halves go up, in favour of plain sampling.

    >>> equal_steps(50, 0.543), equal_steps(8, 0.6875), equal_steps(8, 0.01)
    (27, 6, 1)
    """
    return max(1, math.floor(steps * ratio + 0.5))


class Comparison(NamedTuple):
    """A cell of the grid (see `libs.compare`) beside plain sampling, the whole network in every call.

    result      the cell
    plain       plain sampling with the same checkpoint, precision and sampler, at the steps that the methods start from
    equal_macs  whether `result` is plain sampling too, with as many steps as cost what the methods before it cost
    """

    result: Mapping[str, Any]
    plain: Mapping[str, Any]
    equal_macs: bool = False

    @property
    def macs_ratio(self) -> float:
        return gmacs(self.result) / gmacs(self.plain)

    @property
    def time_ratio(self) -> float | None:
        """Time of a loop over the plain one's, taken in turns in one run; None where it was not."""
        return self.result.get("timing", {}).get("ratio_to_plain", {}).get(self.plain["cell"]["name"])


def seconds_per_image(result: Mapping[str, Any]) -> float | None:
    """As timed beside the other cells of its group; None before that."""
    return result.get("timing", {}).get("seconds_per_image")


def gmacs(result: Mapping[str, Any]) -> float:
    return result["gmacs_per_image"]["with_attention_products"]


def is_plain(result: Mapping[str, Any]) -> bool:
    return result["method"]["name"] == "full"


def read_cells(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """The result files of `libs.compare`. Raises UserError for one that another program wrote."""
    results = []
    for path in paths:
        results.append(read_result(path))
        if not {"cell", "sampler", "gmacs_per_image"} <= results[-1].keys():
            raise UserError(f"{path} is no cell of libs.compare")
    return results


def comparisons(results: Iterable[Mapping[str, Any]]) -> list[Comparison]:
    """Cells in the order of the table. Each group (checkpoint, precision, sampler, steps) begins with its plain cell;
    then methods by falling cost, and after those that are worth equally many plain steps, these.
    """
    results = list(results)
    plain = {_place(result): result for result in results if is_plain(result)}
    groups: dict[tuple, list[Comparison]] = {}
    for result in results:
        if is_plain(result):
            continue
        if _place(result) not in plain:
            raise UserError(f"cell {result['cell']['name']}: there is no plain cell of its checkpoint, precision, "
                            "sampler and steps beside it")
        groups.setdefault(_place(result), []).append(Comparison(result, plain[_place(result)]))
    rows, equals = {}, set()
    for place, methods in groups.items():
        *sampler, steps = place
        methods.sort(key=lambda each: (-gmacs(each.result), each.result["cell"]["name"]))
        rows[place] = [Comparison(plain[place], plain[place])]
        for count, members in groupby(methods, lambda each, steps=steps: equal_steps(steps, each.macs_ratio)):
            rows[place] += members
            equal = (*sampler, count)
            if equal != place and equal in plain:
                rows[place].append(Comparison(plain[equal], plain[place], equal_macs=True))
                equals.add(equal)
    for place in plain.keys() - groups.keys() - equals:
        rows[place] = [Comparison(plain[place], plain[place])]
    return [row for place in sorted(rows) for row in rows[place]]


def _place(result: Mapping[str, Any]) -> tuple[str, str, str, str, int]:
    """What a method and the plain sampling beside it have in common; the steps come last."""
    rest = dict(result["sampler"])
    name, steps = rest.pop("name"), rest.pop("steps")
    return result["model"], result["compute"]["precision"], name, json.dumps(rest, sort_keys=True), steps


def comparison_row(row: Comparison) -> dict[str, str]:
    """The cells of one comparison. "MACs" and "time" are ratios to the group's plain row."""
    cell, sampler = row.result["cell"], row.result["sampler"]
    return {
        "model": row.result["model"], "method": row.result["method"]["name"],
        "settings": "equal MACs" if row.equal_macs else settings_text(cell["settings"]) or EMPTY,
        "precision": row.result["compute"]["precision"],
        "sampler": sampler["name"], "NFE": str(row.result["nfe"]), "GMACs": f"{gmacs(row.result):.4g}",
        "MACs": f"{row.macs_ratio:.3f}", "time": EMPTY if row.time_ratio is None else f"{row.time_ratio:.3f}",
        "images/s": f"{1 / seconds:.3g}" if (seconds := seconds_per_image(row.result)) else EMPTY,
    } | depth_columns(row.result) | metric_columns(row.result)


def depth_columns(result: Mapping[str, Any]) -> dict[str, str]:
    """Of a policy that leaves the network early: the mean exit layer over all layers, and the share of the layers that
    was computed.
    """
    told = result.get("policy", {})
    return {name: f"{told[name]:.3f}" for name in ("layer_ratio", "executed_ratio") if told.get(name) is not None}


def settings_text(settings: Mapping[str, Any]) -> str:
    """A policy's settings in one phrase, files by their names.

    >>> settings_text({"clock": 2, "adaptor": "assets/checkpoints/net.safetensors"})
    'clock=2, adaptor=net'
    """
    return ", ".join(f"{name}={Path(value).stem if str(value).endswith('.safetensors') else value}"
                     for name, value in settings.items())


def compare_table(paths: Iterable[str | Path]) -> str:
    """The table of the result files of a grid, every method beside plain sampling of equal multiply-adds."""
    return markdown_table(map(comparison_row, comparisons(read_cells(paths))))


def safety_table(paths: Iterable[str | Path]) -> str:
    """The safety table of caching tools (`libs.pipelines.safety`)."""
    from .pipelines.safety import read_table  # loads diffusers

    return read_table(paths)


def speed_table(paths: Iterable[str | Path]) -> str:
    """The table of one speed benchmark (`libs.pipelines.speed`)."""
    from .pipelines.speed import read_table  # loads diffusers

    return read_table(paths)


def students_table(paths: Iterable[str | Path]) -> str:
    """The table of one progressive distillation (`libs.distillation.stage_report`)."""
    from .distillation.quality_curve import read_table  # stands above this module

    return read_table(paths)


def flash_ablation_table(paths: Iterable[str | Path]) -> str:
    """The table of scripts/flash_ablation.sh (`libs.distillation.flash_ablation`)."""
    from .distillation.flash_ablation import read_table  # stands above this module

    return read_table(paths)


def updates_table(paths: Iterable[str | Path]) -> str:
    """What more updates bring to a student: a file with "scores", of each the updates, the metrics and the images."""
    path, = paths
    try:
        scores = json.loads(Path(path).read_text())["scores"]
        return markdown_table({"updates": f"{score['updates']:,}"} | {
            name: f"{value:.3f} ({score['images']:,} images)" for name, value in score.items()
            if name not in ("updates", "images")} for score in scores)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is no curve of updates ({reason(error)})") from error


def exit_speed_table(paths: Iterable[str | Path]) -> str:
    """The table of one speed benchmark of early exit (`libs.exits.speed`)."""
    from .exits.speed import table  # stands above this module

    path, = paths
    return table(json.loads(Path(path).read_text()))


def exit_training_table(paths: Iterable[str | Path]) -> str:
    """The table of one cost benchmark of a training step (`libs.training.early_exit_speed`)."""
    from .training.early_exit_speed import table  # stands above this module

    path, = paths
    return table(json.loads(Path(path).read_text()))


def adaptor_speed_table(paths: Iterable[str | Path]) -> str:
    """What the training of Clockwork's adaptor costs (`libs.distillation.adaptor_speed`), a row a file."""
    from .distillation.adaptor_speed import read_table  # loads diffusers

    return read_table(paths)


TABLES = {"results": results_table, "students": students_table, "updates": updates_table, "compare": compare_table,
          "safety": safety_table, "speed": speed_table, "exit_speed": exit_speed_table,
          "exit_training": exit_training_table, "adaptor_speed": adaptor_speed_table,
          "flash_ablation": flash_ablation_table}


def fill_tables(text: str, root: Path) -> str:
    """`text` with the table below every line `<!-- KIND: PATTERN -->`, KIND one of `TABLES`, made anew from the files
    under `root` that match PATTERN, or one of several with spaces between; rows of `results` are in the order of the
    files' names. Where none match there is no table.
    """
    def fill(match: re.Match) -> str:
        paths = sorted({path for pattern in match["pattern"].split() for path in root.glob(pattern)})
        table = f"{TABLES[match['kind']](paths)}\n" if paths else ""
        return f"{match['marker']}\n{table}"

    marker = rf"(?P<marker><!-- (?P<kind>{'|'.join(TABLES)}): (?P<pattern>\S+(?: \S+)*?) -->)\n(?:\|.*\n)*"
    return re.sub(marker, fill, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        page = Path(name)
        filled = fill_tables(page.read_text(), page.resolve().parent)
        with atomic_path(page) as temporary:
            temporary.write_text(filled)

"""Result files (one JSON a run, by eval.py) as rows of a Markdown table: the README's tables are made here."""

import json
import re
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from .errors import UserError
from .files import atomic_path, reason

EMPTY = "-"


def markdown_table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Rows as a Markdown table; columns are the rows' keys in the order in which they first appear.

    >>> print(markdown_table([{"model": "a", "NFE": 50}, {"model": "b", "FID": "3.1 (50,000 images)"}]))
    | model | NFE | FID |
    | --- | --- | --- |
    | a | 50 | - |
    | b | - | 3.1 (50,000 images) |
    """
    rows = list(rows)
    columns = list(dict.fromkeys(column for row in rows for column in row))
    lines = [columns, ["---"] * len(columns), *([str(row.get(column, EMPTY)) for column in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    for name, metric in result["metrics"].items():
        row[name] = f"{metric['value']:.3f} ({metric['samples']:,} images)"
    if "benchmark" in result:
        fastest = max(result["benchmark"]["batches"], key=lambda batch: batch["images_per_second"])
        row["latency"] = f"{result['benchmark']['latency_ms']['median']:,.0f} ms"
        row["images/s"] = f"{fastest['images_per_second']:.4g} ({fastest['rows']} rows)"
    return row


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


def fill_tables(text: str, root: Path) -> str:
    """`text` with the table below every line `<!-- results: PATTERN -->` made anew from the files under `root`
    that match PATTERN, in the order of their names.
    """
    def fill(match: re.Match) -> str:
        table = results_table(sorted(root.glob(match["pattern"])))
        return f"{match['marker']}\n{table}\n"

    return re.sub(r"(?P<marker><!-- results: (?P<pattern>\S+) -->)\n(?:\|.*\n)*", fill, text)


if __name__ == "__main__":  # python -m libs.tables README.md
    for name in sys.argv[1:]:
        page = Path(name)
        filled = fill_tables(page.read_text(), page.resolve().parent)
        with atomic_path(page) as temporary:
            temporary.write_text(filled)

"""Markdown tables."""

from collections.abc import Iterable, Mapping
from typing import Any

EMPTY = "-"  # a cell without a value


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

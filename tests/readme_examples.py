"""Worked examples of the README, as they stand there."""

import re
import shlex

from libs.config import ROOT


def section(title: str) -> str:
    """The text under a heading of the third level."""
    return (ROOT / "README.md").read_text().split(f"### {title}")[1].split("\n### ")[0]


def code_and_commands(title: str) -> tuple[str, list[list[str]]]:
    """The section's one Python file, and its commands as words."""
    [code] = re.findall(r"```python\n(.*?)```", section(title), re.S)
    blocks = re.findall(r"```bash\n(.*?)```", section(title), re.S)
    return code, [shlex.split(line) for block in blocks for line in block.splitlines()]

"""README and docs: their pages, and the worked examples of docs/own_model.md as they stand there."""

import importlib
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from libs.config import ROOT


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def section(title: str) -> str:
    """The text under a heading of the second level."""
    return (ROOT / "docs/own_model.md").read_text().split(f"## {title}\n")[1].split("\n## ")[0]


def code_and_commands(title: str) -> tuple[str, list[list[str]]]:
    """The section's one Python file, and its commands as words."""
    [code] = re.findall(r"```python\n(.*?)```", section(title), re.S)
    blocks = re.findall(r"```bash\n(.*?)```", section(title), re.S)
    return code, [shlex.split(line) for block in blocks for line in block.splitlines()]


def run_commands(commands: Sequence[Sequence[str]], few: Mapping[str, Sequence[str]], run_main: Callable) -> list[str]:
    """Run each on the CPU with the flags `few` of its script, without an error. Returns the scripts' names."""
    names = []
    for words in commands:
        name = words[1].removesuffix(".py")
        ran = run_main(importlib.import_module(name).main, *words[2:], *few[name], "--config.compute.device=cpu")
        assert ran.status == 0, ran.stderr
        names.append(name)
    return names

"""Every command of the README and of the configs parses; its results table is that of assets/results."""

import importlib
import re
import shlex

import pytest

from libs.config import ROOT, known_files
from libs.tables import fill_tables

METHODS = ("full", "dpm_solver", "dpm_solver_pp")  # what METHOD stands for


def commands() -> list[str]:
    """Lines of the README's bash blocks, commands in its tables, and lines of the configs' docstrings that run one of
    our scripts.
    """
    text = (ROOT / "README.md").read_text()
    found = re.findall(r"\| `(python [^`]*)` \|$", text, re.M)
    assert len(found) >= 10
    for block in re.findall(r"```bash\n(.*?)```", text, re.S):
        found += block.replace("\\\n", " ").splitlines()
    for path in known_files():
        docstring = (ROOT / path).read_text().split('"""')[1]
        found += [line for line in docstring.replace("\\\n", " ").splitlines() if line.startswith("    ")]
    expanded = [line.replace("METHOD", method) for line in found for method in METHODS]
    return sorted({" ".join(line.split()) for line in expanded if ".py " in line})


@pytest.mark.parametrize("command", commands())
def test_command_parses(command, run_main):
    words = shlex.split(command, comments=True)
    place = next(i for i, word in enumerate(words) if word.endswith(".py") or word.startswith("libs."))
    script = importlib.import_module(words[place].removesuffix(".py"))
    ran = run_main(script.main, *words[place + 1:], "--help")
    assert ran.status == 0, ran.stderr
    assert words[0] in ("python", "accelerate")


def test_readme_has_commands_of_every_script():
    scripts = {re.search(r"(\w+)\.py ", command)[1] for command in commands() if " -m libs." not in command}
    assert scripts == {"train", "distillate", "sample", "eval", "prepare_data"}


def test_the_results_table_is_that_of_the_result_files():
    text = (ROOT / "README.md").read_text()
    assert fill_tables(text, ROOT) == text
    assert len(list((ROOT / "assets/results").glob("*.json"))) >= 6


def test_places_of_the_readme_exist():
    text = (ROOT / "README.md").read_text()
    table = text.split("## Where things are")[1].split("\n\n")[1]
    for place in re.findall(r"`([^`]+)`", "\n".join(row.split("|")[1] for row in table.splitlines())):
        for path in place.split():
            assert (ROOT / path).exists(), path
    titles = re.findall(r"^#+ (.+)$", text, re.M)
    anchors = {"#" + re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}  # as GitHub does
    for link in re.findall(r"\]\((?!http)([^)]+)\)", text):
        assert link in anchors or (ROOT / link).exists(), link

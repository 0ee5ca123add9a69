"""Every command of README, docs and configs parses; tables are those of assets/results; links lead somewhere."""

import importlib
import re
import shlex

import pytest
from documentation import pages

from libs.config import ROOT, known_files
from libs.tables import fill_tables

METHODS = ("full", "dpm_solver", "dpm_solver_pp")  # what METHOD stands for


def commands() -> list[str]:
    """Lines of the pages' bash blocks, commands in their tables, and lines of the configs' docstrings that run one of
    our scripts.
    """
    text = "\n".join(path.read_text() for path in pages())
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


def test_there_are_commands_of_every_script():
    scripts = {re.search(r"(\w+)\.py ", command)[1] for command in commands() if " -m libs." not in command}
    assert scripts == {"train", "distillate", "sample", "eval", "prepare_data"}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_tables_are_those_of_the_result_files(page):
    text = page.read_text()
    assert fill_tables(text, page.parent) == text
    for patterns in re.findall(r"<!-- \w+: (\S+(?: \S+)*) -->", text):
        for pattern in patterns.split():
            assert list(page.parent.glob(pattern)), pattern


def test_every_released_result_is_in_a_table_or_is_named():
    text = "\n".join(path.read_text() for path in pages())
    folders = {path.parent.relative_to(ROOT) for path in (ROOT / "assets/results").rglob("*.json")}
    assert len(folders) >= 8
    for folder in folders:
        assert f"{folder}/" in text, folder


def test_places_of_the_readme_exist():
    table = (ROOT / "README.md").read_text().split("## Where things are")[1].split("\n\n")[1]
    for place in re.findall(r"`([^`]+)`", "\n".join(row.split("|")[1] for row in table.splitlines())):
        for path in place.split():
            assert (ROOT / path).exists(), path


def anchors(page):
    """Of its titles, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", page.read_text(), flags=re.S), re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", pages(), ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_page_is_found_from_the_readme():
    text = (ROOT / "README.md").read_text()
    assert [page.name for page in pages()[1:] if f"(docs/{page.name})" not in text] == []

"""Fixtures of all tests."""

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch


def pytest_configure() -> None:
    torch.set_num_threads(2)  # the number of threads decides the last bits of a sum


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


class Ran(NamedTuple):
    """What a command left behind: its exit status and what it printed."""

    status: int
    stdout: str
    stderr: str


@pytest.fixture
def run_main(capfd) -> Callable[..., Ran]:
    """Call an entry script in this process: `run_main(sample.main, "--seeds=0-3", f"--out={tmp_path}")`."""

    def run(main: Callable[[list[str]], int], *argv) -> Ran:
        capfd.readouterr()  # what was printed before is not the command's
        status = main([str(arg) for arg in argv])
        return Ran(status, *capfd.readouterr())

    return run

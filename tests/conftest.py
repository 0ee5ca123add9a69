"""Fixtures of all tests."""

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters


def pytest_configure() -> None:
    # The number of threads decides the last bits of a sum, and waiting threads are slow where workers share the cores.
    torch.set_num_threads(1)
    os.environ["OMP_NUM_THREADS"] = "1"  # of commands that tests start


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Every test starts from the same random state, whichever tests ran before it."""
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    """torch.compile as at the start of a process: no graph of another test counts towards its limits."""
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


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


@pytest.fixture(scope="session")
def pipelines(tmp_path_factory) -> Callable[[str], Path]:
    """folder(name) of a saved tiny pipeline of `network_pipelines`, to be read alone."""
    from network_pipelines import PIPELINES  # loads diffusers

    @functools.cache
    def folder(name: str) -> Path:
        made = tmp_path_factory.mktemp(name)
        PIPELINES[name](tmp_path_factory.mktemp("words")).save_pretrained(made)
        return made

    return folder


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory) -> Path:
    """Random weights of the Inception network that clean-fid builds, saved as its own file would be."""
    module = pytest.importorskip("cleanfid.inception_pytorch")
    with (
        mock.patch.object(module, "load_state_dict_from_url", return_value={}),
        mock.patch.object(nn.Module, "load_state_dict"),
        pytest.warns(UserWarning, match="pretrained"),
    ):
        net = module.fid_inception_v3()
    generator = torch.Generator().manual_seed(0)
    for layer in net.modules():
        if isinstance(layer, nn.Conv2d):  # keeps the scale of the activations through 90 layers
            nn.init.kaiming_normal_(layer.weight, generator=generator)
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path

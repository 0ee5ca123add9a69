"""An entry script in two processes that share the work, as `accelerate launch --num_processes=2` starts them."""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable, Sequence
from unittest import mock

import torch

SLOW = ["peft", "torch.utils.tensorboard"]  # to import: once, by the server from which both are forked
SECONDS = 300  # after which they hang


def run_in_two(main: Callable[[list[str]], int], argv: Sequence[str]) -> None:
    """Fails unless `main(argv)` returns 0 in both, and they were one group in it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(SLOW)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [context.Process(target=_run, args=(main, list(argv), rank, port), daemon=True) for rank in range(2)]
    for each in processes:
        each.start()
    for each in processes:
        each.join(SECONDS)
    assert [each.exitcode for each in processes] == [0, 0]


def _run(main: Callable[[list[str]], int], argv: list[str], rank: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2",
                      MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    joined = mock.patch("torch.distributed.init_process_group", wraps=torch.distributed.init_process_group)
    with joined as join:
        status = main(argv)
    sys.exit(status if join.called else "the two did not find each other")

"""Items of a data set in their order, made by worker processes."""

import multiprocessing
import os
import threading
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import UserError

PARALLEL_FROM = 2000  # fewer images than this are read faster than processes start


def cores() -> int:
    """How many processors this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def items(dataset: Dataset, workers: int, field: str) -> Iterator[Any]:
    """Yield dataset[0], dataset[1], ... as they are; few of them wait in memory.

    Items cross to this process by pickle: arrays, not tensors, which would take the little shared memory of a
    container. The data set itself tells its errors, as items: an exception would come with its whole trace.

    workers: processes, at most one a core; with one the work is done in this process. Raises UserError, naming
        `field`, when a process dies.
    """
    workers = min(workers, cores(), len(dataset))
    # A generator of its own: DataLoader draws a seed, and the random state of the caller is not its business.
    loader = DataLoader(dataset, batch_size=None, collate_fn=_as_it_is, num_workers=workers if workers > 1 else 0,
                        worker_init_fn=_end_with_parent, generator=torch.Generator())
    iterator = iter(loader)
    while True:
        try:
            item = next(iterator)
        except StopIteration:
            return
        except RuntimeError as error:
            if not str(error).startswith("DataLoader worker"):
                raise
            raise UserError(f"{field}={workers}: a worker process died (out of memory?); try 1") from error
        yield item


def _as_it_is(item: Any) -> Any:
    return item


def _end_with_parent(worker: int) -> None:
    """A worker whose parent was killed would wait for ever to hand over its items: end it."""
    parent = multiprocessing.parent_process()  # not os.getppid(): it misses a parent that died before this line

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()

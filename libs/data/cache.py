"""Arrays kept in one hidden file beside the files they were made from; of it every process maps the pages it needs."""

import contextlib
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from absl import logging
from numpy.typing import DTypeLike

from ..files import atomic_path

try:
    import fcntl
except ImportError:  # Windows: processes that start together each make the file
    fcntl = None


def cache_file(folder: Path, digest: str, name: str) -> Path:
    """Where the array `name` of one state of a folder, or of a file in it, is kept."""
    return folder / f".{name}_{digest[:16]}.npy"


def cached_array(stored: Path | None, shape: tuple[int, ...], dtype: DTypeLike,
                 parts: Iterable[np.ndarray]) -> np.ndarray:
    """An array of `shape` whose rows come from `parts`, one after another, kept in `stored` for the next time.

    Parts are drawn only where the file is not there, and then written as they come, so that never all rows are in
    memory. Of processes that start together one makes the file. What is kept of older states is removed. Without
    `stored`, or without room for it, the array is in memory.
    """
    dtype = np.dtype(dtype)
    if stored is None or not is_usable(stored, shape, dtype):
        array, done = np.empty(shape, dtype), 0
        for part in parts:
            array[done:done + len(part)] = part
            done += len(part)
        return array
    with alone_in(stored.parent) as alone:
        # Copy-on-write pages: processes on one machine share them. The errors: missing or damaged, so it is made.
        with contextlib.suppress(OSError, ValueError):
            return np.load(stored, mmap_mode="c")
        for left_over in stored.parent.glob(f".{stored.name}.*.tmp") if alone else ():  # of a process that was killed
            left_over.unlink(missing_ok=True)
        with atomic_path(stored) as temporary, open(temporary, "wb") as file:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
            np.lib.format.write_array_header_1_0(file, header)
            for part in parts:
                file.write(np.ascontiguousarray(part, dtype).data)
        for outdated in stored.parent.glob(stored.name.rsplit("_", 1)[0] + "_*.npy"):
            if outdated != stored:
                outdated.unlink(missing_ok=True)
        logging.info("kept %s in %s", "x".join(map(str, shape)), stored)
        return np.load(stored, mmap_mode="c")


def is_usable(stored: Path, shape: tuple[int, ...], dtype: DTypeLike) -> bool:
    """Whether the array is there, or can be written there."""
    folder, nbytes = stored.parent, np.dtype(dtype).itemsize * int(np.prod(shape))
    if stored.is_file():
        return True
    if os.access(folder, os.W_OK) and shutil.disk_usage(folder).free > nbytes:
        return True
    logging.info("%.1f GB go into memory and are read again next time: %s has no room for them", nbytes / 1e9, folder)
    return False


@contextlib.contextmanager
def alone_in(folder: Path) -> Iterator[bool]:
    """Let in one process at a time; yields False where the file system knows no locks."""
    if fcntl is None:
        yield False
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        alone = True
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError:
            alone = False
        yield alone
        if alone:  # closing alone would not do: reading processes have inherited the lock
            fcntl.flock(descriptor, fcntl.LOCK_UN)
    finally:
        os.close(descriptor)

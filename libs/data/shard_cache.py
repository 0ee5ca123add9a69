"""Shards that lie elsewhere, fetched whole into a folder of bounded size: their samples are read in any order."""

import contextlib
import hashlib
import http.client
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import BinaryIO

from absl import logging

from ..errors import UserError
from ..files import atomic_path, reason
from .cache import alone_in

WAITS = (1, 5)  # seconds before a shard is asked for again, and once more
CACHE_BYTES = 50e9
TIMEOUT = 60  # seconds of silence after which a server is given up


def default_folder() -> Path:
    """Where fetched shards are kept, unless the config says otherwise."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "diffusion-shortcuts" / "shards"


class ShardCache:
    """Fetched shards in `folder`; those that were used longest ago make room for new ones.

    limit   bytes that stay there; a shard that is being fetched, and the newest one, come on top
    field   what a UserError names

    Processes on one machine share the folder, and fetch a shard once.
    """

    def __init__(self, folder: Path, limit: float, field: str = "data.path"):
        self.folder, self.limit, self.field = folder, limit, field

    def place(self, address: str, suffix: str = ".tar") -> Path:
        """The file that is kept for an address."""
        return self.folder / f"{hashlib.sha256(address.encode()).hexdigest()[:32]}{suffix}"

    def open(self, address: str) -> BinaryIO:
        """The shard at a remote address, fetched if it is not there. Raises UserError where it cannot be had."""
        path = self.place(address)
        while True:
            with contextlib.suppress(FileNotFoundError):  # not there, or another process made room in this moment
                with contextlib.suppress(PermissionError):
                    os.utime(path)  # used now
                return open(path, "rb")
            self._fetch(address, path)

    def lock(self, address: str, suffix: str = ".lock") -> Path:
        """A file to be locked while something is made of the address, which only one process is to do."""
        path = self.place(address, suffix)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            path.touch()
        except OSError as error:
            raise UserError(f"data.shard_cache={str(self.folder)!r}: cannot write there ({error.strerror})") from error
        return path

    def _fetch(self, address: str, path: Path) -> None:
        with alone_in(self.lock(address)):
            if path.exists():
                return
            for left_over in self.folder.glob(f".{path.name}.*.tmp"):  # of a process that was killed
                left_over.unlink()
            with atomic_path(path) as temporary:
                fetch(address, temporary, self.field)
            self._make_room(path)

    def _make_room(self, newest: Path) -> None:
        held = []
        for path in self.folder.glob("*.tar"):
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                held.append((status.st_mtime_ns, status.st_size, path))
        over = sum(size for _, size, _ in held) - self.limit
        for _, size, path in sorted(held):
            if over > 0 and path != newest:
                path.unlink(missing_ok=True)  # whoever has it open reads on
                over -= size


def fetch(address: str, path: Path, field: str = "data.path") -> None:
    """Write what an http(s) or pipe address gives. Raises UserError, naming `field`, when it fails three times.

    A shard that cannot be had is an error and is not passed over: at the next start it may be there, and all indices
    of the data set would be others.
    """
    for wait in (*WAITS, None):
        try:
            _fetch_once(address, path)
            return
        except _Failed as error:
            if wait is None:
                raise UserError(f"{field}: {address} cannot be fetched ({error})") from error
            logging.warning("%s cannot be fetched (%s); trying again", address, error)
            time.sleep(wait)


class _Failed(Exception):
    """Why a shard did not come."""


def _fetch_once(address: str, path: Path) -> None:
    with open(path, "wb") as file:
        if address.startswith("pipe:"):
            done = subprocess.run(address.removeprefix("pipe:"), shell=True, stdout=file, stderr=subprocess.PIPE)
            if done.returncode:
                said = done.stderr.decode(errors="replace").strip().splitlines()
                raise _Failed(f"exit status {done.returncode}" + "".join(f": {line}" for line in said[-1:]))
            return
        try:
            with urllib.request.urlopen(address, timeout=TIMEOUT) as response:
                shutil.copyfileobj(response, file, 1 << 20)
                wanted = response.headers.get("Content-Length")
        except (urllib.error.URLError, http.client.HTTPException, ConnectionError, TimeoutError) as error:
            raise _Failed(reason(error)) from error
        if wanted is not None and file.tell() != int(wanted):
            raise _Failed(f"{file.tell()} of {wanted} bytes came")

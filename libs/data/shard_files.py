"""Where samples lie: tar files, and folders that stand for one."""

import contextlib
import dataclasses
import os
import tarfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError
from .image_files import files_digest, list_images
from .shard_cache import ShardCache
from .shard_urls import is_remote

CAPTIONS = ("json", "txt")
NAMED = 3  # of what is left out, so many are named

Where = int | str  # of a file: its offset in the tar, or its name in the folder
Read = Callable[[Where, int], bytes]


@dataclasses.dataclass
class LeftOut:
    """What is not used: per reason how many samples (or shards), and the first ones' names."""

    counts: dict[str, int] = dataclasses.field(default_factory=dict)
    names: dict[str, list[str]] = dataclasses.field(default_factory=dict)

    def add(self, why: str, name: str) -> None:
        self.merge(LeftOut({why: 1}, {why: [name]}))

    def merge(self, other: "LeftOut") -> None:
        for why, count in other.counts.items():
            self.counts[why] = self.counts.get(why, 0) + count
            self.names[why] = (self.names.get(why, []) + other.names[why])[:NAMED]

    def lines(self) -> list[str]:
        """One a reason: "unreadable image: 2 (a.tar/00003.png, a.tar/00009.png)"."""
        return [f"{why}: {count:,} ({', '.join(self.names[why])}{', ...' * (count > len(self.names[why]))})"
                for why, count in self.counts.items()]


class TarShard:
    """A tar file, local or fetched into the cache."""

    def __init__(self, address: str, cache: ShardCache):
        self.address, self.cache = address, cache

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """Yield the function that reads a member. Raises UserError where the shard is gone, and where it is shorter."""
        def read(where: int, size: int) -> bytes:
            file.seek(where)
            content = file.read(size)
            if len(content) < size:
                raise UserError(f"{self.cache.field}: {self.address} has changed while it was in use")
            return content

        with self._open() as file:
            yield read

    def members(self, left_out: LeftOut) -> Iterator[tuple[str, str, int, int]]:
        """Yield (key, extension, offset, bytes) of each file, as its name is cut at the first point."""
        end = 0
        with self._open() as file:
            try:
                with tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        end = member.offset_data + member.size
                        folder, _, name = member.name.rpartition("/")
                        stem, _, extension = name.partition(".")
                        if member.isfile() and stem and end <= os.fstat(file.fileno()).st_size:
                            yield f"{folder}/{stem}".lstrip("/"), extension.lower(), member.offset_data, member.size
                    file.seek(tar.offset)
                    whole = file.read(tarfile.BLOCKSIZE) == bytes(tarfile.BLOCKSIZE)  # the mark of the end
            except (tarfile.TarError, EOFError, ValueError, OverflowError):
                whole = False
        if not whole:
            left_out.add("shard cut off or damaged, its first part is used" if end else
                         "no tar file (a compressed one: pipe:gunzip -c FILE)", self.address)

    def state(self) -> dict[str, Any]:
        """What changes when the file does; an address has to keep its content."""
        if is_remote(self.address):
            return {"address": self.address}
        status = os.stat(self.address)
        return {"bytes": status.st_size, "time": status.st_mtime_ns}

    def lock(self) -> Path:
        """What is locked while the index is made."""
        return self.cache.lock(self.address, ".index.lock") if is_remote(self.address) else Path(self.address)

    def index_files(self) -> list[Path]:
        """Where its index may be kept, the best place first."""
        if is_remote(self.address):
            return [self.cache.place(self.address, ".index.json")]
        path = Path(self.address).absolute()
        return [path.with_name(f".{path.name}.index.json"), self.cache.place(str(path), ".index.json")]

    def _open(self) -> BinaryIO:
        try:
            return self.cache.open(self.address) if is_remote(self.address) else open(self.address, "rb")
        except OSError as error:
            raise UserError(f"{self.cache.field}: {self.address} cannot be read ({error.strerror})") from error


class FolderShard:
    """A folder of images with their captions beside them, which stands for one shard."""

    def __init__(self, root: Path, cache: ShardCache, field: str = "data.path"):
        self.root, self.cache, self.address, self.field = root, cache, str(root), field

    @contextlib.contextmanager
    def reading(self) -> Iterator[Read]:
        """Yield the function that reads a file. Raises UserError where it is gone, and where its size is another."""
        yield self._read

    def members(self, left_out: LeftOut) -> Iterator[tuple[str, str, str, int]]:
        """Yield (key, extension, name, bytes) of the images and of what bears their names, sorted."""
        for name in self._names():
            key, extension = os.path.splitext(name)
            yield key, extension[1:].lower(), name, os.stat(self.root / name).st_size

    def state(self) -> dict[str, Any]:
        return {"sha256": files_digest(self.root, self._names())}

    def lock(self) -> Path:
        return self.root

    def index_files(self) -> list[Path]:
        return [self.root / ".index.json", self.cache.place(str(self.root.absolute()), ".index.json")]

    def _read(self, where: str, size: int) -> bytes:
        try:
            content = (self.root / where).read_bytes()
        except OSError as error:
            raise UserError(f"{self.field}: {self.root / where} cannot be read ({error.strerror})") from error
        if len(content) != size:
            raise UserError(f"{self.field}: {self.root / where} has changed while it was in use")
        return content

    def _names(self) -> list[str]:
        images = list_images(self.root, self.field)
        beside = {f"{os.path.splitext(name)[0]}.{kind}" for name in images for kind in CAPTIONS}
        return sorted([*images, *(name for name in beside if (self.root / name).is_file())], key=os.path.splitext)


Shard = TarShard | FolderShard

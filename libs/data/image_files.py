"""Where image files lie: in a folder, or unextracted in a zip."""

import hashlib
import io
import os
import zipfile
from pathlib import Path
from typing import BinaryIO

from ..errors import UserError
from ..files import reason

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def list_images(root: str | Path, field: str = "data.path") -> list[str]:
    """Names, relative to `root` and sorted, of all image files below it; hidden ones are left out.

    Raises UserError, naming `field`, where there is no folder or no image.
    """
    root = Path(root)
    if not root.is_dir():
        raise UserError(f"{field}={str(root)!r} is not a folder")
    found = []
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        # Strings, since a Path for each of a million images takes its time.
        prefix = "" if folder == str(root) else os.path.relpath(folder, root).replace(os.sep, "/") + "/"
        found += [prefix + name for name in names if _is_image(name)]
    if not found:
        raise UserError(f"{field}={str(root)!r} holds no images ({', '.join(EXTENSIONS)})")
    return sorted(found)


def files_digest(root: str | Path, names: list[str]) -> str:
    """SHA-256 of the names, sizes and times of the files `root/name`: the same as long as the files are."""
    digest = hashlib.sha256()
    for name in names:
        status = os.stat(f"{root}/{name}")
        digest.update(f"{name}\0{status.st_size}\0{status.st_mtime_ns}\n".encode())
    return digest.hexdigest()


class Folder:
    """Image files below a folder. `root` stands before their names; `home` is where what is made of them is kept."""

    def __init__(self, root: str | Path, field: str = "data.path"):
        self.root = self.home = Path(root)
        self.field = field

    def names(self) -> list[str]:
        """Of all images, sorted."""
        return list_images(self.root, self.field)

    def open(self, name: str) -> str:
        """What Pillow opens."""
        return f"{self.root}/{name}"

    def digest(self, names: list[str]) -> str:
        """Of the state of these files."""
        return files_digest(self.root, names)


class Zip:
    """Image files in a zip, read where they lie."""

    def __init__(self, root: str | Path, field: str = "data.path"):
        self.root, self.home, self.field = Path(root), Path(root).parent, field
        self._opened: tuple[int, zipfile.ZipFile] | None = None  # by a process of this number
        self._archive()

    def names(self) -> list[str]:
        names = sorted(name for name in self._archive().namelist() if _is_image(name.rsplit("/", 1)[-1]))
        if not names:
            raise UserError(f"{self.field}={str(self.root)!r} holds no images ({', '.join(EXTENSIONS)})")
        return names

    def open(self, name: str) -> BinaryIO:
        return io.BytesIO(self.read(name))

    def read(self, name: str) -> bytes:
        """The content of one file, an image or not."""
        try:
            return self._archive().read(name)
        except (OSError, KeyError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile) as error:
            raise UserError(f"{self.field}: {self.root}/{name} cannot be read ({reason(error)})") from error

    def read_ending(self, ending: str) -> bytes:
        """The content of the file whose name ends so."""
        return self.read(next((name for name in self._archive().namelist() if name.endswith(ending)), ending))

    def digest(self, names: list[str]) -> str:
        state = files_digest(self.home, [self.root.name])
        return hashlib.sha256("\n".join([state, *names]).encode()).hexdigest()

    def _archive(self) -> zipfile.ZipFile:
        # A process that was forked shares the file's position with its parent: it opens the file itself.
        if self._opened is None or self._opened[0] != os.getpid():
            try:
                self._opened = os.getpid(), zipfile.ZipFile(self.root)
            except (OSError, zipfile.BadZipFile) as error:
                raise UserError(f"{self.field}={str(self.root)!r} cannot be read as a zip file "
                                f"({getattr(error, 'strerror', None) or reason(error)})") from error
        return self._opened[1]

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_opened": None}


def open_files(path: str | Path, field: str = "data.path") -> Folder | Zip:
    """The folder or the zip at `path`. Raises UserError, naming `field`, where there is neither."""
    path = Path(path).expanduser()
    if path.is_dir():
        return Folder(path, field)
    if path.suffix == ".zip" and path.is_file():
        return Zip(path, field)
    raise UserError(f"{field}={str(path)!r} is neither a folder nor a .zip file")


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")

"""Published models: a folder, or an id of the Hugging Face hub. Found before any work begins."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from textwrap import shorten
from types import ModuleType

from .errors import UserError
from .files import reason
from .provenance import file_sha256

FILES = ("*.json", "*.txt", "*.safetensors")  # weights that load without running code, and what belongs to them


def find_model(path: str, field: str, fetch: Callable[[str], str | Path] | None = None) -> Path:
    """The folder of the model `path`: the folder itself, or the one in the hub's cache, fetched if it is not there.

    fetch: `fetch(hub id)` -> its folder; by default all FILES of the id.
    Raises UserError, naming the config field, where there is neither.
    """
    folder = Path(path).expanduser()
    if folder.is_dir():
        return folder
    try:
        return Path((fetch or _fetch_all)(path))
    except (OSError, ValueError) as error:  # no network, no such id, no form of an id
        raise UserError(f"{field}={path!r} is no folder, and cannot be had from the Hugging Face hub "
                        f"({shorten(reason(error), 160)})") from error


def model_id(folder: Path) -> str:
    """What tells a model from any other: the commit of one from the hub, the SHA-256 of other folders' files."""
    return folder.name if folder.parent.name == "snapshots" else file_sha256(folder)


@contextlib.contextmanager
def quiet(*libraries: ModuleType) -> Iterator[None]:
    """No bars and no messages while models load: what goes wrong is raised, and told in one line.

    libraries: `transformers.utils.logging` and `diffusers.utils.logging`, of those that are in use.
    """
    levels = [library.get_verbosity() for library in libraries]
    for library in libraries:
        library.set_verbosity(library.CRITICAL)
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level in zip(libraries, levels, strict=True):
            library.set_verbosity(level)
            library.enable_progress_bar()


def _fetch_all(name: str) -> str:
    from huggingface_hub import snapshot_download

    return snapshot_download(name, allow_patterns=list(FILES))

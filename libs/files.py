"""Files appear whole or not at all, and say in one line what went wrong."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

from .errors import UserError


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; what was written there becomes `path` when the block ends well.

    Parent folders are made. An operating system's refusal (no permission, disk full, not a folder) becomes a
    UserError that names `path`; nothing half-written stays behind.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        os.replace(temporary, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or reason(error)}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def reason(error: Exception) -> str:
    """First line of an error's text, or its type's name where it has none: to be quoted in a UserError."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""Files appear whole or not at all, and say in one line what went wrong."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

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


def write_json(path: str | Path, content: Mapping[str, Any]) -> None:
    """The content as a file that appears whole or not at all."""
    with atomic_path(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n")


def require_json(out: str | None) -> None:
    """Refuse, before anything is measured, an --out with another ending than .json."""
    if out is not None and not out.endswith(".json"):
        raise UserError(f"--out={out} must end in .json")


def reason(error: Exception) -> str:
    """First line of an error's text, or its type's name where it has none: to be quoted in a UserError."""
    return str(error).splitlines()[0] if str(error) else type(error).__name__

"""What a result needs beside its numbers so that it can be made again: weights, code, packages, machine."""

import hashlib
import os
import platform
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from .config import fields

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("torch", "torchvision", "numpy", "scipy", "diffusers", "transformers", "accelerate", "clean-fid",
            "xformers")


def file_sha256(path: str | Path) -> str:
    """SHA-256 of a file, or of all files of a folder with their names."""
    path, digest = Path(path), hashlib.sha256()
    if path.is_dir():
        for each in sorted(path.rglob("*")):
            if each.is_file():
                digest.update(f"{each.relative_to(path).as_posix()}\0{file_sha256(each)}\n".encode())
        return digest.hexdigest()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def command_line(script: str, config: Mapping | None, flags: SimpleNamespace, names: Sequence[str]) -> str:
    """The command that makes this run again: its config, the fields overridden, and the flags `names`.

    script: a file, or `-m` and a module.
    """
    words = ["python", *script.split()]
    if config is not None:
        values = fields(config)
        words += [f"--config={flags.config}"]
        words += [f"--config.{path}={_text(values[path])}" for path in sorted(flags.overrides)]
    held = {name: getattr(flags, name) for name in names}
    words += [f"--{name}" if value is True else f"--{name}={_text(value)}"
              for name, value in held.items() if value is not None and value is not False]
    return shlex.join(words)


def _text(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list | tuple) else str(value)


def origin(script: str, config: Mapping | None, flags: SimpleNamespace, names: Sequence[str]) -> dict[str, Any]:
    """Packages, code and command behind a result, under the names that its JSON has for them; see command_line."""
    return {"versions": versions(), "git_commit": git_commit(), "command": command_line(script, config, flags, names)}


def git_commit() -> str | None:
    """The commit of the code, with "-dirty" if files were changed since; None outside a git checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*", "--abbrev=40"]
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:  # no git on this machine
        return None
    return ran.stdout.strip() or None


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that results depend on, as far as they are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def machine(device: torch.device) -> str:
    """The hardware behind a timing, such as "NVIDIA H200" or "AMD EPYC 7763, 2 threads"."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = f"{_cpu_name()}, {torch.get_num_threads()} threads"
    return name if device.type == "cpu" else f"{name}, {device.type}"


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else f"{platform.machine()} with {os.cpu_count()} cores"

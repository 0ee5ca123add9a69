"""What every entry script shares: flags, the config and its overrides, one-line errors, exit status, logging.

    def define_flags(fv):
        flags.DEFINE_string("seeds", "0-15", "seeds of the images", flag_values=fv)

    def sample(config, flags): ...

    def main(argv=None):
        return cli.run(sample, define_flags, argv)
"""

import contextlib
import errno
import inspect
import logging
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Literal, NamedTuple

import torch
from absl import flags as absl_flags
from absl import logging as absl_logging
from ml_collections import ConfigDict

from . import config as config_files
from .errors import UserError, is_out_of_memory

_made: list[Path] = []  # folders that this command's output_dir made

Body = Callable[[ConfigDict | None, SimpleNamespace], int | None]
DefineFlags = Callable[[absl_flags.FlagValues], None]
TakesConfig = Literal["required", "optional", "no"]

PATIENCE = 10  # seconds that a process waits for the main one to tell an error

# Messages of other people's code that a user can do nothing about.
QUIET = (
    r"`torch\.jit\.\w+` is deprecated",  # clean-fid's Inception is a TorchScript file
    r"Detected call of `lr_scheduler\.step\(\)` before",  # fp16: the loss scale is found by skipping steps
)


class Command(NamedTuple):
    """One sub-command of an entry script; the first line of the body's docstring describes it."""

    body: Body
    define_flags: DefineFlags
    takes_config: TakesConfig = "no"
    positional: str | None = None  # the flag whose value an argument without dashes is


def run(
    body: Body,
    define_flags: DefineFlags,
    argv: Sequence[str] | None = None,
    *,
    takes_config: TakesConfig = "required",
) -> int:
    """Parse `argv` (without the program's name; None: the process's own), call `body(config, flags)`.

    `define_flags(fv)` declares absl flags on a FlagValues of this call alone, so that a process can call any
    number of mains. `config` is the locked ConfigDict of --config with the --config.a.b=value overrides (None
    if not given), `flags` holds a value per flag and, as `overrides`, the paths of the fields that were
    overridden, as `chosen` these and what the config's methods set. The help text is the docstring of the body's
    module.

    Returns the exit status: what the body returns, or 0; 2 after a user's mistake or an operating system's
    refusal (disk full, not writable) and 130 after Ctrl-C, both told in one line. Other exceptions are bugs.
    """
    argv = sys.argv[1:] if argv is None else list(argv)
    return _run(Command(body, define_flags, takes_config), argv, sys.modules[body.__module__].__doc__)


def run_command(commands: Mapping[str, Command], argv: Sequence[str] | None = None, doc: str = "") -> int:
    """`run` for scripts with sub-commands (`prepare_data.py stats --out=...`); `doc` is the script's help."""
    argv = sys.argv[1:] if argv is None else list(argv)
    name = argv[0] if argv and not argv[0].startswith("-") else None
    if name in commands:
        return _run(commands[name], argv[1:], inspect.getdoc(commands[name].body))
    if name is None and any(map(_is_help, argv)):
        print(inspect.cleandoc(doc), "\ncommands (each has its own --help):", sep="\n")
        for command, (body, *_) in commands.items():
            print(f"  {command:16} {inspect.getdoc(body).splitlines()[0]}")
        return 0
    problem = "no command given" if name is None else f"{name!r} is no command"
    _print_error(f"{problem}; choose from {', '.join(commands)}")
    return 2


def is_main_process() -> bool:
    """Whether this is the process that speaks: the only one, or the first of those of `accelerate launch`."""
    return _rank() == 0


def output_dir(path: str | os.PathLike, flag: str = "out") -> Path:
    """Make the folder `path` and see that files can be written there; a UserError names `flag` if not.

    A command that is refused afterwards leaves no empty folder behind.
    """
    path = Path(path)
    _made.extend(each for each in (path, *path.parents) if not each.exists())
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise UserError(f"--{flag}={path}: cannot write there ({error.strerror})") from None
    return path


def _remove_empty_folders() -> None:
    for folder in sorted(_made, key=lambda each: len(each.parts), reverse=True):
        with contextlib.suppress(OSError):  # something is in it by now
            folder.rmdir()


def choose_device(name: str = "auto", field: str = "compute.device") -> torch.device:
    """The torch device called `name`; "auto" is a GPU if there is one (CUDA, then MPS), else the CPU.

    Raises UserError, naming `field`, for a device that this machine does not have.
    """
    available = ["cpu"]
    if torch.backends.mps.is_available():
        available.insert(0, "mps")
    if torch.cuda.is_available():
        available = ["cuda", *(f"cuda:{i}" for i in range(torch.cuda.device_count())), *available]
    if name not in ("auto", *available):
        raise UserError(f"{field}={name!r} is not available here; choose from auto, {', '.join(available)}")
    return torch.device(available[0] if name == "auto" else name)


def _run(command: Command, argv: list[str], doc: str | None) -> int:
    _set_up_logging()
    _made.clear()
    fv = absl_flags.FlagValues()
    command.define_flags(fv)
    if command.takes_config != "no":
        text = "configs/NAME.py[:method,method]; --config.FIELD=VALUE sets one of its fields"
        absl_flags.DEFINE_string("config", None, text, flag_values=fv)
    flags = SimpleNamespace()
    try:
        overrides = _parse_flags(fv, [arg for arg in argv if not _is_help(arg)], command.positional)
        config = _build_config(fv["config"].value if "config" in fv else None, overrides)
        if any(map(_is_help, argv)):
            print(_help(doc or "", fv, config))
            return 0
        if config is None and command.takes_config == "required":
            raise UserError(f"--config is missing; choose from {', '.join(config_files.known_files())}")
        flags = _checked_values(fv)
        flags.overrides = frozenset(path for path, _ in overrides)
        flags.chosen = flags.overrides
        if config is not None:
            flags.chosen |= config_files.method_fields(fv["config"].value)
        return command.body(config, flags) or 0
    except UserError as error:
        _print_error(str(error))
        _remove_empty_folders()
        return 2
    except KeyboardInterrupt:
        if is_main_process():  # Ctrl-C reaches every process
            _print_error("interrupted")
        return 130
    except OSError as error:
        _print_error(_describe_os_error(error, vars(flags)))
        return 2
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        _print_error("out of memory; use fewer rows a call or a smaller batch")
        return 2


def _parse_flags(
    fv: absl_flags.FlagValues, argv: list[str], positional: str | None = None
) -> list[tuple[str, str]]:
    """Give the flags their values; return the (field path, text) pairs of --config.FIELD=VALUE."""
    overrides = []
    rest = list(argv)
    while rest:
        arg = rest.pop(0)
        if positional and not arg.startswith("-") and fv[positional].value is None:
            arg = f"--{positional}={arg}"
        if not arg.startswith("--"):
            raise UserError(f"{arg!r} is no flag; flags are written --name=value")
        name, has_value, text = arg[2:].partition("=")
        is_override = name.startswith("config.") and "config" in fv
        if not is_override and name not in fv:
            if has_value or not name.startswith("no") or not _is_switch(fv, name[2:]):
                raise UserError(f"--{name}: no such flag; choose from --{', --'.join(sorted(fv))}")
            name, has_value, text = name[2:], "=", "false"
        if not has_value and _is_switch(fv, name):
            text = "true"
        elif not has_value:
            if not rest or rest[0].startswith("--"):
                raise UserError(f"--{name}: the value is missing")
            text = rest.pop(0)
        if is_override:
            overrides.append((name.removeprefix("config."), text))
        else:
            _set_flag(fv[name], text)
    return overrides


def _is_switch(fv: absl_flags.FlagValues, name: str) -> bool:
    return name in fv and fv[name].boolean


def _set_flag(flag: absl_flags.Flag, text: str) -> None:
    try:
        flag.parse(text)
    except absl_flags.IllegalFlagValueError:
        if flag.boolean:
            want = "true or false"
        elif isinstance(flag, absl_flags.EnumFlag):
            want = f"one of {', '.join(flag.parser.enum_values)}"
        else:
            want = flag.parser.syntactic_help
        raise UserError(f"--{flag.name}={text}: want {want}") from None


def _checked_values(fv: absl_flags.FlagValues) -> SimpleNamespace:
    """The values of all flags, after absl's validators (`mark_flag_as_required` and the like) have run."""
    try:
        fv.validate_all_flags()
    except absl_flags.IllegalFlagValueError as error:
        text = str(error).removeprefix("flag ")
        missing = text.endswith("must have a value other than None.")
        raise UserError(f"{text.partition('=')[0]} is missing" if missing else text) from None
    fv.mark_as_parsed()
    return SimpleNamespace(**fv.flag_values_dict())


def _build_config(argument: str | None, overrides: list[tuple[str, str]]) -> ConfigDict | None:
    if argument is None:
        for path, text in overrides:
            raise UserError(f"--config.{path}={text}: there is no --config=FILE whose field this could be")
        return None
    config = config_files.load(argument)
    for path, text in overrides:
        config_files.override(config, path, text)
    return config


def _is_help(arg: str) -> bool:
    return arg in ("--help", "-h", "-help", "--helpfull")


def _help(doc: str, fv: absl_flags.FlagValues, config: ConfigDict | None) -> str:
    lines = [inspect.cleandoc(doc), "", "flags:"]
    for name in sorted(fv):
        default = "" if fv[name].default is None else fv[name].default
        lines.append(f"  {f'--{name}={default}':26} {fv[name].help}")
    if config is not None:
        lines += ["", f"fields of {fv['config'].value}:"]
        lines += [f"  --config.{path}={value}" for path, value in config_files.fields(config).items()]
    return "\n".join(lines)


def _rank() -> int:
    """This process's number under `accelerate launch` or torchrun, which tell it by the environment."""
    return int(os.environ.get("RANK") or os.environ.get("LOCAL_RANK") or 0)


def _print_error(text: str) -> None:
    """One line on stderr. Where there are several processes, the main one speaks for all.

    A launcher ends all processes as soon as one exits, so the others leave the main one time to speak. One
    that is still there after that met its error alone (its disk or its GPU is full) and tells it.
    """
    who = ""
    if not is_main_process():
        time.sleep(PATIENCE)
        who = f" (process {_rank()})"
    print(f"error{who}:", " ".join(text.split("\n")), file=sys.stderr)


def _describe_os_error(error: OSError, flags: dict) -> str:
    """What the system refused, and for which path. A write into an open file that fails names none."""
    disk_refused = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.EFBIG)
    place = error.filename or (disk_refused and (flags.get("out") or flags.get("workdir")))
    return f"{place}: {error.strerror}" if place else error.strerror or str(error)


class _StderrHandler(logging.StreamHandler):
    """Writes to what sys.stderr is at the moment: a process that calls several mains may exchange it."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)


def _set_up_logging() -> None:
    """Short INFO lines ("I 12:30:05 step 100") on stderr from the main process; others log errors only."""
    # On the root logger: absl adds a handler there if it finds none, and each line would come twice. The root
    # stays at WARNING, so that other libraries' INFO lines do not show.
    if not any(isinstance(handler, _StderrHandler) for handler in logging.root.handlers):
        handler = _StderrHandler()
        handler.setFormatter(logging.Formatter("%(levelname).1s %(asctime)s %(message)s", "%H:%M:%S"))
        logging.root.addHandler(handler)
    absl_logging.set_verbosity(absl_logging.INFO if is_main_process() else absl_logging.ERROR)
    for message in QUIET:
        warnings.filterwarnings("ignore", message=message)

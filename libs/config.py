"""Config files: load `configs/NAME.py[:methods]`, then set single fields from the text of a command line.

ml_collections' own flag parser is not used: a config file that fails reaches the user as a trace inside a
message, an unknown field as AttributeError or KeyError, and the tuple (1, 2) takes floats.
"""

import contextlib
import inspect
import traceback
import types
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from .errors import UserError

ROOT = Path(__file__).resolve().parents[1]  # the repository: config paths are also looked up here
MODEL = ("backbone", "schedule", "denoiser", "cond", "codec")  # sections that a checkpoint's description replaces


def load(argument: str) -> ConfigDict:
    """Run `get_config(methods)` of the file in `PATH[:methods]` and return its config, locked.

    PATH is relative to the working directory or, failing that, to the repository. A file without methods
    may have a `get_config()` that takes no argument. Raises UserError for a file that is missing, fails,
    or does not define `get_config`.
    """
    name, _, methods = argument.partition(":")
    path = _find(name)
    module = types.ModuleType(path.stem)
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), vars(module))
        get_config = getattr(module, "get_config", None)
        if not callable(get_config):
            raise UserError(f"--config={name}: the file defines no get_config()")
        if methods and not inspect.signature(get_config).parameters:
            raise UserError(f"--config={argument}: {name} takes no methods after the colon")
        config = get_config(methods) if methods else get_config()
    except UserError:
        raise
    except Exception as error:  # whatever a config file raises is a mistake in it, told in one line
        raise UserError(f"--config={name}: {describe_error(error, path)}") from error
    if not isinstance(config, ConfigDict):
        raise UserError(f"--config={name}: get_config() returns {type(config).__name__}, not a ConfigDict")
    return config.lock()


def method_fields(argument: str) -> frozenset[str]:
    """Paths of the fields that the methods of `PATH[:methods]` set; see `load`.

    Without those of methods that say what the model is (`cosine`, an emoji config's `text`): that its guidance is 2
    is no wish of the user's, which a student without guidance would have to refuse.
    """
    name, _, methods = argument.partition(":")
    if not methods:
        return frozenset()
    names, before, found = methods.split(","), fields(load(name)), set()
    for count in range(1, len(names) + 1):
        after = fields(load(f"{name}:{','.join(names[:count])}"))
        changed = {path for path, value in after.items() if path not in before or before[path] != value}
        if not any(path.partition(".")[0] in MODEL for path in changed):
            found |= changed
        before = after
    return frozenset(found)


def override(config: ConfigDict, path: str, text: str) -> None:
    """Set the field `path` ("sampler.steps") to what `text` says, read by `parse_value`.

    >>> config = ConfigDict({"sampler": {"name": "ddim", "steps": 50}}).lock()
    >>> override(config, "sampler.steps", "20")
    >>> config.sampler.steps
    20
    >>> override(config, "sampler.stepz", "20")
    Traceback (most recent call last):
    ...
    libs.errors.UserError: --config.sampler.stepz=20: no such field in config.sampler; choose from name, steps
    """
    flag = f"--config.{path}={text}"
    section, where = config, "config"
    *parents, field = path.split(".")
    for part in parents:
        if not isinstance(section.get(part), ConfigDict):
            raise UserError(f"{flag}: no such field in {where}; choose from {_names(section)}")
        section, where = section[part], f"{where}.{part}"
    if field not in section:
        raise UserError(f"{flag}: no such field in {where}; choose from {_names(section)}")
    if isinstance(section[field], ConfigDict):
        raise UserError(f"{flag}: {where}.{field} is a section; choose a field: {_names(section[field])}")
    try:
        section[field] = parse_value(text, section[field], section.get_type(field))
    except ValueError as error:
        raise UserError(f"{flag}: {error}") from None


def parse_value(text: str, default: Any, kind: type) -> Any:
    """Read `text` as a value of type `kind`, the declared type of a field whose value is `default`.

    Strings are taken verbatim. Elements of a tuple have the type of the default's elements. A field that is
    None takes the type of its placeholder (text, if it is a plain None), and `none` leaves it None.
    Raises ValueError that says what is wanted.

    >>> parse_value("0,1,2", "0", str), parse_value("1", 0.5, float), parse_value("True", False, bool)
    ('0,1,2', 1.0, True)
    >>> parse_value("(1,2,4)", (1, 2), tuple), parse_value("1,2.5", (0.0,), tuple)
    ((1, 2, 4), (1.0, 2.5))
    >>> parse_value("none", None, int), parse_value("3", None, int)
    (None, 3)
    >>> parse_value("2.5", 50, int)
    Traceback (most recent call last):
    ...
    ValueError: want an int
    """
    if default is None and text.lower() == "none":
        return None
    if kind in (str, types.NoneType):
        return text
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("want true or false")
        return text.lower() == "true"
    if kind in (int, float):
        return _number(text, kind)
    if kind in (tuple, list):
        return kind(_element(part, default) for part in text.strip().strip("()[]").split(",") if part.strip())
    raise ValueError(f"a field of type {kind.__name__} cannot be set from the command line")


def fields(config: ConfigDict, prefix: str = "") -> dict[str, Any]:
    """All fields of a config by their dotted path, sorted.

    >>> fields(ConfigDict({"sampler": {"steps": 50, "name": "ddim"}, "rows": 16}))
    {'rows': 16, 'sampler.name': 'ddim', 'sampler.steps': 50}
    """
    flat = {}
    for name in sorted(config):
        value = config[name]
        flat |= fields(value, f"{prefix}{name}.") if isinstance(value, ConfigDict) else {prefix + name: value}
    return flat


def known_files() -> list[str]:
    """The config files of the repository, as they are named to --config."""
    files = [path for path in ROOT.glob("configs/*.py") if "def get_config(" in path.read_text("utf-8")]
    return sorted(path.relative_to(ROOT).as_posix() for path in files)


def _names(section: ConfigDict) -> str:
    return ", ".join(sorted(section))


def _number(text: str, kind: type) -> int | float:
    try:
        value = kind(text)
    except ValueError:
        value = None
    if value is None or value != value:  # nan is no setting
        raise ValueError(f"want {'an int' if kind is int else 'a float'}")
    return value


def _element(text: str, default: tuple | list | None) -> Any:
    """One element of a tuple, of the type of the default's elements (ints beside floats are floats).

    Those of an empty default are what they read as: an int, a float or text.
    """
    kinds = {type(element) for element in default or ()}
    text = text.strip().strip("'\"")
    if kinds == {str}:
        return text
    if not kinds <= {int, float}:
        raise ValueError("a tuple of other than ints, floats or strings cannot be set from the command line")
    if kinds:
        try:
            return _number(text, float if float in kinds else int)
        except ValueError as error:
            raise ValueError(f"{error} in every place of the tuple, such as 1,2 or (1,2)") from None
    for kind in (int, float):
        with contextlib.suppress(ValueError):
            return _number(text, kind)
    return text


def find_file(name: str) -> Path | None:
    """The file of that name in the working directory or, failing that, in the repository; None where there is none."""
    return next((path for path in (Path(name), ROOT / name) if path.is_file()), None)


def _find(name: str) -> Path:
    path = find_file(name)
    if path is not None:
        return path
    raise UserError(f"--config={name}: no such file; choose from {', '.join(known_files())}")


def describe_error(error: Exception, path: Path) -> str:
    """What went wrong in the config file at `path`, and in which of its lines."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [frame.lineno for frame in frames if frame.filename == str(path)]
    if isinstance(error, SyntaxError) and error.filename == str(path):
        lines, error_text = [error.lineno], error.msg
    else:
        error_text = " ".join(str(error).split())
    place = f" in line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}{place}: {error_text}"

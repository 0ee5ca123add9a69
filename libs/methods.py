"""The methods named after the colon of `--config=configs/NAME.py:clockwork,progressive`."""

from collections.abc import Callable, Mapping

from ml_collections import ConfigDict

from .config import fields
from .errors import UserError, choose

Method = Callable[[ConfigDict], None]  # fills its own section of the config


def full(config: ConfigDict) -> None:
    """The whole network in every call: what the other policies are compared with, and the default."""
    config.policy = ConfigDict({"name": "full"})


METHODS: dict[str, Method] = {"full": full}


def apply_methods(config: ConfigDict, methods: str, table: Mapping[str, Method]) -> None:
    """Let each named method fill its section of the config.

    `methods` is a comma list of names of `table`; "" names none. Raises UserError for an unknown name and for
    two methods that set one field to different values (two policies), since the later would silently win.

    >>> config = ConfigDict({"policy": {"name": "full", "clock": 1}})
    >>> table = {"clockwork": lambda config: config.policy.update(name="clockwork", clock=4)}
    >>> apply_methods(config, "clockwork", table)
    >>> config.policy.name, config.policy.clock
    ('clockwork', 4)
    """
    owners: dict[str, str] = {}
    for name in filter(None, (part.strip() for part in methods.split(","))):
        method = choose("method after the colon of --config", name, table)
        before = fields(config)
        method(config)
        after = fields(config)
        for field in after:
            if field in before and before[field] == after[field]:
                continue
            if field in owners:
                both = f"{owners[field]} and {name} both set {field}"
                raise UserError(f"methods {methods!r} after the colon of --config: {both}; name one of them")
            owners[field] = name

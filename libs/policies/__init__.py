"""Policies: how much of a backbone runs in this call, behind the backbone's own signature.

One life cycle for all: `start(times, rows_per_image)` before the first call of a denoising loop, calls,
`stats()`, `disable()`.

The caching policies are settings (`Clockwork`, `EncoderPropagation`) that `attach(net)` makes into a running
`StepCache`: a schedule that says which steps run in full, and sites where the network is cut.
"""

from collections.abc import Callable, Mapping

from torch import nn

from ..errors import choose
from .full import Full


def clockwork_class():
    from .clockwork import Clockwork

    return Clockwork


def encoder_propagation_class():
    from .encoder_propagation import EncoderPropagation

    return EncoderPropagation


def early_exit_class():
    from .early_exit import EarlyExit

    return EarlyExit


# name -> a function that gives the class of its settings, since they load diffusers; None for the plain network
POLICIES: dict[str, Callable | None] = {
    "full": None,
    "clockwork": clockwork_class,
    "encoder_propagation": encoder_propagation_class,
    "early_exit": early_exit_class,
}

__all__ = ["POLICIES", "Full", "make_policy", "make_spec"]


def make_spec(section: Mapping):
    """The settings of a config's `policy` section (`name`, the rest its own fields); None for the plain network."""
    options = dict(section)
    function = choose("policy.name", options.pop("name"), POLICIES)
    return function()(**options) if function is not None else None


def make_policy(section: Mapping, net: nn.Module):
    """The running policy of a config's `policy` section around `net`."""
    spec = make_spec(section)
    return Full(net) if spec is None else spec.attach(net)

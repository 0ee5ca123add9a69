"""Clockwork (2312.08128): the low-resolution part of a UNet runs every few steps and is stood in for between."""

import copy
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..adaptors import Extrapolation
from ..adaptors.files import FIELD, check_adaptor, check_sizes, load_adaptor
from ..errors import UserError, choose, whole_number
from .hooks import Deep, Drop, Mode, SiteHook
from .sites import Sites, deep_sizes
from .step_cache import StepCache

CUTS = ("auto", "before", "after")


@dataclass(frozen=True)
class Clockwork:
    """Settings of Clockwork; `attach(net)` puts them to work.

    clock           every clock-th step runs the whole network, C(t) of section 3.3; 1 is the plain network
    depth           encoder blocks that still run on the other steps, and as many decoder blocks; 0 is the family's
                    own: 1, and 2 on SDXL
    adaptor         what stands in for the deep part: "identity" hands back its last output, "extrapolation" continues
                    the line through its last two, a module of `libs.adaptors` or the file of one computes it
                    (section 3.2). A module stays as it is: `attach` takes a copy, in eval mode
    protect_first   steps at the start that always run in full: early approximations cost the most (table 4)
    protect_last    steps at the end that do
    cut             where the deep part ends: "before" the upsampler as in the paper, "after" it as in the released
                    code; "auto" is what the adaptor needs, else "after", which costs less
    """

    clock: int = 2
    depth: int = 0
    adaptor: str | Path | nn.Module = "identity"
    protect_first: int = 0
    protect_last: int = 0
    cut: str = "auto"

    parallel = False  # every step needs its own x_t
    max_parallel = 0

    def __post_init__(self):
        whole_number("policy.clock", self.clock, 1, " (1 runs every step in full)")
        for name in ("depth", "protect_first", "protect_last"):
            whole_number(f"policy.{name}", getattr(self, name), 0)
        choose("policy.cut", self.cut, CUTS)
        if self.adaptor == "extrapolation":
            object.__setattr__(self, "adaptor", Extrapolation())
        elif isinstance(self.adaptor, str | Path) and self.adaptor != "identity":
            adaptor, made_for = load_adaptor(self.adaptor)
            adaptor.file, adaptor.made_for = str(self.adaptor), made_for
            object.__setattr__(self, "adaptor", adaptor)
        elif self.adaptor != "identity" and not (isinstance(self.adaptor, nn.Module) and hasattr(self.adaptor, "uses")):
            kind = type(self.adaptor).__name__
            raise UserError(f"{FIELD}: an object of class {kind} is no adaptor; choose from identity, extrapolation, a "
                            "file, or a module of libs.adaptors")
        needs = getattr(self.adaptor, "cut", "any")
        if self.cut == "auto":
            object.__setattr__(self, "cut", "after" if needs == "any" else needs)
        elif needs not in ("any", self.cut):
            raise UserError(f"policy.cut={self.cut!r}: a {type(self.adaptor).__name__} needs cut={needs!r}")

    def __repr__(self) -> str:
        """On one line, as an adaptor's own is not."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        if isinstance(self.adaptor, nn.Module):
            values["adaptor"] = getattr(self.adaptor, "file", type(self.adaptor).__name__)
        return f"Clockwork({', '.join(f'{name}={value!r}' for name, value in values.items())})"

    def is_full(self, index: int, total: int | None) -> bool:
        if index < self.protect_first:
            return True
        if self.protect_last:
            if total is None:
                raise UserError(f"policy.protect_last={self.protect_last}: the number of steps is not known here; use "
                                "apply_policy(pipe, ...) or start(times)")
            if index >= total - self.protect_last:
                return True
        return (index - max(0, self.protect_first - 1)) % self.clock == 0

    def after_step(self, x_T: Tensor) -> None:
        return None

    def hooks(self, net: nn.Module, parts: Sites, mode: Mode) -> list[tuple[nn.Module, SiteHook]]:
        depth = self.depth or parts.depth
        if depth >= len(parts.decoder):
            choices = ", ".join(map(str, range(1, len(parts.decoder))))
            raise UserError(f"policy.depth={depth}: this {type(net).__name__} has {len(parts.decoder)} levels; choose "
                            f"from {choices}")
        adaptor = None if self.adaptor == "identity" else self.adaptor
        if adaptor is not None and adaptor.uses & {"r_in", "r_in_key", "temb"}:
            if parts.time_token is not None:
                raise UserError(f"policy.adaptor: a {type(adaptor).__name__} is made for UNets; a U-ViT takes identity "
                                "or extrapolation")
            here = deep_sizes(net, parts, depth)
            if hasattr(adaptor, "made_for"):  # it came from a file
                check_adaptor(adaptor.file, adaptor.made_for, depth, self.cut, **here, stem=net.conv_in.weight)
            else:
                check_sizes(adaptor, here)
        last = len(parts.decoder) - depth - 1
        dropped = [*parts.encoder[depth:], *filter(None, [parts.middle]), *parts.decoder[:last]]
        deep = parts.decoder[last]
        own = copy.deepcopy(adaptor).eval() if adaptor is not None else None  # moved and cast with this network
        return [*((block, Drop(mode)) for block in dropped), (deep, Deep(mode, deep, self.cut, own))]

    def attach(self, net: nn.Module, clock: Any = None) -> StepCache:
        """The running policy around `net`, which it hooks in place."""
        return StepCache(net, self, clock)

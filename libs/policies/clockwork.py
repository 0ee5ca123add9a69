"""Clockwork (2312.08128): the low-resolution part of a UNet runs every few steps and is stood in for between."""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from ..adaptors import Extrapolation
from ..adaptors.files import check_adaptor, load_adaptor
from ..errors import UserError, choose
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
                    (section 3.2)
    protect_first   steps at the start that always run in full: early approximations cost the most (table 4)
    protect_last    steps at the end that do
    cut             where the deep part ends: "before" the upsampler as in the paper, "after" it as in the released
                    code; "auto" is what the adaptor needs, else "after", which costs less
    """

    clock: int = 2
    depth: int = 0
    adaptor: str | nn.Module = "identity"
    protect_first: int = 0
    protect_last: int = 0
    cut: str = "auto"

    parallel = False  # every step needs its own x_t
    max_parallel = 0

    def __post_init__(self):
        if self.clock < 1:
            raise UserError(f"policy.clock={self.clock} must be at least 1 (1 runs every step in full)")
        for name in ("depth", "protect_first", "protect_last"):
            if getattr(self, name) < 0:
                raise UserError(f"policy.{name}={getattr(self, name)} must not be negative")
        choose("policy.cut", self.cut, CUTS)
        if self.adaptor == "extrapolation":
            object.__setattr__(self, "adaptor", Extrapolation())
        elif isinstance(self.adaptor, str) and self.adaptor != "identity":
            adaptor, adaptor.made_for = load_adaptor(self.adaptor)
            object.__setattr__(self, "adaptor", adaptor)
        needs = getattr(self.adaptor, "cut", "any")
        if self.cut == "auto":
            object.__setattr__(self, "cut", "after" if needs == "any" else needs)
        elif needs not in ("any", self.cut):
            raise UserError(f"policy.cut={self.cut!r}: a {type(self.adaptor).__name__} needs cut={needs!r}")

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
            made_for = getattr(adaptor, "made_for", None)  # of an adaptor from a file
            if made_for is not None:
                check_adaptor(made_for, depth, self.cut, **deep_sizes(net, parts, depth), stem=net.conv_in.weight)
        last = len(parts.decoder) - depth - 1
        dropped = [*parts.encoder[depth:], *filter(None, [parts.middle]), *parts.decoder[:last]]
        deep = parts.decoder[last]
        return [*((block, Drop(mode)) for block in dropped), (deep, Deep(mode, deep, self.cut, adaptor))]

    def attach(self, net: nn.Module, clock: Any = None) -> StepCache:
        """The running policy around `net`, which it hooks in place."""
        return StepCache(net, self, clock)

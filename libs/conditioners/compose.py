"""All conditioners of a network together, joined by what the network takes them for."""

import copy
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import UserError, choose
from ..factory import load_function
from ..random import Stream
from ..text import PooledTextEncoder, make_text_encoder
from .adapters import Conditioner, Draws, Label
from .fields import INPUTS
from .tasks import Inpainting, SuperResolution
from .texts import TextContext, TextVector

TASK = "cond.task"
OF_IMAGES = ("task", "factor", "masks")  # fields of the cond section that only kind image has
OF_TEXTS = ("text_encoder", "tokens", "text_null", "text_drop")  # of it, those of the tasks that read texts
TEXT_TASKS = ("text", "pooled_text")
KINDS = {1: "y", 2: "vector", 3: "context", 4: "concat"}  # rank -> keyword argument of the network
JOINED = {"vector": 1, "context": 2, "concat": 1}  # dimension in which several are joined
RANKS = "(b,) int64 labels, (b, d) a vector, (b, tokens, width) a context or (b, c, h, w) beside x"


class Conditioners:
    """`conditioners(inputs, draws)` -> the network's keyword arguments, each (b, ...).

    parts        conditioners; vectors and images are joined by their channels, contexts by their width
    null_label   that stands for no label; -1 where there is none
    settings     fields of the `cond` section that decide them; `task` is what a UserError names
    device       where they are
    """

    def __init__(self, parts: Sequence[Conditioner], null_label: int = -1, settings: Mapping[str, Any] | None = None,
                 device: torch.device | str = "cpu"):
        self.parts, self.null_label, self.settings = list(parts), null_label, dict(settings or {})
        self.device = torch.device(device)
        self.field = f"{TASK}={self.settings['task']!r}" if self.settings else TASK
        self._shares: dict[str, list[tuple[int, int]]] = {}  # of each argument: which part gives how much of it

    @property
    def reads(self) -> set[str]:
        return {each.reads for each in self.parts}

    @property
    def fields(self) -> list[str]:
        """What they read that only samples of a data set have, such as aesthetic_score."""
        return sorted(self.reads - {*INPUTS})

    @property
    def guidable(self) -> bool:
        """Whether training leaves conditions out, all that have a rate together, so that there is something to guide
        against. Those without a rate are always there.
        """
        dropped = [each for each in self.parts if each.rate > 0]
        return bool(dropped) and (self.null_label >= 0 or all(each.reads != "label" for each in dropped))

    def always(self) -> "Conditioners":
        """The same, of which training leaves none out."""
        made = copy.copy(self)
        made.parts = [copy.copy(each) for each in self.parts]
        for each in made.parts:
            each.rate = 0.0
        return made  # what it is called with, both know

    @torch.no_grad()
    def __call__(self, inputs: Mapping[str, Any], draws: Draws, drop: bool = False) -> dict[str, Tensor]:
        """inputs: what the conditioners read, by name, b of each.

        drop: leave conditions out at their rates, as in training. One number decides for all conditioners of a row:
        those of equal rates are left out together, since guidance needs rows that have none.
        """
        held: dict[str, list[tuple[int, Tensor]]] = {}
        left_out = draws.uniform(1, Stream.TRAIN_DROP)[:, 0] if drop else None
        for number, each in enumerate(self.parts):
            if each.reads not in inputs:
                raise UserError(f"{self.field}: {_name(each)} reads {each.reads!r}, which is not there; choose from "
                                f"{', '.join(inputs)} (label: where cond.num_classes is set)")
            out = each(inputs[each.reads], draws)
            kind = self._kind(each, out, len(draws.seeds))
            if left_out is not None and each.rate:
                rows = (left_out < each.rate).to(out.device, non_blocking=True).view(-1, *[1] * (out.dim() - 1))
                out = torch.where(rows, self._null(each, out), out)
            held.setdefault(kind, []).append((number, out))
        cond = {kind: self._joined(kind, [out for _, out in given]) for kind, given in held.items()}
        self._shares.update({kind: [(number, out.shape[JOINED.get(kind, 0)]) for number, out in given]
                             for kind, given in held.items()})
        return cond

    @torch.no_grad()
    def unconditional(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`cond`, what a call gave or of the same widths, without the conditions that training leaves out: what it
        shows in their place.
        """
        null = {}
        for kind, value in cond.items():
            if kind not in JOINED:  # labels have one part
                null[kind] = self._null(self.parts[self._shares[kind][0][0]], value, kept=True)
                continue
            numbers, sizes = zip(*self._shares[kind], strict=True)
            shares = zip(numbers, value.split(sizes, JOINED[kind]), strict=True)
            null[kind] = torch.cat([self._null(self.parts[i], share, kept=True) for i, share in shares], JOINED[kind])
        return null

    def _null(self, each: Conditioner, out: Tensor, kept: bool = False) -> Tensor:
        """What stands for no condition `out` of a part. kept: `out` itself, where training always shows it."""
        if kept and not each.rate:
            return out
        return each.null(out) if out.is_floating_point() else torch.full_like(out, self.null_label)

    def picture(self, images: Tensor, draws: Draws) -> tuple[str, Tensor] | None:
        """(its name, (b, c, H, W)) of the first condition that can be seen."""
        for each in self.parts:
            picture = each.picture(images, draws) if each.reads == "image" else None
            if picture is not None:
                return each.sees_as, picture
        return None

    def hole(self, images: Tensor, draws: Draws) -> Tensor | None:
        """(b, 1, H, W) bool: the pixels that the network makes; None for all."""
        holes = [each.hole(images, draws) for each in self.parts if each.reads == "image"]
        return next((hole for hole in holes if hole is not None), None)

    def keep(self, made: Tensor, images: Tensor, draws: Draws) -> Tensor:
        """(b, c, H, W): what was made of the conditions of `images`, with what they know of these as it is."""
        for each in self.parts:
            if each.reads == "image":
                made = each.keep(made, images, draws)
        return made

    def check(self, net: nn.Module, image: Mapping[str, int], size: tuple[int, int], labelled: bool = False) -> None:
        """Try one black image, and the empty text: a UserError for what the network does not take. Where they read
        fields of samples, nothing can be tried before there is one: see `fits`.

        image: a description's section. size: (h, w) of the network's x. labelled: images come with labels.
        """
        if self.fields:
            return
        black = -torch.ones(1, image["channels"], image["size"], image["size"], device=self.device)
        inputs = {"image": black, "text": [""]}
        if labelled:
            inputs["label"] = torch.zeros(1, dtype=torch.long, device=self.device)
        self.fits(net, self(inputs, Draws(*torch.zeros(2, 1, dtype=torch.long))), size)

    def fits(self, net: nn.Module, cond: Mapping[str, Tensor], size: tuple[int, int]) -> None:
        """Raises UserError where the network does not take `cond`, what a call gave. size: (h, w) of its x."""
        taken = inspect.signature(net.forward).parameters.values()
        if not any(each.kind is inspect.Parameter.VAR_KEYWORD for each in taken):
            for name in cond:
                if name not in {each.name for each in taken}:
                    raise UserError(f"{self.field}: it gives the condition {name!r}, which this {type(net).__name__} "
                                    "does not take")
        channels, concat = getattr(net, "concat_channels", 0), cond.get("concat")
        given = 0 if concat is None else concat.shape[1]
        if given != channels:
            raise UserError(f"{self.field}: it gives {given} channels beside x, this network takes {channels} "
                            "(backbone.concat_channels)")
        if concat is not None and concat.shape[2:] != size:
            raise UserError(f"{self.field}: it gives {_by(concat.shape[2:])} pixels beside x, which has {_by(size)}")
        if getattr(net, "num_classes", -1) > 0 and "y" not in cond:
            raise UserError(f"{self.field}: it gives no labels, and this {type(net).__name__} has classes "
                            f"(backbone.num_classes={net.num_classes}); add label, as in super_resolution,label")
        for name, said in (("context", "context_shape"), ("vector", "vector_size")):
            if hasattr(net, said):
                self._check_size(name, cond.get(name), getattr(net, said), net)

    def _check_size(self, name: str, value: Tensor | None, wanted: int | Sequence[int] | None, net: nn.Module) -> None:
        """A context, or a vector, must have the size that the network says it takes; None: it takes none."""
        given = None if value is None else tuple(value.shape[1:])
        wanted = None if wanted is None else (wanted,) if isinstance(wanted, int) else tuple(wanted)
        if given != wanted:
            told = [f"no {name}" if each is None else f"a {name} of {_by(each)}" for each in (given, wanted)]
            raise UserError(f"{self.field}: it gives {told[0]}, this {type(net).__name__} takes {told[1]}")

    def _kind(self, each: Conditioner, out: Any, rows: int) -> str:
        shape = tuple(out.shape) if isinstance(out, Tensor) else None
        fits = shape and len(shape) in KINDS and shape[0] == rows and (len(shape) > 1) == out.is_floating_point()
        if not fits:
            found = type(out).__name__ if shape is None else f"{shape} {str(out.dtype).removeprefix('torch.')}"
            raise UserError(f"{self.field}: {_name(each)} gives {found} for b={rows}; want {RANKS}")
        return KINDS[len(shape)]

    def _joined(self, kind: str, outs: list[Tensor]) -> Tensor:
        if len(outs) == 1:
            return outs[0]
        if kind == "y":
            raise UserError(f"{self.field}: {len(outs)} conditioners give labels; a network takes one")
        dim = JOINED[kind]
        if len({each.shape[:dim] + each.shape[dim + 1:] for each in outs}) > 1:
            shapes = ", ".join(str(tuple(each.shape)) for each in outs)
            raise UserError(f"{self.field}: conditions {shapes} cannot be joined as {kind}: only their sizes in "
                            f"dimension {dim} may differ")
        return torch.cat(outs, dim)


def names_code(cond: Mapping[str, Any]) -> bool:
    """Whether a `cond` section names a file of the user's own."""
    return cond["kind"] == "image" and ":" in cond["task"]


def names_texts(cond: Mapping[str, Any]) -> bool:
    """Whether a `cond` section's conditioners read texts by the section's text encoder."""
    return cond["kind"] == "image" and not set(TEXT_TASKS).isdisjoint(_names(cond))


def _names(cond: Mapping[str, Any]) -> list[str]:
    return [name.strip() for name in cond["task"].split(",") if name.strip()]


def make_conditioners(cond: Mapping[str, Any], size: tuple[int, int], device: torch.device | str) -> Conditioners:
    """Those of a `cond` section of kind image. size: (h, w) of the network's x.

    `task` is a comma list of super_resolution, inpainting, label, text, pooled_text and "path/to/module.py:function", a
    function that takes no argument and returns a conditioner or a list of them, whose unconditional rates are their
    own.
    """
    rate = cond["drop"]
    tasks = {"super_resolution": lambda: SuperResolution(cond["factor"], size, rate),
             "inpainting": lambda: Inpainting(cond["masks"], rate), "label": lambda: Label(rate),
             "text": lambda: TextContext(make_text_encoder(cond, device), **_of_texts(cond)),
             "pooled_text": lambda: TextVector(PooledTextEncoder(cond["text_encoder"], cond["tokens"], device),
                                               **_of_texts(cond))}
    names = _names(cond)
    if not names:
        raise UserError(f"{TASK} is empty; choose from {', '.join(tasks)}, or give path/to/module.py:function")
    parts: list[Conditioner] = []
    for name in names:
        if ":" in name:
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)  # what starts at random is the same in training and in sampling
                made = load_function(TASK, name)()
            made = list(made) if isinstance(made, list | tuple) else [made]
            for each in made:
                if not isinstance(each, Conditioner):
                    raise UserError(f"{TASK}={name!r} returns a {type(each).__name__}, not a libs.conditioners."
                                    "Conditioner; Apply makes one of a function or an nn.Module")
            parts += made
        else:
            parts.append(choose(TASK, name, tasks)())
    settings = {name: cond[name] for name in OF_IMAGES}
    if names_texts(cond):
        settings |= {name: cond[name] for name in ("tokens", "text_null")}
    parts = [each.to(torch.device(device)) for each in parts]
    return Conditioners(parts, cond["null_label"], settings, device)


def _of_texts(cond: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a text's conditioner."""
    return {"rate": cond["drop"] if cond["text_drop"] < 0 else cond["text_drop"], "unknown": cond["text_null"]}


def _name(conditioner: Conditioner) -> str:
    return type(conditioner).__name__


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))

"""What a network is given of a text: a context of tokens, or one vector."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..errors import choose
from ..text import Remembered
from .adapters import Conditioner, Draws

NULLS = ("empty", "zeros")  # what stands for no text: the empty one's embedding, or zeros


class TextContext(Conditioner):
    """(b, tokens, width) of b texts by a text encoder, such as CLIP's `TextEncoder` or `T5Encoder`.

    encoder   texts -> (n, ...); what has a method `to` moves along
    unknown   what stands for no text, a name of NULLS
    """

    def __init__(self, encoder: Callable[[Sequence[str]], Tensor], reads: str = "text", rate: float = 0.0,
                 unknown: str = "empty"):
        self.encoder, self.reads, self.rate = encoder, reads, rate
        self.unknown = choose("cond.text_null", unknown, NULLS)
        self.remembered = Remembered(encoder)

    def __call__(self, value: Sequence[str], draws: Draws) -> Tensor:
        return self.remembered(value)

    def null(self, out: Tensor) -> Tensor:
        if self.unknown == "zeros":
            return super().null(out)
        return self.remembered([""]).to(out).expand_as(out)

    def to(self, device: torch.device) -> "TextContext":
        if hasattr(self.encoder, "to"):
            self.encoder.to(device)
            self.remembered.held.clear()
        return self


class TextVector(TextContext):
    """(b, d) of b texts by an encoder that gives one vector each, such as CLIP's `PooledTextEncoder`."""

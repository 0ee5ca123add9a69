"""Text encoders: CLIP's, as U-ViT's text-to-image models are conditioned on it, T5's, and CLIP's one vector a text."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from textwrap import shorten
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import UserError
from .files import reason
from .hub import find_model, model_id, quiet
from .metrics.features import full_precision

CHUNK = 16  # texts in one call of the network, always: its last bits depend on their number
HELD = 256  # texts whose embeddings stay in the device's memory, 60 MB of CLIP ViT-L/14's


class FrozenEncoder(ABC):
    """`encoder(texts)` -> (n, ...) float32, of each text cut off or padded to `tokens` tokens.

    pretrained   a folder or hub id of the model with its tokenizer
    field        what a UserError names, for a model that is not there or has fewer positions than `tokens`

    A text's embedding does not depend on the others it is given with. The network is frozen.
    """

    kind = tokenizer_kind = ""  # transformers' classes
    may_lack: frozenset[str] = frozenset()  # weights that a folder may be without

    def __init__(self, pretrained: str, tokens: int = 77, device: torch.device | str = "cpu",
                 field: str = "cond.text_encoder"):
        import transformers
        from transformers.utils import logging

        self.folder = find_model(pretrained, field)
        try:
            with quiet(logging):
                self.tokenizer = getattr(transformers, self.tokenizer_kind).from_pretrained(self.folder)
                net, loaded = getattr(transformers, self.kind).from_pretrained(
                    self.folder, use_safetensors=True, dtype=torch.float32, output_loading_info=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{field}={pretrained!r} holds no {self.kind} with its tokenizer "
                            f"({shorten(reason(error), 160)})") from error
        self.lacks = frozenset(loaded["missing_keys"])
        if self.lacks - self.may_lack:
            raise UserError(f"{field}={pretrained!r} holds no {self.kind}: its weights lack "
                            f"{min(self.lacks - self.may_lack)}")
        most = getattr(net.config, "max_position_embeddings", None)  # T5's positions are relative
        if tokens < 1 or (most is not None and tokens > most):
            raise UserError(f"cond.tokens={tokens}: {field}={pretrained!r} takes "
                            f"{'at least 1 token' if most is None else f'1 to {most} tokens'}")
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.tokens, self.width = tokens, self._width(net.config)

    def __call__(self, texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), CHUNK):
            part = list(texts[start:start + CHUNK])
            padded = part + [""] * (CHUNK - len(part))
            held = self.tokenizer(padded, padding="max_length", truncation=True, max_length=self.tokens,
                                  return_tensors="pt").to(self.device)
            with full_precision(self.device):
                parts.append(self._embed(held["input_ids"], held["attention_mask"])[:len(part)])
        return torch.cat(parts)

    @abstractmethod
    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(CHUNK, ...) of ids and mask (CHUNK, tokens); the mask is 0 at padding."""

    def _width(self, config: Any) -> int:
        return config.hidden_size

    def to(self, device: torch.device | str) -> "FrozenEncoder":
        """The same encoder, moved."""
        self.device = torch.device(device)
        self.net.to(self.device)
        self.__dict__.pop("empty", None)
        return self

    @cached_property
    def empty(self) -> Tensor:
        """(...) of the empty text, which stands for no text under guidance."""
        return self([""])[0]

    @cached_property
    def id(self) -> str:
        """What tells this model from any other."""
        return model_id(self.folder)


class TextEncoder(FrozenEncoder):
    """(n, tokens, width): the last hidden state of CLIP's text model (2103.00020) after its final norm. The folder
    holds a transformers `CLIPTextModel`, or a `CLIPModel`.
    """

    kind, tokenizer_kind = "CLIPTextModel", "CLIPTokenizer"

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net(input_ids=ids).last_hidden_state  # no mask: as published, the text sees its padding


class PooledTextEncoder(FrozenEncoder):
    """(n, width): CLIP's one vector a text, its state at the end of the text through the projection that compares it
    with images; of a model without the projection, the state itself. Models as `TextEncoder`'s.
    """

    kind, tokenizer_kind = "CLIPTextModelWithProjection", "CLIPTokenizer"
    may_lack = frozenset({"text_projection.weight"})

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        if self.lacks:
            return self.net.text_model(input_ids=ids).pooler_output
        return self.net(input_ids=ids).text_embeds

    def _width(self, config: Any) -> int:
        return config.hidden_size if self.lacks else config.projection_dim


class T5Encoder(FrozenEncoder):
    """(n, tokens, width): the last hidden state of T5's encoder (1910.10683), 0 at padding, which the text does not
    see. The folder holds a transformers `T5EncoderModel`, or a whole T5.
    """

    kind, tokenizer_kind = "T5EncoderModel", "T5Tokenizer"

    def _embed(self, ids: Tensor, mask: Tensor) -> Tensor:
        return self.net(input_ids=ids, attention_mask=mask).last_hidden_state * mask[:, :, None]


class Remembered:
    """`remembered(texts)` as `encode(texts)`, (n, ...), each text once as long as it is in use."""

    def __init__(self, encode: Callable[[Sequence[str]], Tensor]):
        self.encode = encode
        self.held: dict[str, Tensor] = {}

    def __call__(self, texts: Sequence[str]) -> Tensor:
        new = [text for text in dict.fromkeys(texts) if text not in self.held]
        if len(self.held) + len(new) > HELD:
            self.held = {text: self.held[text] for text in texts if text in self.held}
        if new:
            with torch.inference_mode(False), torch.no_grad():  # a training may need them after its previews
                self.held |= zip(new, self.encode(new), strict=True)
        return torch.stack([self.held[text] for text in texts])


def make_text_encoder(cond: Mapping, device: torch.device | str = "cpu") -> FrozenEncoder:
    """The encoder of a `cond` section's `text_encoder` and `tokens`: CLIP's or T5's, by what lies there."""
    kind = T5Encoder if _model_type(find_model(cond["text_encoder"], "cond.text_encoder")) == "t5" else TextEncoder
    return kind(cond["text_encoder"], cond["tokens"], device)


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text())["model_type"]
    except (OSError, ValueError, KeyError, TypeError):  # the encoder says what is wrong
        return None

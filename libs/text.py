"""CLIP's text encoder, as U-ViT's text-to-image models are conditioned on it."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from textwrap import shorten

import torch
from safetensors import SafetensorError
from torch import Tensor

from .errors import UserError
from .files import reason
from .hub import find_model, model_id, quiet
from .metrics.features import full_precision

CHUNK = 16  # texts in one call of the network, always: its last bits depend on their number


class TextEncoder:
    """`encoder(texts)` -> (n, tokens, width) float32: the last hidden state of CLIP's text model (2103.00020) after its
    final norm, of each text cut off or padded to `tokens` tokens.

    pretrained   a folder or hub id of a transformers `CLIPTextModel` (or `CLIPModel`) with its tokenizer
    field        what a UserError names, for a model that is not there or has fewer positions than `tokens`

    A text's embedding does not depend on the others it is given with. The network is frozen.
    """

    def __init__(self, pretrained: str, tokens: int = 77, device: torch.device | str = "cpu",
                 field: str = "cond.text_encoder"):
        from transformers import CLIPTextModel, CLIPTokenizer
        from transformers.utils import logging

        self.folder = find_model(pretrained, field)
        try:
            with quiet(logging):
                self.tokenizer = CLIPTokenizer.from_pretrained(self.folder)
                net, loaded = CLIPTextModel.from_pretrained(self.folder, use_safetensors=True, dtype=torch.float32,
                                                            output_loading_info=True)
        except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, SafetensorError) as error:
            raise UserError(f"{field}={pretrained!r} holds no CLIPTextModel with its tokenizer "
                            f"({shorten(reason(error), 160)})") from error
        if loaded["missing_keys"]:
            raise UserError(f"{field}={pretrained!r} holds no CLIPTextModel: its weights lack "
                            f"{min(loaded['missing_keys'])}")
        most = net.config.max_position_embeddings
        if not 1 <= tokens <= most:
            raise UserError(f"cond.tokens={tokens}: {field}={pretrained!r} takes 1 to {most} tokens")
        self.device = torch.device(device)
        self.net = net.to(self.device).eval().requires_grad_(False)
        self.tokens, self.width = tokens, net.config.hidden_size

    def __call__(self, texts: Sequence[str]) -> Tensor:
        parts = []
        for start in range(0, len(texts), CHUNK):
            part = list(texts[start:start + CHUNK])
            padded = part + [""] * (CHUNK - len(part))
            ids = self.tokenizer(padded, padding="max_length", truncation=True, max_length=self.tokens,
                                 return_tensors="pt")["input_ids"].to(self.device)
            with full_precision(self.device):  # no attention mask: as published, the text sees its padding
                parts.append(self.net(input_ids=ids).last_hidden_state[:len(part)])
        return torch.cat(parts)

    @cached_property
    def empty(self) -> Tensor:
        """(tokens, width) of the empty text, which stands for no text under guidance."""
        return self([""])[0]

    @cached_property
    def id(self) -> str:
        """What tells this model from any other."""
        return model_id(self.folder)


def make_text_encoder(cond: Mapping, device: torch.device | str = "cpu") -> TextEncoder:
    """The encoder of a `cond` section's `text_encoder` and `tokens`."""
    return TextEncoder(cond["text_encoder"], cond["tokens"], device)

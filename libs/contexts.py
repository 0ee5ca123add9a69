"""What a text model is shown: for every seed a context, the embedded text that its image is made from.

Seed i shows prompt i modulo their number, so that an image depends on its seed and its prompt alone.
"""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .data.feature_data import EMPTY, FeatureData, read_context, read_prompt_features
from .errors import UserError
from .prompts import prompt_folder, prompts_id, prompts_of, read_prompts
from .text import FrozenEncoder, Remembered, make_text_encoder

FIRST = 2.0**-60  # the draw of an image's first caption


class Contexts(Protocol):
    """`contexts(seeds)` -> (b, tokens, width) float32 on the device.

    null         (tokens, width) of the empty text, against which images are guided; None where there is none
    fingerprint  what decides the texts and their contexts, as JSON
    """

    null: Tensor | None
    fingerprint: dict[str, Any]

    def __call__(self, seeds: Sequence[int]) -> Tensor: ...

    def conditions(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        """The network's arguments, each (b, ...)."""

    def unconditional(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        """The same of the empty text."""

    def texts(self, seeds: Sequence[int]) -> list[str] | None:
        """The prompts of the seeds; None where only their embeddings are known."""


class OneContext:
    """What a network is given that is shown texts as one `context` each."""

    def conditions(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        return {"context": self(seeds)}

    def unconditional(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"context": self.null.expand_as(cond["context"])}


class PromptContexts(OneContext):
    """Prompts through a text encoder, each once as long as it is in use."""

    def __init__(self, prompts: Sequence[str], encoder: FrozenEncoder):
        self.prompts, self.encode = prompts, Remembered(encoder)
        self.null = encoder.empty
        self.fingerprint = {"prompts_sha256": prompts_id(prompts), "text_encoder": encoder.id}

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        return self.encode(self.texts(seeds))

    def texts(self, seeds: Sequence[int]) -> list[str]:
        return prompts_of(seeds, self.prompts)


class StoredContexts(OneContext):
    """Prompts whose contexts are on disk: U-ViT's `run_vis` features. No text encoder is needed.

    pairs   (prompt, (tokens, width)) of each
    """

    def __init__(self, pairs: Sequence[tuple[str, Tensor]], null: Tensor | None, device: torch.device | str = "cpu"):
        self.prompts = [prompt for prompt, _ in pairs]
        self.table = torch.stack([context.float() for _, context in pairs]).to(device)  # n tokens width
        self.null = None if null is None else null.float().to(device)
        hashed = hashlib.sha256(self.table.cpu().numpy().tobytes()).hexdigest()
        self.fingerprint = {"prompts_sha256": prompts_id(self.prompts), "contexts_sha256": hashed}

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        return self.table[torch.tensor([seed % len(self.table) for seed in seeds], device=self.table.device)]

    def texts(self, seeds: Sequence[int]) -> list[str]:
        return prompts_of(seeds, self.prompts)


class DataContexts(OneContext):
    """Texts of a training set, for its previews and measurements: the first seeds show its `run_vis` prompts, seed i
    beyond them the first caption of image i modulo the number of images.
    """

    def __init__(self, data: FeatureData):
        self.data, self.null = data, data.empty_context
        prompts = data.prompts
        self.shown = StoredContexts(prompts, None, data.device) if prompts else None
        self.fingerprint: dict[str, Any] = {}  # no folder keeps these images

    def __call__(self, seeds: Sequence[int]) -> Tensor:
        indices = torch.tensor([seed % len(self.data) for seed in seeds])
        with torch.inference_mode(False):  # the mode is one thread's, and threads read the files
            contexts = self.data.contexts(indices, torch.full((len(seeds),), FIRST, dtype=torch.float64))
        if self.shown is not None:
            prompted = torch.tensor([seed < len(self.shown.prompts) for seed in seeds], device=contexts.device)
            contexts = torch.where(prompted[:, None, None], self.shown(seeds), contexts)
        return contexts

    def texts(self, seeds: Sequence[int]) -> None:
        """The features keep no captions, only their embeddings."""
        return None


def make_contexts(text: str | None, description: Mapping, device: torch.device | str = "cpu") -> Contexts | None:
    """What `--prompts=text` shows the network of a description; None for a network that takes no text, and for one
    with conditioners.

    text: a prompt or a file of them (`prompts.read_prompts`), for which the description's text encoder is loaded, or a
        folder of `run_vis` features, beside which or in which the empty context lies.
    Raises UserError where text and network do not fit.
    """
    cond = description["cond"]
    refuse_other_kind(description)
    if cond["kind"] == "image":  # its conditioners may read texts
        return None
    if cond["kind"] != "text":
        if text is not None:
            raise UserError(f"--prompts={text}: this model takes no text (cond.kind={cond['kind']!r}); "
                            "configs/mscoco_uvit_small.py and the pipelines, such as configs/sd15.py, do")
        return None
    if text is None:
        raise UserError("--prompts is missing: a text, a .txt file with one a line, a .json file of COCO's captions, "
                        "or a folder of run_vis features")
    folder = prompt_folder(text)
    if folder is not None:
        empty = next((path for path in (folder / EMPTY, folder.parent / EMPTY) if path.is_file()), None)
        contexts = StoredContexts(read_prompt_features(folder, "--prompts"),
                                  None if empty is None else read_context(empty, "--prompts"), device)
        source = f"--prompts={text}"
    else:
        prompts = read_prompts(text)
        contexts = PromptContexts(prompts, make_text_encoder(cond, device))
        source = f"cond.text_encoder={cond['text_encoder']!r}"
    refuse_other_text(contexts([0]), description, source)
    return contexts


KINDS = ("none", "label", "text", "image")  # of a condition


def refuse_other_kind(description: Mapping) -> None:
    """See that the `cond` section gives a network text if, and only if, it takes any. What conditioners give is tried
    on the network itself.
    """
    kind, tokens = description["cond"]["kind"], description["backbone"].get("num_clip_token", 0)
    if kind != "image" and (kind == "text") != (tokens > 0):
        raise UserError(f"cond.kind={kind!r}: this network takes {tokens or 'no'} text tokens "
                        f"(backbone.num_clip_token); cond.kind must {'' if tokens else 'not '}be text")


def refuse_other_text(context: Tensor, description: Mapping, source: str) -> None:
    """See that contexts (b, tokens, width) fit the network."""
    backbone = description["backbone"]
    held, wanted = tuple(context.shape[1:]), (backbone["num_clip_token"], backbone["clip_dim"])
    if held != wanted:
        raise UserError(f"{source}: texts of {held[0]} tokens of width {held[1]}; this network takes {wanted[0]} of "
                        f"width {wanted[1]} (backbone.num_clip_token, backbone.clip_dim)")

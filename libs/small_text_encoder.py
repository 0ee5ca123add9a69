"""A text encoder for small runs: a CLIP text model with random weights, and the words of the captions as its tokens.

    python -m libs.small_text_encoder --captions=data/emoji64/captions.json --out=runs/emoji32/text_encoder

It is untrained: a caption's hidden states only tell its words and their order, and what they mean is left to the
diffusion to learn.
The folder holds a transformers `CLIPTextModel` with its `CLIPTokenizer`, as CLIP's own does: it is cond.text_encoder.
"""

import json
import os
import re
import shutil
import string
import sys
from collections.abc import Iterable
from pathlib import Path

import torch
from absl import flags as absl_flags
from absl import logging

from . import cli
from .data.raw import read_captions
from .errors import UserError

START, END = "<|startoftext|>", "<|endoftext|>"
LETTERS = string.ascii_letters + string.digits + string.punctuation  # other letters are unknown to the tokenizer
WORD = re.compile(r"'(?:s|t|re|ve|m|ll|d)|[a-z]+|[0-9]|[^\sa-z0-9]+")  # into which CLIP splits a text


def byte_pairs(words: Iterable[str]) -> tuple[list[str], list[str]]:
    """(tokens, merges) of a byte-pair encoding in which each of `words` is one token; other words become letters.

    >>> tokens, merges = byte_pairs(["cab"])
    >>> merges, tokens[-2:]
    (['c a', 'ca b</w>'], ['ca', 'cab</w>'])
    """
    tokens = dict.fromkeys([*LETTERS, *(f"{letter}</w>" for letter in LETTERS)])
    merges = {}
    for word in words:
        symbol, *rest = [*word[:-1], f"{word[-1]}</w>"]
        for following in rest:
            merges[f"{symbol} {following}"] = None
            symbol += following
            tokens[symbol] = None
    return list(tokens), list(merges)


def save_text_encoder(captions: Iterable[str], folder: Path, tokens: int, width: int, layers: int, seed: int) -> int:
    """Write the encoder of texts of up to `tokens` tokens into `folder`. Returns the number of words that it knows."""
    from transformers import CLIPTextConfig, CLIPTextModel

    words = sorted({word for caption in captions for word in WORD.findall(caption.lower()) if word.isascii()})
    vocabulary, merges = byte_pairs(words)
    vocabulary += [START, END]
    torch.manual_seed(seed)
    net = CLIPTextModel(CLIPTextConfig(
        vocab_size=len(vocabulary), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers,
        num_attention_heads=max(1, width // 64), max_position_embeddings=tokens, bos_token_id=len(vocabulary) - 2,
        eos_token_id=len(vocabulary) - 1, pad_token_id=len(vocabulary) - 1))
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        net.save_pretrained(temporary)
        (temporary / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(vocabulary)}))
        (temporary / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{merge}\n" for merge in merges))
        (temporary / "tokenizer_config.json").write_text(json.dumps({
            "tokenizer_class": "CLIPTokenizer", "model_max_length": tokens, "bos_token": START, "eos_token": END,
            "unk_token": END, "pad_token": END}))
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return len(words)


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("captions", None, "captions in COCO's format (.json)", flag_values=fv)
    absl_flags.DEFINE_integer("tokens", 16, "of a text: cond.tokens", lower_bound=3, flag_values=fv)
    absl_flags.DEFINE_integer("width", 64, "of a token: backbone.clip_dim", lower_bound=1, flag_values=fv)
    absl_flags.DEFINE_integer("layers", 2, "of the transformer", lower_bound=1, flag_values=fv)
    absl_flags.DEFINE_integer("seed", 0, "of the weights", lower_bound=0, flag_values=fv)
    absl_flags.DEFINE_string("out", None, "folder of the encoder, a new one", flag_values=fv)
    absl_flags.mark_flags_as_required(["captions", "out"], fv)


def make(config, flags) -> None:
    folder = Path(flags.out)
    if folder.exists():
        raise UserError(f"--out={flags.out} is there already; choose another folder")
    if flags.width > 64 and flags.width % 64:
        raise UserError(f"--width={flags.width} must be at most 64, or a multiple of 64")
    listed = read_captions(Path(flags.captions).expanduser(), "train")
    captions = [caption for _, texts in listed for caption in texts]
    cli.output_dir(folder.parent)
    words = save_text_encoder(captions, folder, flags.tokens, flags.width, flags.layers, flags.seed)
    logging.info("%s: %d words of %d captions, %d tokens of width %d", folder, words, len(captions), flags.tokens,
                 flags.width)


def main(argv: list[str] | None = None) -> int:
    return cli.run(make, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

"""Tiny text encoders in folders, as the hub has them, with random weights."""

from pathlib import Path

from network_pipelines import t5_parts
from tiny_pipelines import clip_text_model, clip_tokenizer

TOKENS, T5_WIDTH = 9, 16


def write_text_encoders(root: Path) -> None:
    """`root/clip` and `root/projection`, 32 channels, without and with CLIP's projection, and `root/t5`."""
    tokenizer = clip_tokenizer(root / "vocabulary")
    for name, kind in (("clip", "CLIPTextModel"), ("projection", "CLIPTextModelWithProjection")):
        clip_text_model(tokenizer, kind).save_pretrained(root / name)
        tokenizer.save_pretrained(root / name)
    for part in t5_parts(T5_WIDTH).values():
        part.save_pretrained(root / "t5")

"""Prompts as they are named on a command line: a text, a file with one a line, COCO's captions, U-ViT's features."""

import hashlib
import json
import os
import random
import re
from collections.abc import Sequence
from pathlib import Path

from .data.feature_data import read_prompt_features
from .errors import UserError
from .files import reason
from .image_folder import read_chain

FILE = re.compile(r"\.(txt|text|md|log|list|lst|csv|tsv|json|jsonl|ya?ml|np[yz]|pt|parquet|zip|tar|gz|png|jpe?g|webp)$",
                  re.IGNORECASE)
CAPTION_ORDER = 0  # seed of the order of COCO's images: part of the protocol, so it never changes


def read_prompts(text: str, flag: str = "prompts") -> list[str]:
    """The prompts that `--prompts=text` names, at least one.

    text: a prompt; a file with one prompt a line (empty lines are left out); a folder of U-ViT's run_vis features,
        whose prompts are taken; or a .json file of COCO's captions. Of those every image gives one caption, that of
        the lowest id, and the images stand in an order drawn with a fixed seed: the first 30,000 of val2014 are always
        the same random 30,000.
    Raises UserError for a file that is missing or of another form, and for an empty prompt.
    """
    if not text.strip():
        raise UserError(f"--{flag}={text!r} is empty; give a text, a file with one prompt a line, or a .json file of "
                        "COCO's captions")
    path, folder = Path(os.path.expanduser(text)), prompt_folder(text)
    if folder is not None:
        return [prompt for prompt, _ in read_prompt_features(folder, f"--{flag}")]
    if path.suffix not in (".txt", ".json") and not os.path.exists(path):
        if is_like_a_path(text):
            raise UserError(f"--{flag}={text}: there is no such file; a prompt that looks like one needs a blank, "
                            "which may be its last character")
        return [text]
    try:
        content = path.read_text("utf-8")
        prompts = _captions(json.loads(content)) if path.suffix == ".json" else content.splitlines()
    except (OSError, ValueError) as error:
        raise UserError(f"--{flag}={text} cannot be read ({getattr(error, 'strerror', None) or reason(error)})"
                        ) from error
    prompts = [" ".join(prompt.split()) for prompt in prompts]
    prompts = [prompt for prompt in prompts if prompt]
    if not prompts:
        raise UserError(f"--{flag}={text} holds no prompts")
    return prompts


def prompt_folder(text: str) -> Path | None:
    """The folder of run_vis features that `--prompts=text` names; None for texts and files."""
    path = os.path.expanduser(text)  # pathlib has no answer for long texts, nor for those that begin with ~
    return Path(path) if text.strip() and os.path.isdir(path) else None


def is_like_a_path(text: str) -> bool:
    """Whether a text without blanks is more likely a mistyped path than a prompt: it ends as files do, begins or ends
    with a separator, has several of them, or one after a folder that is there.

    >>> [is_like_a_path(each) for each in ("prompts.csv", "/data/cats", "../cats", "runs/coco/cats", "cats/")]
    [True, True, True, True, True]
    >>> [is_like_a_path(each) for each in ("cat", "and/or", "24/7", "v1.5", "amazon.com", "a red/green/blue cat")]
    [False, False, False, False, False, False]
    """
    if any(map(str.isspace, text)):
        return False
    if FILE.search(text):
        return True
    parts = text.replace(os.sep, "/").split("/")
    if len(parts) == 2 and "" not in parts:
        return parts[0].startswith("~") or os.path.isdir(parts[0])
    return len(parts) > 1


def prompts_of(seeds: Sequence[int], prompts: Sequence[str]) -> list[str]:
    """The prompt of each seed's image: `prompts[seed % len(prompts)]`, so that it depends on the seed alone.

    >>> prompts_of([0, 1, 2, 7], ["a cat", "a dog"])
    ['a cat', 'a dog', 'a cat', 'a dog']
    """
    return [prompts[seed % len(prompts)] for seed in seeds]


def prompts_of_files(text: str, folder: str, names: Sequence[str], flag: str = "prompts") -> list[str]:
    """The prompts of the images `folder/name`, which sample.py named by their seeds, from `--prompts=text`.

    Raises UserError for a file that is named otherwise, and where the images were made from other prompts.
    """
    prompts = read_prompts(text, flag)
    for name in names:
        if not Path(name).stem.isdigit():
            raise UserError(f"--{flag}={text}: the image {name} of {folder} is not named by a seed, such as 000012.png")
    held = (read_chain(Path(folder)) or {}).get("prompts_sha256")
    if held not in (None, prompts_id(prompts)):
        raise UserError(f"--{flag}={text}: the images of {folder} were made from other prompts")
    return prompts_of([int(Path(name).stem) for name in names], prompts)


def prompts_id(prompts: Sequence[str]) -> str:
    """SHA-256 of all prompts in their order: images of other prompts do not belong beside them."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()


def _captions(content: dict) -> list[str]:
    """One caption an image of a COCO annotation file, the images in a fixed random order."""
    try:
        annotations = sorted(content["annotations"], key=lambda each: (each["image_id"], each["id"]), reverse=True)
        caption_of = {each["image_id"]: str(each["caption"]) for each in annotations}  # the last, lowest id stays
    except (KeyError, TypeError) as error:
        raise ValueError("want COCO's captions: annotations with id, image_id and caption") from error
    images = sorted(caption_of)
    random.Random(CAPTION_ORDER).shuffle(images)
    return [caption_of[image] for image in images]

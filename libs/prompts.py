"""Prompts as they are named on a command line: a text, a file with one a line, COCO's captions, U-ViT's features."""

import hashlib
import json
import random
from collections.abc import Sequence
from pathlib import Path

from .data.feature_data import read_prompt_features
from .errors import UserError
from .files import reason
from .image_folder import read_chain

CAPTION_ORDER = 0  # seed of the order of COCO's images: part of the protocol, so it never changes


def read_prompts(text: str, flag: str = "prompts") -> list[str]:
    """The prompts that `--prompts=text` names, at least one.

    text: a prompt; a .txt file with one prompt a line (empty lines are left out); a folder of U-ViT's run_vis
        features, whose prompts are taken; or a .json file of COCO's captions. Of those every image gives one caption,
        that of the lowest id, and the images stand in an order drawn with a fixed seed: the first 30,000 of val2014
        are always the same random 30,000.
    Raises UserError for a file that is missing or of another form, and for an empty prompt.
    """
    path, folder = Path(text).expanduser(), prompt_folder(text)
    if folder is not None:
        return [prompt for prompt, _ in read_prompt_features(folder, f"--{flag}")]
    if path.suffix not in (".txt", ".json"):
        if not text.strip():
            raise UserError(f"--{flag}={text!r} is empty; give a text, a .txt file with one prompt a line, or a .json "
                            "file of COCO's captions")
        return [text]
    try:
        content = path.read_text("utf-8")
        prompts = content.splitlines() if path.suffix == ".txt" else _captions(json.loads(content))
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
    path = Path(text).expanduser()
    return path if text.strip() and path.is_dir() else None


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

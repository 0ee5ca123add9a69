"""A folder of generated images, one PNG a seed, that remembers by which chain they were made.

So that an interrupted run goes on where it stopped, and images of different chains never mix.
"""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .adaptors.files import TRAINING_FREE, resolve_adaptor
from .data.folder import list_images
from .data.images import save_png
from .errors import UserError
from .files import reason, write_json
from .policies.exit_schedule import schedule_file
from .provenance import file_sha256

CHAIN = "chain.json"
NUMBERED = "[0-9]*.png"  # one image a seed; a grid beside them does not match
SECTIONS = ("schedule", "denoiser", "codec", "policy", "sampler")
# Settings that came later, and the value at which nothing is other than before: what was made then stays valid.
LATER = {("policy", "by_step"): False}


def fingerprint(config: Mapping, checkpoint: Path, labels_rule: str | None = None) -> dict[str, Any]:
    """Everything that decides the image of a seed, to its last bit on one machine.

    checkpoint: the file (or folder) of the weights. labels_rule: the text of --labels.
    """
    held = {name: config[name].to_dict() for name in SECTIONS}
    compute = {name: config["compute"][name] for name in ("precision", "attention", "compile", "rows")}
    mode = config["compute"].get("compile_mode", "default")
    if compute["compile"] and mode != "default":
        compute["compile_mode"] = mode
    held |= {"checkpoint_sha256": file_sha256(checkpoint), "labels": labels_rule, "compute": compute}
    held |= policy_files(held["policy"])
    for (section, name), value in LATER.items():
        if held[section].get(name) == value:
            del held[section][name]
    return json.loads(json.dumps(held))  # tuples become lists, as they will when it is read again


def policy_files(policy: Mapping) -> dict[str, str]:
    """Hashes of the files that a `policy` section names: made again under the same name, they make other images."""
    held = {}
    adaptor = policy.get("adaptor")
    if adaptor not in (None, *TRAINING_FREE):
        held["adaptor_sha256"] = file_sha256(resolve_adaptor(adaptor))
    schedule = schedule_file(policy.get("schedule", ""))
    if schedule is not None:
        held["schedule_sha256"] = file_sha256(schedule)
    return held


class ImageFolder:
    """The images of one chain in the folder `path`, as {seed:06d}.png.

    fingerprint: what `fingerprint` returns. Images that are there already must have the same one; a UserError
    in one line names the first difference, or the flag `flag` where the folder's images are of unknown origin.
    """

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any], flag: str = "out"):
        self.path = Path(path)
        # The images first: another process may be filling the folder, and writes chain.json before any image.
        used = next(self.path.glob(NUMBERED), None)
        held = read_chain(self.path)
        if used and held is None:
            raise UserError(f"--{flag}={path} holds images of unknown origin ({used.name}, but no {CHAIN}); "
                            "choose another folder")
        if used and held != fingerprint:
            raise UserError(f"--{flag}={path} holds images of another chain ({_difference(held, fingerprint)}); "
                            "choose another folder")
        if held != fingerprint:
            write_json(self.path / CHAIN, fingerprint)

    def file(self, seed: int) -> Path:
        return self.path / f"{seed:06d}.png"

    def missing(self, seeds: Sequence[int]) -> list[int]:
        """Those of `seeds` that have no image yet, in their order."""
        return [seed for seed in seeds if not self.file(seed).exists()]

    def save(self, seeds: Sequence[int], images: Tensor) -> None:
        """Write uint8 images (b, h, w, c), each whole or not at all."""
        for seed, image in zip(seeds, images.cpu(), strict=True):
            save_png(self.file(seed), image)

    def load(self, seeds: Sequence[int]) -> Tensor:
        """The images of `seeds` as uint8 (b, h, w, c). Raises UserError for one that cannot be read."""
        return torch.from_numpy(np.stack([_read(self.file(seed)) for seed in seeds]))

    def remove(self) -> None:
        """Delete the images and the folder, unless other files are in it."""
        for path in (*self.path.glob(NUMBERED), self.path / CHAIN):
            path.unlink(missing_ok=True)
        if not any(self.path.iterdir()):
            self.path.rmdir()


def read_chain(path: Path) -> dict[str, Any] | None:
    """The fingerprint that lies in a folder, None where there is none."""
    try:
        return json.loads((path / CHAIN).read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{path / CHAIN} cannot be read ({reason(error)})") from error


def image_names(path: str | Path, flag: str = "images") -> list[str]:
    """Names of the images to score in a folder: one a seed where a chain made them, else all below it."""
    if (Path(path) / CHAIN).is_file():
        numbered = sorted(file.name for file in Path(path).glob(NUMBERED))
        if numbered:
            return numbered
    return list_images(path, f"--{flag}")


def _read(path: Path) -> np.ndarray:
    try:
        with Image.open(path) as image:
            pixels = np.array(image)
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path} cannot be read as an image ({reason(error)}); delete it to have it made "
                        "again") from error
    return pixels if pixels.ndim == 3 else pixels[:, :, None]


def _difference(held: Mapping, wanted: Mapping, prefix: str = "") -> str:
    """The first field in which two fingerprints differ, as text."""
    for name in sorted({*held, *wanted}):
        there, here = held.get(name), wanted.get(name)
        if isinstance(there, Mapping) and isinstance(here, Mapping) and there != here:
            return _difference(there, here, f"{prefix}{name}.")
        if there != here:
            return f"{prefix}{name} is {there!r} there and {here!r} here"
    raise AssertionError("the fingerprints are equal")

"""Write latents and text features in the layout that feature_data.py reads, by any number of processes.

A file appears whole or not at all, and what is there is not made again: the same command goes on where it stopped.
What the files are made from is kept beside them; other images or another model do not go on with them.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import UserError
from ..files import reason, write_json
from ..processes import Processes
from .feature_data import EMPTY, LATENTS_RECORD, PROMPTS, TEXTS_RECORD, WEIGHTS, read_context
from .feature_files import write_feature
from .parallel import cores
from .pictures import Pictures
from .shards import ShardData

BATCH = 256  # images whose flips stand behind them
GROUP = 32  # images or texts that a process works on at once; divides BATCH
DIGEST = "sha256"  # of the images' names, sizes and times, or of the texts


def write_latents(pictures: Pictures | ShardData, moments: Callable[[Tensor], Tensor], folder: Path, size: int,
                  channels: int, flips: bool, made_from: dict[str, Any], processes: Processes) -> int:
    """Write `{i}.npy` of each image: its moments, with its label where the pictures have any. Returns their number.

    moments: uint8 (b, h, w, c) -> (b, 2c', h', w').
    flips: also those of the mirrored images: in each batch of 256 images first the images, then their mirror images.
    made_from: what else decides the files, as JSON.
    Raises UserError for an image that cannot be read: without it, all later numbers would be others.
    """
    count = len(pictures)
    groups = [range(start, min(start + GROUP, count)) for start in range(0, count, GROUP)]
    made_from = {**made_from, "images": count, "image_size": size, "flips": flips,
                 DIGEST: pictures.digest()}
    with _Making(folder, LATENTS_RECORD, made_from, processes):
        mine = processes.share(groups, 1)
        files = {group: feature_numbers(group, count, flips) for group in mine}
        todo = [group for group in mine if not all((folder / f"{i}.npy").exists() for i in files[group])]
        workers = max(1, min(8, cores() // processes.count))
        with _bar("encoding images", "image", count, mine, todo, processes) as bar:
            for group, decoded in zip(todo, pictures.decoded(todo, size, channels, workers), strict=True):
                images = torch.from_numpy(decoded)
                images = torch.cat([images, images.flip(2)]) if flips else images
                rows = moments(images).float().cpu().numpy()
                labels = [] if pictures.labels is None else [pictures.labels[i] for i in group] * (1 + flips)
                for i, number in enumerate(files[group]):
                    write_feature(folder / f"{number}.npy", rows[i], *labels[i:i + 1])
                bar.update(len(group) * processes.count)
    return count * (1 + flips)


def feature_numbers(group: Sequence[int], count: int, flips: bool) -> list[int]:
    """Numbers of the files of a group of images within one batch, then, with flips, of their mirror images.

    >>> feature_numbers(range(0, 2), 300, True), feature_numbers(range(256, 258), 300, True)
    ([0, 1, 256, 257], [512, 513, 556, 557])
    """
    if not flips:
        return list(group)
    before = group[0] // BATCH * BATCH
    in_batch = min(BATCH, count - before)
    return [before + i for i in group] + [before + i + in_batch for i in group]


def write_texts(captions: Sequence[Sequence[str]], encoder: Callable[[list[str]], Tensor | tuple[Tensor, ...]],
                folder: Path, made_from: dict[str, Any], processes: Processes) -> int:
    """Write `{i}_{k}.npy`, the hidden states (tokens, width) of caption k of image i. Returns their number.

    encoder: texts -> hidden states (b, tokens, width), or these and a vector (b, d) that stands beside them. Those in
        fp16 are stored so, others in fp32.
    """
    texts = [(f"{i}_{k}.npy", text) for i, of_image in enumerate(captions) for k, text in enumerate(of_image)]
    groups = [texts[start:start + GROUP] for start in range(0, len(texts), GROUP)]
    made_from = {**made_from, "texts": len(texts), DIGEST: hashlib.sha256(json.dumps(texts).encode()).hexdigest()}
    with _Making(folder, TEXTS_RECORD, made_from, processes):
        mine = processes.share(groups, 1)
        todo = [group for group in mine if not all((folder / name).exists() for name, _ in group)]
        with _bar("encoding texts", "text", len(texts), mine, todo, processes) as bar:
            for group in todo:
                made = encoder([text for _, text in group])
                parts = [each if each.dtype == torch.float16 else each.float()
                         for each in (made if isinstance(made, tuple) else (made,))]
                for (name, _), *row in zip(group, *(each.cpu().numpy() for each in parts), strict=True):
                    write_feature(folder / name, *row)
                bar.update(len(group) * processes.count)
    return len(texts)


def write_prompts(prompts: Sequence[str], encoder: Callable[[list[str]], Tensor], root: Path) -> None:
    """Write `run_vis/{j}.npy`, (prompt, hidden states), anew."""
    folder = root / PROMPTS
    more = [path for path in folder.glob("*.npy") if path.stem.isdigit() and int(path.stem) >= len(prompts)]
    if more:
        raise UserError(f"--out={root}: {folder} holds {len(more)} prompts more than there are now; remove it, or "
                        "choose another folder")
    for start in range(0, len(prompts), GROUP):
        group = prompts[start:start + GROUP]
        for j, (prompt, row) in enumerate(zip(group, encoder(list(group)), strict=True), start=start):
            write_feature(folder / f"{j}.npy", prompt, row.float().cpu().numpy())


def write_empty(empty: Tensor, root: Path) -> None:
    """Write the empty text's hidden states (tokens, width). Raises UserError where another encoder's are there."""
    path, made = root / EMPTY, empty.float().cpu()
    if path.exists():
        held = read_context(path, "--out")
        if held.shape != made.shape or not torch.allclose(held, made, rtol=1e-2, atol=1e-2):  # devices differ a little
            raise UserError(f"--out={root}: {path} is the empty text of another text encoder; choose another folder")
        return
    write_feature(path, made.numpy())


class _Making:
    """A folder of features while they are made: says what from, and, when all processes are done, that they are whole.

    Raises UserError, in all processes, where the folder holds features that were made from something else.
    """

    def __init__(self, folder: Path, name: str, made_from: dict[str, Any], processes: Processes):
        self.folder, self.record, self.made_from, self.processes = folder, folder / name, made_from, processes

    def __enter__(self) -> None:
        try:
            held = json.loads(self.record.read_text())
            different = [field for field in self.made_from if self._differs(held, field)]
        except FileNotFoundError:
            held, different = {}, []
        except (OSError, ValueError, AttributeError) as error:
            raise UserError(f"--out: {self.record} cannot be read ({reason(error)})") from error
        if different:
            field = different[0]
            was, now = held.get(field), self.made_from[field]
            told = (f"from other {'texts' if self.record.name == TEXTS_RECORD else 'images'}" if field == DIGEST else
                    f"with other weights of {field}={was!r}" if was == now else f"with {field}={was!r}, not {now!r}")
            raise UserError(f"--out: the features in {self.folder} were made {told}; choose another folder")
        self.processes.gather(None)  # all have looked
        if self.processes.is_main:
            self._write(finished=False)

    def _differs(self, held: dict[str, Any], field: str) -> bool:
        """A model is the same by its weights, wherever it lies now; by its name where a record is older than these."""
        weights = field + WEIGHTS
        if weights in held and weights in self.made_from:
            return held[weights] != self.made_from[weights]
        return not field.endswith(WEIGHTS) and held.get(field) != self.made_from[field]

    def __exit__(self, kind: type | None, *error) -> None:
        if kind is None:
            self.processes.gather(None)  # all are done
            if self.processes.is_main:
                self._write(finished=True)

    def _write(self, finished: bool) -> None:
        write_json(self.record, {**self.made_from, "finished": finished})


def _bar(what: str, unit: str, total: int, mine: Sequence[Sequence], todo: Sequence[Sequence],
         processes: Processes) -> tqdm:
    """A bar over the work of all processes, of which the main one shows its own, times their number."""
    done = (sum(map(len, mine)) - sum(map(len, todo))) * processes.count
    return tqdm(total=max(total, sum(map(len, mine)) * processes.count), initial=done, desc=what, unit=unit, delay=1,
                disable=not processes.is_main)

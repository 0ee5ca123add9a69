"""Write images with captions as webdataset shards: `{shard:05d}.tar` with `{image:08d}.png` and its `.json` or `.txt`.

The files of a sample are copied as they are. Which sample goes where is known before the first is written, so a shard
appears whole or not at all, and the same command goes on where it stopped and ends with the same bytes.
"""

import dataclasses
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

from tqdm import tqdm

from ..errors import UserError
from ..files import atomic_path, reason
from .shard_files import LeftOut, Shard
from .shard_filters import Filter
from .shard_index import Sample
from .shards import used_samples

RECORD = ".shards.json"  # what the shards were made from
DIGEST = "sha256"  # of the samples and the state of their files
END_MARK = 2 * tarfile.BLOCKSIZE


@dataclasses.dataclass(frozen=True)
class Written:
    """What is in the folder now: numbers of samples, shards, their bytes, and what was left out."""

    samples: int
    shards: int
    bytes: int
    left_out: LeftOut


def write_shards(source: Sequence[Shard], folder: Path, shard_bytes: int, shard_images: int,
                 filters: Sequence[Filter] = (), caption_key: str = "caption", field: str = "--images") -> Written:
    """Write the samples of `source`, in their order, into tar files of at most `shard_bytes` and `shard_images`.

    A sample that is larger than a shard has one of its own.
    Raises UserError where no sample can be used, and where `folder` holds shards of something else.
    """
    left_out = LeftOut()
    samples = [(shard, sample) for shard, index in zip(source, used_samples(source, left_out, filters, caption_key,
                                                                            field=field), strict=True)
               for sample in index.samples]
    plan = _plan([_tar_bytes(sample) for _, sample in samples], shard_bytes, shard_images)
    names = [(sample.key, *sample.members.items()) for _, sample in samples]
    state = json.dumps([[shard.state() for shard in source], names])
    made_from = {"samples": len(samples), "shard_bytes": shard_bytes, "shard_images": shard_images,
                 DIGEST: hashlib.sha256(state.encode()).hexdigest()}
    _begin(folder, made_from)
    paths = [folder / f"{number:05d}.tar" for number in range(len(plan))]
    with tqdm(total=len(samples), desc="writing shards", unit="image", delay=1) as bar:
        for path, numbers in zip(paths, plan, strict=True):
            if not path.exists():
                _write(path, numbers, samples)
            else:
                bar.initial += len(numbers)  # not of this run's rate
            bar.update(len(numbers))
    return Written(len(samples), len(plan), sum(path.stat().st_size for path in paths), left_out)


def _plan(sizes: Sequence[int], shard_bytes: int, shard_images: int) -> list[range]:
    """The numbers of each shard's samples.

    >>> _plan([9000, 9000, 30_000, 1000, 1000], shard_bytes=20_480, shard_images=1)[:2]
    [range(0, 1), range(1, 2)]
    >>> _plan([9000, 9000, 30_000, 1000, 1000], shard_bytes=20_480, shard_images=10)
    [range(0, 2), range(2, 3), range(3, 5)]
    """
    room = shard_bytes // tarfile.RECORDSIZE * tarfile.RECORDSIZE - END_MARK
    plan, first, held = [], 0, 0
    for number, size in enumerate(sizes):
        if number > first and (held + size > room or number - first == shard_images):
            plan.append(range(first, number))
            first, held = number, 0
        held += size
    return [*plan, range(first, len(sizes))]


def _tar_bytes(sample: Sample) -> int:
    """What a sample's files take in a tar: a header and whole blocks each."""
    return sum(tarfile.BLOCKSIZE * (1 + -(-size // tarfile.BLOCKSIZE)) for _, size in sample.members.values())


def _write(path: Path, numbers: range, samples: Sequence[tuple[Shard, Sample]]) -> None:
    with atomic_path(path) as temporary, tarfile.open(temporary, "w") as tar:
        for number in numbers:
            shard, sample = samples[number]
            with shard.reading() as read:
                contents = {extension: read(*at) for extension, at in sample.members.items()}
            for extension, content in contents.items():
                member = tarfile.TarInfo(f"{number:08d}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _begin(folder: Path, made_from: dict) -> None:
    record = folder / RECORD
    try:
        held = json.loads(record.read_text())
    except FileNotFoundError:
        held = None
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {record} cannot be read ({reason(error)})") from error
    if held is None and any(name.endswith(".tar") for name in os.listdir(folder)):
        raise UserError(f"--out={folder} holds shards of something else; choose another folder")
    if held not in (None, made_from):
        different = next(name for name in made_from if held.get(name) != made_from[name])
        told = "from other images" if different == DIGEST else \
            f"with {different}={held.get(different)}, not {made_from[different]}"
        raise UserError(f"--out={folder}: its shards were made {told}; choose another folder")
    with atomic_path(record) as temporary:
        temporary.write_text(json.dumps(made_from))

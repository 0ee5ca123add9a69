"""Small shards for tests: images of one colour each, by which a sample is known again."""

import io
import json
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from libs.data import load_data


def png(number: int, size: tuple[int, int] = (12, 10)) -> bytes:
    """Width x height pixels, all of the colour (number, 2 number mod 256, 7)."""
    pixels = np.full((size[1], size[0], 3), (number % 256, 2 * number % 256, 7), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def sample(number: int, score: float | None = None) -> dict[str, bytes]:
    """An image with a JSON where there is a score, else with a text."""
    caption = f"picture {number}"
    if score is None:
        return {"png": png(number), "txt": caption.encode()}
    return {"png": png(number), "json": json.dumps({"caption": caption, "aesthetic_score": score}).encode()}


def write_tar(path: Path, samples: dict[str, dict[str, bytes]]) -> Path:
    """One shard: key -> extension -> content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, files in samples.items():
            for extension, content in files.items():
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return path


def write_shards(folder: Path, counts: list[int], score: float | None = None) -> str:
    """Shards 00.tar, 01.tar, ... with so many samples, numbered through; returns the pattern of their addresses."""
    first = 0
    for number, count in enumerate(counts):
        write_tar(folder / f"{number:02d}.tar", {f"{i:05d}": sample(i, score) for i in range(first, first + count)})
        first += count
    return f"{folder}/{{00..{len(counts) - 1:02d}}}.tar"


def load(path, **options):
    return load_data("webdataset", path, image_size=8, **options)


def numbers(data, indices) -> list[int]:
    """Which samples these are, by the colours of their images; their captions have to agree."""
    images, labels = data.batch(indices)
    assert labels is None
    assert images.dtype == torch.uint8
    assert images.shape == (len(indices), 8, 8, 3)
    assert (images == images[:, :1, :1]).all()  # no border of another colour
    assert (images[..., 1] == images[..., 0].long() * 2 % 256).all()
    found = images[:, 0, 0, 0].tolist()
    assert data.texts(indices) == [f"picture {number}" for number in found]
    return found

"""Image databases (LMDB) in the format of diffusion_distiller and of the GAN code it comes from.

    "{size}-{index:05d}"   one image of size x size pixels, RGB, as a JPEG file of quality 100; index from 0
    "length"               how many images there are at each size, as decimal text
    "record"               JSON: what the database was made from, and how far; readers of the format pass it over

`length` is written last, so a reader finds no images in a database that is half made.
"""

import contextlib
import dataclasses
import io
import json
import time
import types
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from ..errors import UserError
from ..files import reason
from .cache import cache_file, cached_array
from .folder import MODES, decode
from .image_files import files_digest, list_images
from .parallel import cores, items

LENGTH, RECORD = b"length", b"record"
RESAMPLE = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
QUALITY = 100

MAP_BYTES = 64 << 20  # first size of the map; it doubles when full, as some file systems give it real space
COMMIT_BYTES = 32 << 20  # images wait in memory for so much,
COMMIT_SECONDS = 5  # or so long, before they are written; a run that is killed loses no more
GROUP = 256  # images that are decoded before any of them is stored
# A database may be shorter than its last page number says: pages that were taken and given back within one
# transaction are not written. What is missing of a half-copied one is more.
TAIL_BYTES = 1 << 20


@dataclasses.dataclass
class Record:
    """What a database was made from, and how far."""

    files: int  # in the folder of images
    sha256: str  # of their names, sizes and times
    resample: str  # one of RESAMPLE
    finished: list[int]  # sizes that are complete
    unfinished: list[int]  # sizes that are being made
    done: int  # files that have been seen for these
    skipped: list[tuple[str, str]]  # (name, why) of files that are at no size

    @classmethod
    def from_bytes(cls, text: bytes, where: str) -> "Record":
        try:
            return cls(**json.loads(text))
        except (TypeError, ValueError) as error:
            raise UserError(f"{where}: the key 'record' of the database cannot be read ({reason(error)})") from error

    def __bytes__(self) -> bytes:
        return json.dumps(dataclasses.asdict(self)).encode()

    @property
    def length(self) -> int:
        """Images at each finished size."""
        return self.files - len(self.skipped)


def key(size: int, index: int) -> bytes:
    """The key of an image.

    >>> key(256, 17)
    b'256-00017'
    """
    return f"{size}-{index:05d}".encode()


# ---- making a database


def pack_images(
    images: str | Path, out: str | Path, sizes: Sequence[int], resample: str = "lanczos", workers: int = 8
) -> Record:
    """Pack all images below the folder `images`, sorted by path, into the database `out`, or go on with it.

    Each image is resized so that its short side has `size` pixels, and its centre is cut out. One that cannot be
    read, or is smaller than the largest of `sizes`, is skipped at all sizes and takes no index. A size that is
    added to a finished database gets exactly its images.

    resample: one of RESAMPLE. workers: processes.
    Raises UserError, naming a flag of prepare_data.py, where `out` holds other images, none of `images` can be
    packed, or a size is added that one of them is too small for.
    """
    names = list_images(images, "--images")
    fresh = Record(len(names), files_digest(images, names), resample, [], [], 0, [])
    with _open_to_write(out) as env:
        held = _held(env, out)
        record = fresh if held is None else _agreed(Record.from_bytes(held, f"--out={out}"), fresh, out)
        wanted = [size for size in sizes if size not in record.finished]
        if record.unfinished and wanted and wanted != record.unfinished:
            unfinished = ",".join(map(str, record.unfinished))
            raise UserError(f"--size={','.join(map(str, sizes))}: --out={out} has {unfinished} half made; "
                            f"--size={unfinished} goes on with that first")
        if wanted:
            record.unfinished = wanted
            _pack(env, held, record, images, names, out, workers)
        return record


def _pack(env: Any, held: bytes | None, record: Record, images: str | Path, names: list[str], out: str | Path,
          workers: int) -> None:
    """Make the sizes record.unfinished, from the file record.done on. held: the record as it is in the database."""
    first = not record.finished  # who is skipped is decided once
    if not first:
        skipped = {name for name, _ in record.skipped}
        names = [name for name in names if name not in skipped]
    waiting, since = {}, time.monotonic()
    todo = names[record.done:]
    packing = _Packing([f"{images}/{name}" for name in todo], record.unfinished, record.resample)
    with tqdm(total=len(names), initial=record.done, desc="packing", unit="image", delay=1) as bar:
        for name, packed in zip(todo, items(packing, workers, "--n_worker"), strict=True):
            if not isinstance(packed, str):
                index = record.done - (len(record.skipped) if first else 0)
                waiting |= {key(size, index): jpeg for size, jpeg in zip(record.unfinished, packed, strict=True)}
            elif first:
                record.skipped.append((name, packed))
            else:
                sizes, done, record.unfinished, record.done = record.unfinished, record.done, [], 0
                made = {key(size, index): None for size in sizes for index in range(done)}
                _commit(env, made | {RECORD: bytes(record)}, held, out)
                raise UserError(f"--size={','.join(map(str, sizes))}: --out={out} holds {name} at other sizes, but "
                                f"{packed}; choose another folder for this size")
            record.done += 1
            bar.update()
            late = time.monotonic() - since > COMMIT_SECONDS
            if late or sum(map(len, waiting.values())) >= COMMIT_BYTES:
                _commit(env, waiting | {RECORD: bytes(record)}, held, out)
                held, waiting, since = bytes(record), {}, time.monotonic()
    if not record.length:
        _commit(env, {RECORD: None}, held, out)
        raise UserError(f"--images={images}: none of the {record.files} images can be packed; the first: "
                        f"{record.skipped[0][1]}")
    record.finished = sorted(record.finished + record.unfinished)
    record.unfinished, record.done = [], 0
    _commit(env, waiting | {LENGTH: str(record.length).encode(), RECORD: bytes(record)}, held, out)


class _Packing(Dataset):
    """JPEG files of the image files `paths`, one a size; or a line that says why there are none."""

    def __init__(self, paths: list[str], sizes: list[int], resample: str):
        self.paths, self.sizes, self.resample = paths, sizes, resample

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, number: int) -> list[bytes] | str:
        path = self.paths[number]
        try:
            image = Image.fromarray(decode(path, None, 3, "--images"))  # None: at its own size
        except UserError as error:
            return str(error).removeprefix("--images: ")
        if min(image.size) < max(self.sizes):
            return f"{path} is only {image.width}x{image.height}, and images are not enlarged"
        return [_jpeg(_resize_and_crop(image, size, RESAMPLE[self.resample])) for size in self.sizes]


def _resize_and_crop(image: Image.Image, size: int, resample: Image.Resampling) -> Image.Image:
    """Short side to `size`, then the centre; to the pixel as torchvision's resize and center_crop do it."""
    short = min(image.size)
    width, height = (size * side // short for side in image.size)
    image = image if short == size else image.resize((width, height), resample)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return image.crop((left, top, left + size, top + size))


def _jpeg(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=QUALITY)
    return buffer.getvalue()


@contextlib.contextmanager
def _open_to_write(out: str | Path) -> Iterator[Any]:
    lmdb = _package("prepare_data.py lmdb")
    files = [Path(out, name) for name in ("data.mdb", "lock.mdb")]
    fresh, empty = not any(file.exists() for file in files), False
    try:
        with lmdb.open(str(out), map_size=MAP_BYTES, readahead=False) as env:
            try:
                yield env
            finally:
                empty = not env.stat()["entries"]
    except lmdb.Error as error:
        raise UserError(f"--out={out}: the database cannot be written ({reason(error)})") from error
    finally:
        for file in files if fresh and empty else ():  # nothing was packed
            file.unlink(missing_ok=True)


def _held(env: Any, out: str | Path) -> bytes | None:
    """The record of a database, None where the database is empty."""
    with env.begin() as txn:
        text = txn.get(RECORD)
    if text is None and env.stat()["entries"]:
        raise UserError(f"--out={out} holds a database of unknown origin; choose another folder")
    return text


def _agreed(held: Record, asked: Record, out: str | Path) -> Record:
    """`held`, if it was made from the images and with the settings asked for."""
    if held.resample != asked.resample:
        raise UserError(f"--resample={asked.resample}: --out={out} was made with {held.resample}; choose another "
                        "folder")
    if held.sha256 != asked.sha256:
        raise UserError(f"--out={out} was made from other images ({held.files} files there, {asked.files} here, or "
                        "other names, sizes or times); choose another folder")
    return held


def _commit(env: Any, values: dict[bytes, bytes | None], held: bytes | None, out: str | Path) -> None:
    """Write all of `values` or none; None deletes a key. held: the record that must still be there."""
    lmdb = _package("prepare_data.py lmdb")
    while True:
        try:
            with env.begin(write=True) as txn:
                if txn.get(RECORD) != held:
                    raise UserError(f"--out={out}: another process is making this database")
                for name, value in values.items():
                    if value is None:
                        txn.delete(name)
                    else:
                        txn.put(name, value)
            return
        except lmdb.MapFullError:
            env.set_mapsize(2 * env.info()["map_size"])


# ---- reading one


def read_lmdb(path: Path, image_size: int, channels: int, workers: int = 0, cache: bool = True) -> Tensor:
    """All images of one size as uint8 (n, image_size, image_size, channels), in the order of their index.

    workers: threads that decode; 0 chooses by the number of cores.
    cache: decode into one hidden file in the database's folder, of which later reads map the pages they need; it is
        valid until the database changes. Where there is no room for it, the images go into memory.
    Raises UserError for a database that is missing, damaged, half made, or without this size.
    """
    with _open_to_read(path) as env, env.begin() as txn:
        shape = (_length(txn, path, image_size), image_size, image_size, channels)
        digest = files_digest(path, ["data.mdb"])
        stored = cache_file(path, digest, f"images_{image_size}x{channels}") if cache else None
        parts = _decoded(txn, path, shape, workers or min(8, cores()))
        return torch.from_numpy(cached_array(stored, shape, np.uint8, parts))


@contextlib.contextmanager
def _open_to_read(path: Path) -> Iterator[Any]:
    lmdb = _package("data.name='lmdb'")
    data = path / "data.mdb"
    if not data.is_file():
        raise UserError(f"data.path={str(path)!r} is no LMDB database (no data.mdb in it); "
                        "python prepare_data.py lmdb makes one")
    try:
        # No lock: nothing is written into the folder, which may be read-only.
        with lmdb.open(str(path), readonly=True, lock=False, readahead=False) as env:
            promised = (env.info()["last_pgno"] + 1) * env.stat()["psize"]
            if data.stat().st_size + TAIL_BYTES < promised:  # reading what is not there would kill the process
                raise UserError(f"data.path={str(path)!r}: data.mdb has {data.stat().st_size} of {promised} bytes; "
                                "it was not copied to its end")
            yield env
    except lmdb.Error as error:
        raise UserError(f"data.path={str(path)!r}: the database cannot be read ({reason(error)})") from error


def _length(txn: Any, path: Path, image_size: int) -> int:
    """How many images there are at this size."""
    text, length = txn.get(RECORD), txn.get(LENGTH)
    if text is not None:
        record = Record.from_bytes(text, f"data.path={str(path)!r}")
        if image_size in record.unfinished:
            raise UserError(f"data.path={str(path)!r} is half made at {image_size} ({record.done} of {record.files} "
                            "files); the same prepare_data.py lmdb command goes on with it")
        sizes = record.finished
    else:
        if length is None or not length.isdigit():
            raise UserError(f"data.path={str(path)!r}: the database has no key 'length': it holds no images, or is "
                            "half made")
        sizes = [image_size] if txn.get(key(image_size, 0)) is not None else _sizes(txn)
    if image_size not in sizes:
        raise UserError(f"data.image_size={image_size}: {path} has {', '.join(map(str, sizes)) or 'no images'}")
    return int(length)


def _sizes(txn: Any) -> list[int]:
    """The sizes of a database that says nothing about them: those of its images 0."""
    keys = txn.cursor().iternext(values=False)
    found = (name.removesuffix(b"-00000") for name in keys if name.endswith(b"-00000"))
    return sorted(int(size) for size in found if size.isdigit())


def _decoded(txn: Any, path: Path, shape: tuple[int, ...], workers: int) -> Iterator[np.ndarray]:
    """Yield groups of images, uint8 (b, h, w, c)."""
    length, size, _, channels = shape
    task = partial(_decode, size=size, channels=channels, path=path)
    # Threads, since Pillow lets go of Python's lock while it decodes a JPEG.
    with ThreadPoolExecutor(workers) as pool, tqdm(total=length, desc="reading images", unit="image", delay=1) as bar:
        for start in range(0, length, GROUP):
            keys = [key(size, index) for index in range(start, min(start + GROUP, length))]
            # The files are taken here: a transaction belongs to one thread.
            group = np.stack(list(pool.map(task, keys, [txn.get(name) for name in keys])))
            yield group
            bar.update(len(group))


def _decode(name: bytes, jpeg: bytes | None, size: int, channels: int, path: Path) -> np.ndarray:
    where = f"data.path={str(path)!r}: the image {name.decode()}"
    if jpeg is None:
        raise UserError(f"{where} is missing")
    try:
        with Image.open(io.BytesIO(jpeg)) as opened:
            image = opened.convert(MODES[channels])
    except (OSError, ValueError, SyntaxError, EOFError, Image.DecompressionBombError) as error:
        why = "no image file" if isinstance(error, UnidentifiedImageError) else reason(error)
        raise UserError(f"{where} cannot be read ({why})") from error
    if image.size != (size, size):
        raise UserError(f"{where} has {image.width}x{image.height} pixels")
    return np.array(image).reshape(size, size, channels)


def _package(who: str) -> types.ModuleType:
    """The module lmdb. Imported late: nothing else of the project needs it."""
    try:
        import lmdb
    except ImportError as error:
        raise UserError(f"{who} needs the package lmdb ({reason(error)}); pip install lmdb") from error
    return lmdb

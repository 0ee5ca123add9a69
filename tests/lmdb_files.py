"""Image databases as other tools make and read them, and pictures to pack."""

import io

import numpy as np
import pytest
import refusals
from PIL import Image

import prepare_data

lmdb = pytest.importorskip("lmdb")


def write_images(root, sizes, suffix="png"):
    """Smooth pictures, whose JPEGs lose little; their order is that of `sizes`, (width, height) each."""
    rng = np.random.default_rng(0)
    for i, size in enumerate(sizes):
        small = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
        path = root / "ab"[i % 2] / f"{i:03d}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        small.resize(size, Image.Resampling.BICUBIC).save(path)
    return root


def in_order(root):
    return sorted(path for path in root.rglob("*.*") if path.is_file())


def pack(run_main, images, out, *argv):
    """The command's stdout."""
    ran = run_main(prepare_data.main, "lmdb", images, f"--out={out}", "--n_worker=1", *argv)
    assert ran.status == 0, ran.stderr
    return ran.stdout


def error_of(ran):
    assert (ran.status, ran.stdout) == (2, "")
    [line] = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ran.stderr
    return line.removeprefix("error: ")


def read(path):
    """All keys and values, by the package alone."""
    with lmdb.open(str(path), readonly=True, lock=False) as env, env.begin() as txn:
        return {bytes(key): bytes(value) for key, value in txn.cursor()}


def write(path, values):
    """A database by the package alone: made as other tools make it, or changed. None deletes a key."""
    path.mkdir(parents=True, exist_ok=True)
    with lmdb.open(str(path), map_size=1 << 26) as env, env.begin(write=True) as txn:
        for key, value in values.items():
            if value is None:
                txn.delete(key)
            else:
                txn.put(key, value)


def jpeg(size=8, level=0):
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level, level, level)).save(buffer, "JPEG", quality=100)
    return buffer.getvalue()


def refused(*fragments, **request):
    refusals.refused(*fragments, name="lmdb", **request)

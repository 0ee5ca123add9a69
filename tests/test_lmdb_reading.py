"""Image databases as training data: data.name=lmdb reads what diffusion_distiller and others make."""

import io
import sys

import numpy as np
import pytest
import torch
from lmdb_files import jpeg, read, refused, write, write_images
from PIL import Image

import train
from libs.data import ImageData, cache, lmdb_images, load_data
from libs.data.lmdb_images import Record, pack_images

lmdb = pytest.importorskip("lmdb")


@pytest.fixture
def images(tmp_path):
    """6 images in two folders, of several shapes."""
    return write_images(tmp_path / "images", [(40, 33), (32, 32), (33, 50), (64, 64), (70, 35), (37, 41)])


def decoded(path, size, index, mode="RGB"):
    with Image.open(io.BytesIO(read(path)[f"{size}-{index:05d}".encode()])) as image:
        return torch.from_numpy(np.array(image.convert(mode)))


@pytest.mark.parametrize("cache", [True, False])
def test_reads_the_pixels_of_the_jpegs(tmp_path, images, cache, monkeypatch):
    pack_images(images, tmp_path / "db", [16, 32], workers=1)
    monkeypatch.setattr(lmdb_images, "GROUP", 4)
    data = load_data("lmdb", tmp_path / "db", image_size=32, cache=cache)
    assert isinstance(data, ImageData)
    assert data.images.dtype == torch.uint8
    assert data.labels is None
    assert torch.equal(data.images, torch.stack([decoded(tmp_path / "db", 32, i) for i in range(6)]))
    gray = load_data("lmdb", tmp_path / "db", image_size=16, channels=1, cache=cache).images
    assert torch.equal(gray[..., 0], torch.stack([decoded(tmp_path / "db", 16, i, "L") for i in range(6)]))
    assert torch.equal(data.batch(torch.tensor([4, 1]))[0], data.images[[4, 1]])
    assert len(stored_files(tmp_path / "db")) == (2 if cache else 0)


def stored_files(root):
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def test_an_image_survives_the_round_trip(tmp_path):
    write_images(tmp_path / "images", [(32, 32)] * 3)
    pack_images(tmp_path / "images", tmp_path / "db", [32], workers=1)
    packed = load_data("lmdb", tmp_path / "db", 32).images.float()
    shown = load_data("folder", tmp_path / "images", 32).images.float()
    assert (packed - shown).abs().mean() < 2  # of 255: quality 100 with halved colour resolution


def test_the_stored_copy_is_taken_until_the_database_changes(tmp_path, images, monkeypatch):
    pack_images(images, tmp_path / "db", [16], workers=1)
    first = load_data("lmdb", tmp_path / "db", 16).images.clone()
    with monkeypatch.context() as patch:
        patch.setattr(lmdb_images, "_decode", None)  # calling it would fail
        second = load_data("lmdb", tmp_path / "db", 16).images
    assert torch.equal(first, second)
    second.fill_(0)  # a batch that is written into leaves the file alone
    assert torch.equal(first, load_data("lmdb", tmp_path / "db", 16).images)

    before = stored_files(tmp_path / "db")
    write(tmp_path / "db", {b"16-00002": jpeg(16, 200)})
    third = load_data("lmdb", tmp_path / "db", 16).images.clone()  # the file below is damaged in its place
    assert third[2].unique().tolist() == [200]
    after = stored_files(tmp_path / "db")
    assert len(before) == len(after) == 1
    assert before != after

    (tmp_path / "db" / after[0]).write_bytes(b"damaged")
    assert torch.equal(load_data("lmdb", tmp_path / "db", 16).images, third)


def test_a_full_disk_is_read_into_memory(tmp_path, images, monkeypatch):
    pack_images(images, tmp_path / "db", [16], workers=1)
    usage = cache.shutil.disk_usage(tmp_path)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda path: usage._replace(free=6 * 16 * 16 * 3))
    full = load_data("lmdb", tmp_path / "db", 16).images
    assert stored_files(tmp_path / "db") == []
    monkeypatch.undo()
    assert torch.equal(full, load_data("lmdb", tmp_path / "db", 16).images)


def test_reads_what_other_tools_wrote(tmp_path):
    write(tmp_path, {b"length": b"3"} | {f"8-{i:05d}".encode(): jpeg(8, 60 * i) for i in range(3)})
    data = load_data("lmdb", tmp_path, image_size=8)
    assert data.images.float().mean((1, 2, 3)).tolist() == [0, 60, 120]


def test_refusals(tmp_path, monkeypatch):
    refused("data.path is empty", path="")
    refused("is not a folder", path=tmp_path / "nowhere")
    refused("is no LMDB database (no data.mdb in it)", "prepare_data.py lmdb", path=tmp_path)
    write(tmp_path, {b"8-00000": jpeg()})
    refused("data.path", "no key 'length'", path=tmp_path, image_size=8)
    write(tmp_path, {b"length": b"2", b"16-00000": jpeg(16), b"16-00001": jpeg(16)})
    refused("the image 8-00001 is missing", path=tmp_path, image_size=8)
    refused("data.image_size=32", "has 8, 16", path=tmp_path, image_size=32)
    refused("data.labels='folders'", "no labels", path=tmp_path, image_size=16, labels="folders")
    refused("data.split='test'", "one split", path=tmp_path, image_size=16, split="test")
    write(tmp_path, {b"16-00001": b"not a JPEG"})
    refused("the image 16-00001 cannot be read (no image file)", path=tmp_path, image_size=16)
    write(tmp_path, {b"16-00001": jpeg(16)[:-200]})
    refused("the image 16-00001 cannot be read (", "runcated", path=tmp_path, image_size=16)
    write(tmp_path, {b"16-00001": jpeg(8)})
    refused("the image 16-00001 has 8x8 pixels", path=tmp_path, image_size=16)
    assert stored_files(tmp_path) == []  # nothing half-read is kept
    write(tmp_path, {b"record": b"{}"})
    refused("the key 'record'", "cannot be read", path=tmp_path, image_size=16)
    (tmp_path / "data.mdb").write_bytes(b"x" * 10_000)
    refused("data.path", "the database cannot be read (", path=tmp_path, image_size=16)
    monkeypatch.setitem(sys.modules, "lmdb", None)
    refused("data.name='lmdb' needs the package lmdb", path=tmp_path, image_size=16)


def test_a_half_copied_database_is_refused(tmp_path):
    """Reading pages that are not in the file would end the process without a word."""
    write(tmp_path, {b"length": b"1", b"8-00000": jpeg(), b"fill": bytes(4 << 20)})
    file = tmp_path / "data.mdb"
    file.write_bytes(file.read_bytes()[: 1 << 20])
    refused("data.mdb has 1048576 of", "not copied to its end", path=tmp_path, image_size=8)


def test_record_round_trip():
    record = Record(3, "ab", "lanczos", [128], [256], 2, [["a.png", "too small"]])
    assert Record.from_bytes(bytes(record), "x") == record
    assert record.length == 2


def test_trains_from_a_database(run_main, tmp_path, images):
    pack_images(images, tmp_path / "db", [8], workers=1)
    ran = run_main(train.main, "--config=configs/digits_uvit.py", f"--workdir={tmp_path / 'run'}",
                   "--config.data.name=lmdb", f"--config.data.path={tmp_path / 'db'}", "--config.cond.kind=none",
                   "--config.cond.num_classes=0", "--config.cond.null_label=-1", "--config.cond.drop=0",
                   "--config.backbone.num_classes=-1", "--config.compute.device=cpu", "--config.compute.rows=4",
                   "--config.backbone.patch_size=4", "--config.backbone.embed_dim=16", "--config.backbone.depth=2",
                   "--config.backbone.num_heads=2", "--config.sampler.steps=2", "--config.train.steps=2",
                   "--config.train.batch_size=4", "--config.train.warmup=1", "--config.train.log_every=1",
                   "--config.train.preview_every=0", "--config.sampler.cfg_scale=1", "--config.data.channels=3",
                   "--config.backbone.in_chans=3")
    assert ran.status == 0, ran.stderr
    assert len((tmp_path / "run" / "stats.jsonl").read_text().splitlines()) == 2
    assert len(stored_files(tmp_path / "db")) == 1

"""prepare_data.py lmdb makes image databases as diffusion_distiller reads them."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from lmdb_files import error_of, in_order, jpeg, pack, read, refused, write, write_images
from PIL import Image

import prepare_data
from libs import config as config_files
from libs.data import lmdb_images, load_data, parallel
from libs.data.lmdb_images import pack_images
from libs.errors import UserError

lmdb = pytest.importorskip("lmdb")


@pytest.fixture
def images(tmp_path):
    """6 images in two folders, of several shapes."""
    return write_images(tmp_path / "images", [(40, 33), (32, 32), (33, 50), (64, 64), (70, 35), (37, 41)])


def test_keys_and_bytes_are_those_of_the_format(run_main, tmp_path, images):
    """torchvision's resize and crop, Pillow's JPEG at quality 100, as diffusion_distiller packs an image."""
    functional = pytest.importorskip("torchvision.transforms.functional")
    for name, resample in ("lanczos", Image.Resampling.LANCZOS), ("bilinear", Image.Resampling.BILINEAR):
        out = tmp_path / name
        printed = pack(run_main, images, out, "--size=32,16", f"--resample={name}")
        assert printed == f"{out}: 6 images at each of 16, 32, 0 skipped\n"
        expected = {b"length": b"6"}
        for i, path in enumerate(in_order(images)):
            for size in (16, 32):
                with Image.open(path) as picture:
                    resized = functional.center_crop(functional.resize(picture.convert("RGB"), size, resample), size)
                buffer = io.BytesIO()
                resized.save(buffer, format="jpeg", quality=100)
                expected[f"{size}-{str(i).zfill(5)}".encode()] = buffer.getvalue()
        held = read(out)
        del held[b"record"]
        assert held == expected


def test_worker_processes_give_the_same(run_main, tmp_path, images):
    pack(run_main, images, tmp_path / "one", "--size=16")
    ran = run_main(prepare_data.main, "lmdb", "--size=16", f"--images={images}", f"--out={tmp_path}/two",
                   "--n_worker=2")
    assert ran.status == 0, ran.stderr
    assert read(tmp_path / "one") == read(tmp_path / "two")


def test_images_that_cannot_be_packed_are_named_and_take_no_index(run_main, tmp_path, images):
    whole = in_order(images)
    (images / "a" / "001_broken.png").write_bytes(b"not an image")
    Image.new("RGB", (40, 31)).save(images / "b" / "000_small.png")
    lines = pack(run_main, images, tmp_path / "db", "--size=16,32").splitlines()
    assert lines[0].endswith(": 6 images at each of 16, 32, 2 skipped")
    assert lines[1].startswith(f"skipped {images}/a/001_broken.png cannot be read as an image")
    assert lines[2] == f"skipped {images}/b/000_small.png is only 40x31, and images are not enlarged"
    assert read(tmp_path / "db")[b"length"] == b"6"
    for path in set(in_order(images)) - set(whole):
        path.unlink()
    pack(run_main, images, tmp_path / "without", "--size=16,32")
    with_, without = read(tmp_path / "db"), read(tmp_path / "without")
    assert {name for name in with_ if with_[name] != without[name]} == {b"record"}


def test_a_size_is_added_with_the_same_images(run_main, tmp_path, images, monkeypatch):
    Image.new("RGB", (15, 15)).save(images / "a" / "003.png")  # too small at first, large enough for the other
    printed = pack(run_main, images, tmp_path / "db", "--size=16")
    assert "003.png is only 15x15" in printed
    first = read(tmp_path / "db")
    assert "7 images" not in pack(run_main, images, tmp_path / "db", "--size=8,16")
    both = read(tmp_path / "db")
    assert first.items() - {(b"record", first[b"record"])} <= both.items()
    assert sum(name.startswith(b"8-") for name in both) == int(both[b"length"]) == 6
    small, large = (load_data("lmdb", tmp_path / "db", size).images.float() for size in (8, 16))
    pooled = torch.nn.functional.avg_pool2d(large.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    assert torch.cdist(small.flatten(1), pooled.flatten(1)).argmin(1).tolist() == [0, 1, 2, 3, 4, 5]
    monkeypatch.setattr(lmdb_images, "_commit", None)  # a finished database is not written again
    pack(run_main, images, tmp_path / "db", "--size=8,16")


def test_a_size_that_one_image_is_too_small_for_is_refused(run_main, tmp_path, images):
    pack(run_main, images, tmp_path / "db", "--size=16")
    ran = run_main(prepare_data.main, "lmdb", images, f"--out={tmp_path}/db", "--size=33", "--n_worker=1")
    assert error_of(ran) == (f"--size=33: --out={tmp_path}/db holds b/001.png at other sizes, but {images}/b/001.png "
                             "is only 32x32, and images are not enlarged; choose another folder for this size")
    assert {name.split(b"-")[0] for name in read(tmp_path / "db")} == {b"16", b"length", b"record"}
    assert len(load_data("lmdb", tmp_path / "db", 16)) == 6
    pack(run_main, images, tmp_path / "db", "--size=8")  # and the database is not spoilt


KILLED = """
import os, signal, sys
import prepare_data
from libs.data import lmdb_images

lmdb_images.COMMIT_BYTES = 1
get, seen = lmdb_images._Packing.__getitem__, []

def killed(self, number):
    seen.append(number)
    if len(seen) == 5:
        os.kill(os.getpid(), signal.SIGKILL)
    return get(self, number)

lmdb_images._Packing.__getitem__ = killed
prepare_data.main(sys.argv[1:])
"""


def test_goes_on_after_a_kill(run_main, tmp_path, images, monkeypatch):
    (images / "a" / "001_broken.png").write_bytes(b"not an image")
    pack(run_main, images, tmp_path / "whole", "--size=16,32")
    argv = ["lmdb", images, f"--out={tmp_path}/db", "--size=16,32", "--n_worker=1"]
    ran = subprocess.run([sys.executable, "-c", KILLED, *map(str, argv)], cwd=config_files.ROOT, check=False)
    assert ran.returncode == -9
    held = read(tmp_path / "db")
    assert sorted(held) == [b"16-00000", b"16-00001", b"16-00002", b"32-00000", b"32-00001", b"32-00002", b"record"]
    refused(f"data.path='{tmp_path}/db' is half made at 16 (4 of 7 files)", "the same prepare_data.py lmdb command",
            path=tmp_path / "db", image_size=16)
    ran = run_main(prepare_data.main, "lmdb", images, f"--out={tmp_path}/db", "--size=16")
    assert error_of(ran) == f"--size=16: --out={tmp_path}/db has 16,32 half made; --size=16,32 goes on with that first"

    packed, get = [], lmdb_images._Packing.__getitem__
    monkeypatch.setattr(lmdb_images._Packing, "__getitem__",
                        lambda self, number: packed.append(self.paths[number]) or get(self, number))
    ran = run_main(prepare_data.main, *argv)
    assert "1 skipped" in ran.stdout
    assert len(packed) == 3
    assert read(tmp_path / "db") == read(tmp_path / "whole")


def test_worker_processes_end_when_the_run_is_killed():
    """They hold the pipe of stderr open as long as they live."""
    code = """
import os, signal
from libs.data import parallel

class Large:
    def __len__(self):
        return 100

    def __getitem__(self, number):
        return bytes(1 << 20)

parallel.cores = lambda: 2
for _ in parallel.items(Large(), 2, "x"):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    ran = subprocess.run([sys.executable, "-c", code], cwd=config_files.ROOT, stderr=subprocess.PIPE, timeout=60,
                         check=False)
    assert ran.returncode == -9


@pytest.mark.parametrize("end", ["os._exit(1)", "os.kill(os.getpid(), 9)"])
def test_a_worker_process_that_dies_is_told_in_one_line(end, monkeypatch):
    class Deadly:
        def __len__(self):
            return 8

        def __getitem__(self, number):
            exec(end, {"os": os}) if number == 3 else None

    monkeypatch.setattr(parallel, "cores", lambda: 2)
    with pytest.raises(UserError, match=r"^--n_worker=2: a worker process died \(out of memory\?\); try 1$"):
        list(parallel.items(Deadly(), 2, "--n_worker"))


def test_the_map_grows(tmp_path, images, monkeypatch):
    monkeypatch.setattr(lmdb_images, "MAP_BYTES", 1 << 14)
    monkeypatch.setattr(lmdb_images, "COMMIT_BYTES", 1)
    pack_images(images, tmp_path / "db", [16, 32], workers=1)
    monkeypatch.undo()
    pack_images(images, tmp_path / "whole", [16, 32], workers=1)
    assert (tmp_path / "db" / "data.mdb").stat().st_size > 1 << 14
    assert read(tmp_path / "db") == read(tmp_path / "whole")


def test_two_processes_do_not_write_into_one_database(tmp_path, images, monkeypatch):
    get = lmdb_images._Packing.__getitem__

    def other(self, number):
        if number == 3:
            monkeypatch.setattr(lmdb_images._Packing, "__getitem__", get)
            code = f"from libs.data.lmdb_images import pack_images; pack_images({str(images)!r}, {str(out)!r}, [16])"
            subprocess.run([sys.executable, "-c", code], cwd=config_files.ROOT, check=True)
        return get(self, number)

    out = tmp_path / "db"
    out.mkdir()
    monkeypatch.setattr(lmdb_images._Packing, "__getitem__", other)
    with pytest.raises(UserError, match="another process is making this database"):
        pack_images(images, out, [16], workers=1)
    assert len(load_data("lmdb", out, 16)) == 6


def test_folders_turned_and_transparent_images_as_in_an_image_folder(run_main, tmp_path):
    """The database holds what data.name=folder shows of square images, but for the JPEG's loss."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    write_images(tmp_path / "images", [(32, 32)] * 2)
    ramp = Image.fromarray(np.tile(np.arange(0, 256, 8, dtype=np.uint8), (32, 1)))
    ramp.save(tmp_path / "images" / "turned.jpg", exif=exif)
    Image.new("RGBA", (32, 32), (0, 0, 0, 0)).save(tmp_path / "images" / "clear.png")
    pack(run_main, tmp_path / "images", tmp_path / "db", "--size=16")
    packed = load_data("lmdb", tmp_path / "db", 16).images.float()
    shown = load_data("folder", tmp_path / "images", 16).images.float()
    assert packed.shape == shown.shape == (4, 16, 16, 3)
    assert (packed - shown).abs().mean() < 2  # of 255
    assert packed[2].min() > 250  # clear.png lies on white


BAD = [
    (["--out={}/db"], "--images is missing"),
    (["{}/images"], "--out is missing"),
    (["{}/images", "{}/images", "--out={}/db"], "is no flag; flags are written --name=value"),
    (["-v", "--out={}/db"], "'-v' is no flag"),
    (["nowhere", "--out={}/db"], "--images='nowhere' is not a folder"),
    (["{}", "--out={}/db", "--size=0"], "--size=0: want whole numbers, as in 128,256"),
    (["{}", "--out={}/db", "--size=256,big"], "--size=256,big: want whole numbers, as in 128,256"),
    (["{}", "--out={}/db", "--resample=nearest"], "--resample=nearest: want one of lanczos, bilinear"),
    (["{}", "--out={}/db", "--n_worker=0"], "--n_worker=0: want a positive integer"),
    (["{}/images", "--out=/proc/nothing/db", "--size=16"], "--out=/proc/nothing/db: cannot write there"),
    (["{}/images/a/000.png", "--out={}/db"], "000.png' is not a folder"),
]


@pytest.mark.parametrize(("argv", "line"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input(run_main, tmp_path, images, argv, line):
    ran = run_main(prepare_data.main, "lmdb", *(arg.format(tmp_path) for arg in argv))
    assert line in error_of(ran)
    assert not (tmp_path / "db").exists()


def test_no_image_can_be_packed(run_main, tmp_path, images):
    argv = ["lmdb", images, f"--out={tmp_path}/db", "--n_worker=1"]
    text = error_of(run_main(prepare_data.main, *argv))
    assert text == (f"--images={images}: none of the 6 images can be packed; the first: {in_order(images)[0]} is only "
                    "40x33, and images are not enlarged")
    assert not (tmp_path / "db").exists()
    assert run_main(prepare_data.main, *argv, "--size=32").status == 0
    assert error_of(run_main(prepare_data.main, *argv, "--size=32,64"))
    assert read(tmp_path / "db")  # what was packed stays


def test_databases_that_are_not_gone_on_with(run_main, tmp_path, images):
    argv = ["lmdb", images, "--size=16", "--n_worker=1"]
    write(tmp_path / "theirs", {b"length": b"1", b"16-00000": jpeg(16)})
    text = error_of(run_main(prepare_data.main, *argv, f"--out={tmp_path}/theirs"))
    assert text == f"--out={tmp_path}/theirs holds a database of unknown origin; choose another folder"

    pack(run_main, images, tmp_path / "db", "--size=16")
    ran = run_main(prepare_data.main, *argv, f"--out={tmp_path}/db", "--resample=bilinear")
    assert error_of(ran) == (f"--resample=bilinear: --out={tmp_path}/db was made with lanczos; choose another folder")
    Image.new("RGB", (32, 32)).save(images / "new.png")
    text = error_of(run_main(prepare_data.main, *argv, f"--out={tmp_path}/db"))
    assert "was made from other images (6 files there, 7 here" in text

    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "data.mdb").write_bytes(b"x" * 10_000)
    text = error_of(run_main(prepare_data.main, *argv, f"--out={tmp_path}/broken"))
    assert text.startswith(f"--out={tmp_path}/broken: the database cannot be written (")

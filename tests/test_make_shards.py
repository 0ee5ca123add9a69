"""prepare_data.py webdataset, as a user types it."""

import json
import tarfile

import pytest
import torch
from small_shards import png, sample, write_tar

import prepare_data
from libs.data import load_data, make_shards


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def folder(tmp_path):
    """7 images, the second with a JSON and the others with texts, and one without a caption."""
    root = tmp_path / "images"
    for number in range(7):
        name = f"{'sub/' * (number > 4)}image.{number}"
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        for extension, content in sample(number, 6.5 if number == 1 else None).items():
            (root / f"{name}.{extension}").write_bytes(content)
    (root / "bare.png").write_bytes(png(7))
    return root


def pack(run_main, folder, out, *argv):
    return run_main(prepare_data.main, "webdataset", folder, f"--out={out}", *argv)


def contents(out) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(out.iterdir())}


def test_shards_of_a_folder(run_main, tmp_path, folder):
    out = tmp_path / "out"
    ran = pack(run_main, folder, out, "--shard_images=3")
    assert ran.status == 0, ran.stderr
    size = sum(path.stat().st_size for path in out.glob("*.tar"))
    assert ran.stdout == (f"{out}: 7 images in 3 shards, {size / 1e6:.1f} MB\n"
                          f"left out: no caption (json 'caption', or txt): 1 ({folder}/bare)\n")
    assert sorted(contents(out)) == [".shards.json", "00000.tar", "00001.tar", "00002.tar"]
    with tarfile.open(out / "00000.tar") as tar:
        assert tar.getnames() == ["00000000.png", "00000000.txt", "00000001.json", "00000001.png", "00000002.png",
                                  "00000002.txt"]
        assert tar.extractfile("00000002.png").read() == png(2)
        assert json.load(tar.extractfile("00000001.json")) == {"caption": "picture 1", "aesthetic_score": 6.5}
    data = load_data("webdataset", out, image_size=8)
    assert data.texts(torch.arange(7)) == [f"picture {i}" for i in range(7)]
    assert data.batch(torch.arange(7))[0][:, 0, 0, 0].tolist() == list(range(7))


def test_other_readers_of_webdatasets_read_them(run_main, tmp_path, folder):
    webdataset = pytest.importorskip("webdataset")
    assert pack(run_main, folder, tmp_path / "out", "--shard_images=4").status == 0
    urls = [str(path) for path in sorted((tmp_path / "out").glob("*.tar"))]
    found = list(webdataset.WebDataset(urls, shardshuffle=False).decode("rgb8"))
    assert [each["__key__"] for each in found] == [f"{i:08d}" for i in range(7)]
    assert [each["json"]["caption"] if i == 1 else each["txt"] for i, each in enumerate(found)] == \
        [f"picture {i}" for i in range(7)]
    assert [int(each["png"][0, 0, 0]) for each in found] == list(range(7))


def test_no_shard_is_larger_than_asked(run_main, tmp_path):
    held = {f"{i:03d}": {"png": png(i, (70 + 15 * i, 60)), "txt": b"text"} for i in range(40)}
    source = write_tar(tmp_path / "all.tar", held)
    limit = 31_000
    assert pack(run_main, source, tmp_path / "out", f"--shard_mb={limit / 1e6}").status == 0
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert all(size <= limit for size in sizes)
    assert all(size > limit / 2 for size in sizes[:-1])  # and none is needlessly small
    data = load_data("webdataset", tmp_path / "out", image_size=8)
    assert data.batch(torch.arange(40))[0][:, 0, 0, 0].tolist() == list(range(40))


def test_it_goes_on_where_it_stopped(run_main, tmp_path, folder, monkeypatch):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    assert pack(run_main, folder, whole, "--shard_images=2").status == 0
    write, written = make_shards._write, []

    def fail_at_third(path, numbers, samples):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path.name)
        write(path, numbers, samples)

    with monkeypatch.context() as patch:
        patch.setattr(make_shards, "_write", fail_at_third)
        assert pack(run_main, folder, stopped, "--shard_images=2").status == 130
    assert sorted(contents(stopped)) == [".shards.json", "00000.tar", "00001.tar"]
    monkeypatch.setattr(make_shards, "_write", lambda path, *args: (written.append(path.name), write(path, *args)))
    assert pack(run_main, folder, stopped, "--shard_images=2").status == 0
    assert written == [f"0000{i}.tar" for i in range(4)]  # each once
    assert contents(stopped) == contents(whole)


def test_a_shard_appears_whole_or_not_at_all(run_main, tmp_path, folder, monkeypatch):
    added = tarfile.TarFile.addfile
    calls = []

    def full(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        added(self, *args)

    monkeypatch.setattr(tarfile.TarFile, "addfile", full)
    ran = pack(run_main, folder, tmp_path / "out")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert "00000.tar: No space left on device" in ran.stderr
    assert list(contents(tmp_path / "out")) == [".shards.json"]


def test_it_refuses_other_shards(run_main, tmp_path, folder):
    out = tmp_path / "out"
    assert pack(run_main, folder, out, "--shard_images=3").status == 0
    before = contents(out)
    for argv, fragment in (["--shard_images=4"], "made with shard_images=3, not 4"), \
            (["--shard_mb=1", "--shard_images=3"], "made with shard_bytes=1000000000, not 1000000;"), \
            (["--shard_images=3", "--min_score=6"], "made with samples=7, not 1;"):
        ran = pack(run_main, folder, out, *argv)
        assert ran.status == 2
        assert f"--out={out}" in ran.stderr
        assert fragment in ran.stderr
    (folder / "image.0.txt").write_text("Picture 0")
    ran = pack(run_main, folder, out, "--shard_images=3")
    assert ran.status == 2
    assert "its shards were made from other images; choose another folder" in ran.stderr
    assert contents(out) == before
    write_tar(tmp_path / "theirs" / "x.tar", {"0": sample(0)})
    ran = pack(run_main, folder, tmp_path / "theirs")
    assert "holds shards of something else" in ran.stderr


def test_only_what_is_good_enough(run_main, tmp_path, folder):
    out = tmp_path / "out"
    ran = pack(run_main, folder, out, "--min_score=6")
    assert ran.stdout.startswith(f"{out}: 1 images in 1 shards")
    assert "left out: no aesthetic_score: 6 (" in ran.stdout
    assert load_data("webdataset", out, image_size=8).texts(torch.tensor([0])) == ["picture 1"]
    ran = pack(run_main, folder, tmp_path / "none", "--min_score=7")
    assert ran.status == 2
    assert "no sample can be used" in ran.stderr
    assert "aesthetic_score below 7: 1" in ran.stderr


@pytest.mark.parametrize(("images", "fragment"), [
    ("nowhere", "--images: the shard nowhere is not there"), ("{}/empty", "--images='{}/empty' holds no images")])
def test_bad_input(run_main, tmp_path, images, fragment):
    (tmp_path / "empty").mkdir()
    ran = pack(run_main, images.replace("{}", str(tmp_path)), tmp_path / "out")
    assert ran.status == 2
    assert fragment.replace("{}", str(tmp_path)) in ran.stderr
    assert not (tmp_path / "out").exists()


def test_a_damaged_record(run_main, tmp_path, folder):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / make_shards.RECORD).write_text("{")
    ran = pack(run_main, folder, tmp_path / "out")
    assert ran.status == 2
    assert f"{make_shards.RECORD} cannot be read" in ran.stderr

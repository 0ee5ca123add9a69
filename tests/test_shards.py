"""Webdataset shards and captioned folders as a data set."""

import io
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused
from small_shards import load, numbers, png, sample, write_shards, write_tar

from libs.data import load_data, shard_cache, shard_index
from libs.data.canny import canny
from libs.data.order import DataOrder, ShardOrder
from libs.data.shard_cache import ShardCache
from libs.data.shard_files import FolderShard, TarShard
from libs.data.shard_filters import at_least, crop, present, resize
from libs.data.shard_urls import list_shards
from libs.data.shards import open_shards
from libs.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_cache, "WAITS", ())


# ---- addresses


def test_addresses(tmp_path):
    write_shards(tmp_path, [1, 1, 1])
    paths = [str(tmp_path / f"{i:02d}.tar") for i in range(3)]
    listed = tmp_path / "list.txt"
    listed.write_text(f"# ours\n{tmp_path}/{{00,02}}.tar\n\npipe:echo a; echo b\n")
    assert list_shards(f"{tmp_path}/{{00..02}}.tar") == paths
    assert list_shards(f"{tmp_path}/*.tar") == list_shards(str(tmp_path)) == paths
    assert list_shards(f"{paths[2]}; {paths[0]}") == [paths[2], paths[0]]
    assert list_shards(str(listed)) == [paths[0], paths[2], "pipe:echo a; echo b"]
    assert list_shards("https://a.b/{0..1}{x,y}.tar") == [f"https://a.b/{i}{j}.tar" for i in "01" for j in "xy"]


@pytest.mark.parametrize(("path", "fragment"), [
    ("", "data.path is empty"), ("{}/03.tar", "03.tar is not there"), ("{}/x*.tar", "nothing matches"),
    ("{}/00.tar;{}/*.tar", "00.tar 2 times"), ("{}/00.tar;{}/empty/../00.tar", "00.tar 2 times"),
    ("{}/none", "none is not there"), ("{}/list.txt", "list.txt"), ("{}/empty", "empty holds no *.tar")])
def test_bad_addresses(tmp_path, path, fragment):
    write_shards(tmp_path, [1, 1])
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError) as caught:
        list_shards(path.replace("{}", str(tmp_path)))
    assert fragment in str(caught.value)


# ---- samples and their order


def test_each_sample_once_an_epoch_whoever_asks(tmp_path):
    data = load(write_shards(tmp_path, [5, 1, 7, 4]))
    assert (len(data), data.image_shape) == (17, (8, 8, 3))
    order = data.order(seed=3)
    batch, processes, epochs = 2 * 3, 2, 6
    steps = epochs * len(data) // batch
    seen = [[numbers(data, order(torch.arange(step * batch + rank * 3, step * batch + rank * 3 + 3)))
             for step in range(steps)] for rank in range(processes)]
    sequence = [number for step in range(steps) for rank in range(processes) for number in seen[rank][step]]
    for epoch in range(epochs):
        assert sorted(sequence[epoch * 17:(epoch + 1) * 17]) == list(range(17))
    assert sequence[:17] != sequence[17:34]
    # one process that begins in the middle, as after a stop
    assert numbers(load(f"{tmp_path}/*.tar"), data.order(3)(torch.arange(40, 60))) == sequence[40:60]
    assert numbers(data, data.order(4)(torch.arange(17))) != sequence[:17]


def test_the_order_stays_in_few_shards(tmp_path):
    counts = [3, 1, 4, 2, 5]
    order = ShardOrder(counts, seed=1, together=2)
    shard_of = torch.arange(5).repeat_interleave(torch.tensor(counts))
    for epoch in range(4):
        indices = order(torch.arange(epoch * 15, epoch * 15 + 15))
        assert sorted(indices.tolist()) == list(range(15))
        visits = shard_of[indices].tolist()
        groups = []
        while visits:  # whole shards, two at a time
            group = sorted(set(visits[:next(n for n in range(len(visits) + 1) if len(set(visits[:n + 1])) > 2
                                            or n == len(visits))]))
            size = sum(counts[i] for i in group)
            assert sorted(visits[:size]) == sorted(i for i in group for _ in range(counts[i]))
            groups, visits = [*groups, group], visits[size:]
        assert [len(group) for group in groups] == [2, 2, 1]


def test_one_shard_is_in_the_order_of_all_data():
    positions = torch.arange(25)
    assert len(set(ShardOrder([10], 5)(positions).tolist())) == 10
    assert DataOrder(10, 5)(positions).tolist() == DataOrder(10, 5)(positions.flip(0)).flip(0).tolist()


def test_what_was_prefetched_is_what_comes(tmp_path, monkeypatch):
    data = load(write_shards(tmp_path, [6, 6]))
    read, calls = data._read, []
    monkeypatch.setattr(data, "_read", lambda number: (calls.append(number), read(number))[1])
    first, second = torch.tensor([1, 9, 4]), torch.tensor([4, 2, 11])
    assert numbers(data, first) == [1, 9, 4]
    data.prefetch(second)
    assert numbers(data, second) == [4, 2, 11]
    assert sorted(calls) == [1, 2, 4, 9, 11]  # each decoded once, 4 too, which is in both
    assert numbers(data.to("cpu"), torch.tensor([7, 7])) == [7, 7]


def test_a_folder_with_captions(tmp_path):
    for number, name in enumerate(["a/one", "a/two.more", "three"]):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.png").write_bytes(png(number))
        (tmp_path / f"{name}.txt").write_text(f"picture {number}\n\n other  words \n")
    (tmp_path / "four.png").write_bytes(png(3))
    (tmp_path / "four.json").write_text(json.dumps({"caption": ["picture 3"], "size": 7}))
    (tmp_path / "bare.png").write_bytes(png(4))
    data = load_data("captioned_folder", tmp_path, image_size=8)
    assert sorted(numbers(data, torch.arange(4))) == [0, 1, 2, 3]
    where = data.texts(torch.arange(4)).index("picture 1")
    assert data.texts(torch.tensor([where] * 2), torch.tensor([0.49, 0.51])) == ["picture 1", "other words"]
    refused("is not a folder", name="captioned_folder", path=str(tmp_path / "three.png"))
    (tmp_path / "late.png").write_bytes(png(9))  # the index is made again
    (tmp_path / "late.txt").write_text("picture 9")
    assert 9 in numbers(load_data("captioned_folder", tmp_path, image_size=8), torch.arange(5))


def test_the_index_is_read_once_and_made_again_when_the_shard_changes(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, [4])
    assert len(load(pattern)) == 4
    assert (tmp_path / ".00.tar.index.json").exists()
    with monkeypatch.context() as patch:
        patch.setattr("libs.data.shard_index.make_index", None)  # would be called
        assert numbers(load(pattern), torch.arange(4)) == [0, 1, 2, 3]
    write_shards(tmp_path, [5])
    assert len(load(pattern)) == 5
    (tmp_path / ".00.tar.index.json").write_text("{")
    assert len(load(pattern)) == 5
    write_shards(tmp_path / "unkept", [10] * 20)
    data = load(f"{tmp_path}/unkept/*.tar", cache=False)
    assert numbers(data, torch.arange(0, 200, 15)) == list(range(0, 200, 15))
    assert not list((tmp_path / "unkept").glob(".*"))


def test_processes_that_start_together_index_a_shard_once(tmp_path, monkeypatch):
    pattern = write_shards(tmp_path, [2, 3, 2])
    made, make = [], shard_index.make_index
    monkeypatch.setattr(shard_index, "make_index", lambda shard, key: (made.append(shard.address), make(shard, key))[1])
    with ThreadPoolExecutor(4) as pool:
        assert [len(data) for data in pool.map(load, [pattern] * 4)] == [7] * 4
    assert sorted(made) == [str(tmp_path / f"{i:02d}.tar") for i in range(3)]


# ---- filters and maps


def test_scores(tmp_path, caplog):
    scores = {"00000": 6.5, "00001": 5.9, "00002": None, "00003": 6}
    write_tar(tmp_path / "a.tar", {key: sample(int(key), score) for key, score in scores.items()})
    path = str(tmp_path / "a.tar")
    with caplog.at_level("INFO"):
        data = load(path, min_score=6)
    assert numbers(data, torch.arange(2)) == [0, 3]
    assert "aesthetic_score below 6: 1" in caplog.text
    assert "no aesthetic_score: 1" in caplog.text
    assert "a.tar/00002" in caplog.text
    assert len(load(path)) == 4
    refused("data.min_score=7", "no sample can be used", name="webdataset", path=path, image_size=8, min_score=7)
    refused("no beauty: 4", name="webdataset", path=path, image_size=8, min_score=1, score_key="beauty")


def test_filters_of_files(tmp_path):
    held = {f"{i:05d}": sample(i) | ({"edge.png": png(i)} if i % 2 else {}) for i in range(6)}
    shard = TarShard(str(write_tar(tmp_path / "a.tar", held)), ShardCache(tmp_path, 0))
    data = open_shards([shard], 8, filters=[present("edge.png")])
    assert numbers(data, torch.arange(3)) == [1, 3, 5]
    edge, image = data.fields(torch.tensor([1]), "edge.png"), data.batch(torch.tensor([1]))[0]
    assert torch.equal(edge, image)  # the same picture here: cut, resized and with as many channels as the image
    mapped = load(shard.address, keys="edge.png", maps="rename edge.png edge; resize 4 edge; rescale edge small")
    assert mapped.fields(torch.tensor([0, 2]), "small").shape == (2, 3, 4, 4)
    assert len(load(shard.address, keys="txt edge.png")) == 3
    with pytest.raises(UserError, match="has no 'depth'; choose from .*edge.png"):
        data.fields(torch.tensor([1]), "depth")
    with pytest.raises(UserError, match="no sample can be used; no depth: 6"):
        open_shards([shard], 8, filters=[present("png", "depth"), at_least("a", 1)])
    with pytest.raises(UserError, match="^data.min_score=nan must be a number$"):
        load(shard.address, min_score=float("nan"))


def test_maps(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    files = {"png": buffer.getvalue(), "json": b'{"caption": "noise", "width": 30, "url": "x"}'}
    path = str(write_tar(tmp_path / "a.tar", {"0": files}))
    one = torch.tensor([0])
    data = load(path, maps="crop 8; canny 50 100; rescale edges e; rename width w; select e w")
    image = data.batch(one)[0][0].numpy()
    assert np.array_equal(image, pixels[6:14, 11:19])  # the centre; no interpolation at the size itself
    edges = canny(image, 50, 100)
    assert 0 < edges.mean() < 255
    expected = torch.from_numpy(edges).permute(2, 0, 1)[None] / 127.5 - 1
    assert torch.equal(data.fields(one, "e"), expected)
    assert data.fields(one, "w") == [30]
    with pytest.raises(UserError, match="has no 'url'"):
        data.fields(one, "url")


@pytest.mark.parametrize(("text", "says"), [
    ("blur 3", "data.maps='blur' is unknown; choose from select"),
    ("crop", "data.maps: 'crop' has other arguments"),
    ("canny; crop 0", "data.maps: 'crop 0': size=0 must be at least 1"),
    ("crop -3", "data.maps: 'crop -3': size=-3 must be at least 1"),
    ("crop abc", "data.maps: 'crop abc': size='abc' must be a whole number"),
    ("resize 0", "data.maps: 'resize 0': size=0 must be at least 1"),
    ("resize 1.5", "data.maps: 'resize 1.5': size='1.5' must be a whole number"),
    ("canny x", "data.maps: 'canny x': low='x' must be a whole number"),
    ("canny -1", "data.maps: 'canny -1': low=-1 must be at least 0"),
    ("canny 200 100", "data.maps: 'canny 200 100': high=100 must be at least 200, the value of low"),
])
def test_maps_of_other_arguments(text, says, tmp_path):
    """They are told before a shard is opened, not by its first sample."""
    (tmp_path / "a.tar").write_bytes(b"no shard")
    with pytest.raises(UserError) as caught:
        load(str(tmp_path / "a.tar"), maps=text)
    assert str(caught.value).startswith(says)
    assert "\n" not in str(caught.value)


def test_small_images_are_enlarged_without_borders():
    small = Image.new("RGB", (3, 5), (200, 10, 90))
    for make in crop(64), resize(64):
        out = np.array(make({"image": small})["image"])
        assert (out == (200, 10, 90)).all()
    assert resize(64)({"image": small})["image"].size == (64, 64)
    assert crop(4)({"image": small})["image"].size == (3, 4)


def test_edges_of_a_square():
    image = np.zeros((9, 9, 1), np.uint8)
    image[3:6, 3:6] = 255
    edges = canny(image)
    assert set(np.unique(edges)) == {0, 255}
    assert edges[:2].max() == edges[7:].max() == edges[4, 4] == 0
    assert np.array_equal(canny(np.repeat(image, 3, 2)), edges)
    assert canny(image // 64).max() == 0  # weaker than the lower threshold


# ---- what cannot be read


def test_broken_samples_are_counted_named_and_left_out(tmp_path, caplog):
    held = {f"{i:05d}": sample(i) for i in range(10)}
    for i in 1, 3, 5, 7:
        held[f"{i:05d}"]["png"] = png(i)[:45]
    held["00008"] = {"txt": b"no image"}
    held["00009"] = {"png": png(9), "json": b"{not json", "txt": b" \n"}
    with caplog.at_level("INFO"):
        data = load(str(write_tar(tmp_path / "a.tar", held)))
    assert numbers(data, torch.arange(4)) == [0, 2, 4, 6]
    names = ", ".join(f"{tmp_path}/a.tar/{i:05d}.png" for i in (1, 3, 5))
    assert f"unreadable image: 4 ({names}, ...)" in caplog.text
    assert f"no image: 1 ({tmp_path}/a.tar/00008)" in caplog.text
    assert f"no caption (json 'caption', or txt): 1 ({tmp_path}/a.tar/00009)" in caplog.text


def test_nothing_that_can_be_used(tmp_path):
    broken = write_tar(tmp_path / "broken.tar", {"0": {"png": b"no", "txt": b"text"}})
    bare = write_tar(tmp_path / "bare.tar", {"0": {"png": png(0)}, "1": {"png": png(1), "json": b'{"text": "a"}'}})
    (tmp_path / "text.tar").write_text("no tar at all")
    for path, fragment in (broken, "unreadable image: 1"), (bare, "no caption (json 'caption', or txt): 2"), \
            (tmp_path / "text.tar", "no tar file"):
        refused(f"data.path={str(path)!r}", "no sample can be used", fragment, name="webdataset", path=path)
    assert load(str(bare), caption_key="text").texts(torch.tensor([0])) == ["a"]


def test_a_truncated_shard_gives_its_first_part(tmp_path, caplog):
    pattern = write_shards(tmp_path, [6])
    path = tmp_path / "00.tar"
    content = path.read_bytes()
    cuts = [(content.index(png(4)) + 10, 4), (content.index(b"00003.txt") + 100, 3), (content.index(b"00002.png"), 2)]
    for size, whole in cuts:  # in an image, in a header, between two files
        path.write_bytes(content[:size])
        caplog.clear()
        with caplog.at_level("INFO"):
            assert numbers(load(pattern), torch.arange(whole)) == list(range(whole))
        assert "cut off or damaged, its first part is used: 1" in caplog.text


def test_a_shard_that_changes_under_a_run(tmp_path):
    data = load(write_shards(tmp_path, [6]))
    (tmp_path / "00.tar").write_bytes(b"")
    with pytest.raises(UserError, match="has changed while it was in use"):
        data.batch(torch.tensor([2]))
    (tmp_path / "00.tar").unlink()
    with pytest.raises(UserError, match="cannot be read"):
        data.texts(torch.tensor([2]))


def test_other_fields(tmp_path):
    path = write_shards(tmp_path, [1])
    refused("data.split='test'", name="webdataset", path=path, split="test")
    refused("data.shard_cache_gb=-1", name="webdataset", path=path, shard_cache_gb=-1)
    shard = FolderShard(tmp_path, ShardCache(tmp_path, 0))
    with pytest.raises(UserError, match="holds no images"):
        open_shards([shard], 8)

"""Webdataset shards from http addresses and pipes, and the folder in which they are kept."""

import http.server
import threading

import pytest
import torch
from refusals import refused
from small_shards import load, numbers, write_shards

from libs.data import shard_cache
from libs.data.shard_cache import ShardCache
from libs.data.shard_files import TarShard
from libs.data.shard_urls import list_shards
from libs.data.shards import open_shards
from libs.errors import UserError


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(shard_cache, "WAITS", ())


@pytest.fixture
def server(tmp_path):
    """Serves tmp_path; yields (its address, the paths that were asked for)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def __init__(self, *args):
            super().__init__(*args, directory=str(tmp_path))

        def do_GET(self):
            asked.append(self.path)
            super().do_GET()

        def log_message(self, *args):
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as httpd:
        threading.Thread(target=httpd.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{httpd.server_port}", asked
        httpd.shutdown()


def test_http_and_pipe(tmp_path, server):
    host, asked = server
    write_shards(tmp_path / "far", [3, 2, 4])
    mixed = f"{host}/far/{{00..01}}.tar;pipe:cat {tmp_path}/far/02.tar"
    data = load(mixed)
    assert numbers(data, torch.arange(9)) == list(range(9))
    assert sorted(asked) == ["/far/00.tar", "/far/01.tar"]
    assert numbers(load(mixed), torch.arange(9)) == list(range(9))
    assert len(asked) == 2  # kept


def test_the_cache_is_bounded_and_shards_come_again(tmp_path, server):
    host, asked = server
    write_shards(tmp_path / "far", [3] * 4)
    size = (tmp_path / "far" / "00.tar").stat().st_size
    cache = ShardCache(tmp_path / "small", 2 * size)
    shards = [TarShard(address, cache) for address in list_shards(f"{host}/far/{{00..03}}.tar")]
    data = open_shards(shards, 8, workers=1, together=1)
    assert len(asked) == 4
    for _ in range(2):
        for index in 0, 3, 6, 9:
            assert numbers(data, torch.tensor([index])) == [index]
            assert sum(path.stat().st_size for path in cache.folder.glob("*.tar")) <= 2 * size
    assert len(asked) > 4
    before = len(asked)
    assert numbers(data, torch.tensor([9, 6])) == [9, 6]  # the last two are there
    assert len(asked) == before
    with pytest.raises(UserError, match="data.shard_cache_gb=.*: shards of .* GB are in use at a time"):
        open_shards(shards, 8, together=2)


def test_the_shards_that_come_next_are_fetched_meanwhile(tmp_path, server):
    host, asked = server
    write_shards(tmp_path / "far", [3] * 4)
    cache = ShardCache(tmp_path / "kept", 1e9)
    data = open_shards([TarShard(address, cache) for address in list_shards(f"{host}/far/{{00..03}}.tar")], 8,
                       together=1)
    for path in cache.folder.glob("*.tar"):
        path.unlink()
    asked.clear()
    order = data.order(0)
    first, second = (int(order(torch.tensor([3 * i]))) // 3 for i in (0, 1))
    numbers(data, order(torch.arange(3)))
    data.fetching.join()
    assert {f"/far/{first:02d}.tar", f"/far/{second:02d}.tar"} <= set(asked)


def test_what_cannot_be_fetched(tmp_path, server):
    host, _ = server
    write_shards(tmp_path, [1])
    refused("data.path", f"{host}/none.tar cannot be fetched", "404", name="webdataset",
            path=f"{tmp_path}/00.tar;{host}/none.tar")
    refused("cannot be fetched (exit status 1: cat:", name="webdataset", path="pipe:cat nowhere.tar")
    refused("cannot be fetched", name="webdataset", path="http://127.0.0.1:9/0.tar")
    assert not list((tmp_path / "cache").rglob("*.tar"))


def test_a_failing_address_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr(shard_cache, "WAITS", (0, 0))
    write_shards(tmp_path, [2])
    flag = tmp_path / "flag"
    command = f"pipe:if [ -e {flag} ]\nthen cat {tmp_path}/00.tar\nelse touch {flag}\nfalse\nfi"
    assert numbers(load(command), torch.arange(2)) == [0, 1]

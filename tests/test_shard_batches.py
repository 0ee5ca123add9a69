"""Batches of shards: shared among processes, and decoded ahead."""

import torch
from small_shards import write_shards

from libs.codecs import PixelCodec
from libs.data import load_data
from libs.training.batches import Batches

COND = {"kind": "none", "drop": 0.0}


def batches(path, **options) -> Batches:
    data = load_data("webdataset", path, image_size=8)
    return Batches(data, PixelCodec(), COND, flip=True, seed=2, batch_size=4, **options)


def test_processes_and_parts_see_the_batches_of_one(tmp_path):
    path = write_shards(tmp_path, [3, 5, 3])
    alone = batches(path)
    wanted = [next(alone.parts(step)).x_0 for step in range(6)]
    shared = [batches(path, accumulate=2, rank=rank, count=2) for rank in range(2)]
    for step in range(2, 6):  # begun in the middle, as a resumed run does
        parts = [part.x_0 for each in shared for part in each.parts(step)]
        assert len(parts) == 4
        assert torch.equal(torch.cat(parts), wanted[step])


def test_the_order_is_the_shards_own_and_the_next_part_is_begun(tmp_path, monkeypatch):
    made = batches(write_shards(tmp_path, [2] * 12), accumulate=2)
    positions = torch.arange(24)
    assert torch.equal(made.order(positions), made.data.order(2)(positions))
    begun = []
    monkeypatch.setattr(made.data, "prefetch", lambda indices: begun.extend(indices.tolist()))
    for step in range(3):
        for _ in made.parts(step):
            pass
    assert begun == made.order(torch.arange(2, 14)).tolist()

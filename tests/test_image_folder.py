"""Folders of generated images: whole files, reuse, and no mixing of chains."""

import errno
import json
import os

import pytest
import torch

from libs import config as config_files
from libs.data.images import save_png
from libs.errors import UserError
from libs.image_folder import LATER, ImageFolder, fingerprint, image_names, read_chain
from libs.provenance import file_sha256

CHAIN = {"sampler": {"name": "ddim", "steps": 50}, "checkpoint_sha256": "ab"}


def pictures(count, channels=3):
    return torch.randint(0, 256, (count, 8, 8, channels), dtype=torch.uint8)


@pytest.mark.parametrize("channels", [1, 3])
def test_images_come_back(tmp_path, channels):
    folder, images = ImageFolder(tmp_path / "new", CHAIN), pictures(3, channels)
    folder.save([7, 0, 1234567], images)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "000000.png", "000007.png", "1234567.png", "chain.json"]
    assert torch.equal(folder.load([1234567, 7]), images[[2, 0]])
    assert folder.missing([7, 3, 1234567, 2, 0]) == [3, 2]


def test_same_chain_goes_on(tmp_path):
    ImageFolder(tmp_path, CHAIN).save([0], pictures(1))
    assert ImageFolder(tmp_path, json.loads(json.dumps(CHAIN))).missing([0, 1]) == [1]


@pytest.mark.parametrize(("change", "line"), [
    ({"sampler": {"name": "ddim", "steps": 20}}, "sampler.steps is 50 there and 20 here"),
    ({"checkpoint_sha256": "cd"}, "checkpoint_sha256 is 'ab' there and 'cd' here"),
    ({"labels": "3"}, "labels is None there and '3' here"),
])
def test_another_chain_is_refused(tmp_path, change, line):
    ImageFolder(tmp_path, CHAIN).save([0], pictures(1))
    with pytest.raises(UserError, match=f"^--keep_images={tmp_path} holds images of another chain .{line}.; choose"):
        ImageFolder(tmp_path, CHAIN | change, "keep_images")
    assert read_chain(tmp_path) == CHAIN


def test_images_of_unknown_origin_are_refused(tmp_path):
    save_png(tmp_path / "grid.png", pictures(1)[0])  # does not count
    ImageFolder(tmp_path, CHAIN)
    (tmp_path / "chain.json").unlink()
    save_png(tmp_path / "000003.png", pictures(1)[0])
    with pytest.raises(UserError, match="images of unknown origin .000003.png, but no chain.json."):
        ImageFolder(tmp_path, CHAIN)


def test_a_chain_without_images_is_replaced(tmp_path):
    ImageFolder(tmp_path, CHAIN)
    ImageFolder(tmp_path, {"other": 1})
    assert read_chain(tmp_path) == {"other": 1}


def test_broken_files(tmp_path):
    folder = ImageFolder(tmp_path, CHAIN)
    folder.save([0], pictures(1))
    path = tmp_path / "000000.png"
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(UserError, match="000000.png cannot be read as an image .*; delete it to have it made again"):
        folder.load([0])
    (tmp_path / "chain.json").write_text("{")
    with pytest.raises(UserError, match="chain.json cannot be read"):
        ImageFolder(tmp_path, CHAIN)


def test_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    folder = ImageFolder(tmp_path, CHAIN)

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(UserError, match="cannot write .*000000.png: No space left on device"):
        folder.save([0], pictures(1))
    assert [path.name for path in tmp_path.iterdir()] == ["chain.json"]


def test_remove(tmp_path):
    folder = ImageFolder(tmp_path / "a", CHAIN)
    folder.save([0, 1], pictures(2))
    folder.remove()
    assert not folder.path.exists()
    folder = ImageFolder(tmp_path / "b", CHAIN)
    (folder.path / "notes.txt").write_text("mine")
    folder.remove()
    assert [path.name for path in folder.path.iterdir()] == ["notes.txt"]


def test_names_of_what_is_scored(tmp_path):
    ImageFolder(tmp_path / "chain", CHAIN).save([0, 12], pictures(2))
    for name in ("chain/grid.png", "free/a.png", "free/grid.png", "free/sub/b.png"):
        save_png(tmp_path / name, pictures(1)[0])
    assert image_names(tmp_path / "chain") == ["000000.png", "000012.png"]
    assert image_names(tmp_path / "free") == ["a.png", "grid.png", "sub/b.png"]
    with pytest.raises(UserError, match="--images=.*nowhere.* is not a folder"):
        image_names(tmp_path / "nowhere")


def test_fingerprint_names_what_decides_the_pixels(tmp_path):
    config = config_files.load("configs/cifar10_uvit_tiny.py")
    weights = tmp_path / "a.safetensors"
    weights.write_bytes(b"weights")
    first = fingerprint(config, weights)
    assert json.loads(json.dumps(first)) == first
    assert first == fingerprint(config, weights)
    for field, text in [("sampler.steps", "20"), ("compute.rows", "4"), ("compute.precision", "bf16"),
                        ("sampler.cfg_scale", "1.5"), ("schedule.name", "cosine")]:
        other = config_files.load("configs/cifar10_uvit_tiny.py")
        config_files.override(other, field, text)
        assert fingerprint(other, weights) != first, field
    assert fingerprint(config, weights, labels_rule="3") != first
    other = config_files.load("configs/cifar10_uvit_tiny.py")
    config_files.override(other, "train.lr", "1.0")  # has no part in it
    assert fingerprint(other, weights) == first
    weights.write_bytes(b"other weights")
    assert fingerprint(config, weights) != first


def test_settings_that_came_later_leave_what_was_made_before_valid(tmp_path):
    """At the value at which they change nothing; each of them is a setting."""
    config = config_files.load("configs/cifar10_uvit_tiny.py:early_exit")
    weights = tmp_path / "a.safetensors"
    weights.write_bytes(b"weights")
    first = fingerprint(config, weights)
    for (section, name), value in LATER.items():
        assert config[section][name] == value
        assert name not in first[section]
    config.policy.by_step = True
    assert fingerprint(config, weights)["policy"]["by_step"] is True


def test_hash_of_files_and_folders(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    first = file_sha256(tmp_path)
    (tmp_path / "a").rename(tmp_path / "b")
    assert file_sha256(tmp_path) != first

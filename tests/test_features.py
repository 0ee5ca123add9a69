"""Feature files on disk: U-ViT's own are read, code in them is not run, and training sees what was stored."""

import os
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import prepare_data
from libs.data import cache, load_data, packed_moments
from libs.data.feature_data import FeatureData, read_prompt_features
from libs.data.feature_files import read_feature, write_feature
from libs.errors import UserError

MOMENTS, TEXT = (8, 4, 4), (5, 6)  # shapes


def moments(i, shape=MOMENTS):
    return np.random.default_rng(i).normal(size=shape).astype(np.float32)


def text(i, k=0, shape=TEXT):
    return np.random.default_rng([i, k]).normal(size=shape).astype(np.float32)


def as_u_vit(path, *values):
    """An object array as numpy before 1.24 made it of a tuple, and as numpy 1 named its own modules in a pickle."""
    array = np.empty(2, object)
    array[0], array[1] = values
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|O", "fortran_order": False, "shape": (2,)})
        file.write(pickle.dumps(array, protocol=3).replace(b"numpy._core", b"numpy.core"))


@pytest.fixture
def labelled(tmp_path):
    """Six latents with labels 0, 10, ...; two as U-ViT wrote them, the rest as we do."""
    for i in range(6):
        (as_u_vit if i < 2 else write_feature)(tmp_path / f"{i}.npy", moments(i), np.int64(10 * i))
    return tmp_path


@pytest.fixture
def captioned(tmp_path):
    """Four latents of MS-COCO's train part, image i with i + 1 captions; one of val; an empty text; two prompts."""
    for i in range(4):
        write_feature(tmp_path / "train" / f"{i}.npy", moments(i))
        for k in range(i + 1):
            write_feature(tmp_path / "train" / f"{i}_{k}.npy", text(i, k).astype(np.float16 if k else np.float32))
    write_feature(tmp_path / "val" / "0.npy", moments(99))
    write_feature(tmp_path / "val" / "0_0.npy", text(99))
    write_feature(tmp_path / "empty_context.npy", text(1000))
    for j, prompt in enumerate(["a green train", "ünïcode"]):
        (write_feature if j else as_u_vit)(tmp_path / "run_vis" / f"{j}.npy", prompt, text(2000 + j))
    return tmp_path


def refused(path, *fragments, **request):
    with pytest.raises(UserError) as caught:
        load_data("features", path, **request)
    message = str(caught.value)
    assert "\n" not in message
    for fragment in fragments:
        assert fragment in message, message


# ---- files


def test_two_values_are_read_by_plain_numpy(tmp_path):
    """The format of U-ViT's readers: np.load with its pickles allowed gives the pair."""
    write_feature(tmp_path / "0.npy", moments(0), 7)
    stored, label = np.load(tmp_path / "0.npy", allow_pickle=True)
    assert np.array_equal(stored, moments(0))
    assert label == 7
    assert np.array_equal(read_feature(tmp_path / "0.npy")[0], moments(0))


@pytest.mark.parametrize("array", [moments(0), np.asfortranarray(moments(1)), text(0).astype(np.float16), np.zeros(())])
def test_plain_arrays(tmp_path, array):
    np.save(tmp_path / "a.npy", array)
    held = read_feature(tmp_path / "a.npy")
    assert held.dtype == array.dtype
    assert np.array_equal(held, array)


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Evaluated:
    def __init__(self, path):
        self.code = f"__import__('os').mkdir({str(path)!r})"

    def __reduce__(self):
        return eval, (self.code,)


@pytest.mark.parametrize("kind", [Touch, Evaluated])
def test_a_file_with_code_is_refused_and_nothing_runs(tmp_path, kind):
    array = np.empty(2, object)
    array[:] = moments(0), kind(tmp_path / "harm")
    np.save(tmp_path / "0.npy", array)
    refused(tmp_path, f"{tmp_path}/0.npy cannot be read (it refers to", "would run code")
    assert not (tmp_path / "harm").exists()
    np.load(tmp_path / "0.npy", allow_pickle=True)  # the file is as harmful as it claims to be
    assert (tmp_path / "harm").exists()


@pytest.mark.parametrize(("content", "line"), [
    (b"", "cannot be read"), (b"no array", "cannot be read"), (b"\x93NUMPY\x01\x00", "cannot be read"),
])
def test_damaged_files(tmp_path, content, line):
    (tmp_path / "0.npy").write_bytes(content)
    refused(tmp_path, f"data.path: {tmp_path}/0.npy {line}")


def test_one_header_at_a_time(tmp_path, monkeypatch):
    """Several threads in ast.parse, by which numpy reads a header, are too much for Python 3.11."""
    inside, most, plain = [], [], np.lib.format.read_array_header_1_0

    def read(file):
        inside.append(None)
        most.append(len(inside))
        time.sleep(0.01)
        inside.pop()
        return plain(file)

    monkeypatch.setattr(np.lib.format, "read_array_header_1_0", read)
    write_feature(tmp_path / "a.npy", np.ones(3, np.float32))
    with ThreadPoolExecutor(8) as pool:
        arrays = list(pool.map(read_feature, [tmp_path / "a.npy"] * 16))
    assert all(array.tolist() == [1, 1, 1] for array in arrays)
    assert most == [1] * 16


@pytest.mark.parametrize("values", [(moments(0),), (moments(0), 3)])
def test_truncated_files(tmp_path, values):
    write_feature(tmp_path / "0.npy", *values)
    whole = (tmp_path / "0.npy").read_bytes()
    (tmp_path / "0.npy").write_bytes(whole[:len(whole) // 2])
    refused(tmp_path, "0.npy cannot be read (")


def test_a_failed_write_leaves_nothing(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="cannot write"):
        write_feature(tmp_path / "file" / "0.npy", moments(0))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


# ---- latents with labels


def test_latents_and_labels(labelled):
    data = load_data("features", labelled)
    assert isinstance(data, FeatureData)
    assert len(data) == 6
    assert not data.has_text
    rows, labels = data.batch(torch.tensor([4, 0, 4]))
    assert torch.equal(rows, torch.from_numpy(np.stack([moments(4), moments(0), moments(4)])))
    assert rows.dtype == torch.float32
    assert labels.tolist() == [40, 0, 40]
    assert labels.dtype == torch.int64
    assert (data.prompts, data.empty_context) == ([], None)


def test_log_variances_are_clamped_and_means_are_not(tmp_path):
    extreme = np.stack([np.full((4, 4), value, np.float32) for value in (-50, 50, -50, 50)])
    write_feature(tmp_path / "0.npy", extreme)
    rows, labels = load_data("features", tmp_path).batch(torch.tensor([0]))
    assert rows[0, :, 0, 0].tolist() == [-50, 50, -30, 20]
    assert labels is None


def test_any_sub_set_of_the_files_will_do(labelled):
    for i in 0, 3:
        (labelled / f"{i}.npy").unlink()
    write_feature(labelled / "10.npy", moments(10), 100)  # by number, not by name
    data = load_data("features", labelled)
    rows, labels = data.batch(torch.arange(5))
    assert labels.tolist() == [10, 20, 40, 50, 100]
    assert torch.equal(rows[4], torch.from_numpy(moments(10)))


def kept(folder):
    return sorted(path.name.split("_")[0] for path in folder.glob(".*_*.npy"))


def test_files_are_packed_once_until_they_change(labelled, monkeypatch):
    first = load_data("features", labelled)
    assert kept(labelled) == [".labels", ".moments"]
    with monkeypatch.context() as patch:
        read = packed_moments._read_moments
        patch.setattr(packed_moments, "_read_moments", lambda path: read(path) if path.endswith("/0.npy") else None)
        second = load_data("features", labelled)
    for one, other in zip(first.batch(torch.arange(6)), second.batch(torch.arange(6)), strict=True):
        assert torch.equal(one, other)

    write_feature(labelled / "2.npy", moments(77), 770)
    rows, labels = load_data("features", labelled).batch(torch.tensor([2]))
    assert torch.equal(rows[0], torch.from_numpy(moments(77)))
    assert labels.tolist() == [770]
    assert kept(labelled) == [".labels", ".moments"]

    next(labelled.glob(".labels_*")).unlink()
    assert load_data("features", labelled).labels.tolist() == [0, 10, 770, 30, 40, 50]


def test_without_room_latents_are_in_memory(labelled, monkeypatch):
    expected = load_data("features", labelled, cache=False)
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    data = load_data("features", labelled)
    assert kept(labelled) == []
    assert torch.equal(data.moments, expected.moments)
    assert torch.equal(data.labels, expected.labels)


def test_latents_move_to_the_device_when_they_fit(labelled, monkeypatch):
    data = load_data("features", labelled)
    assert data.to("meta").moments.device.type == "meta"
    monkeypatch.setattr("libs.data.feature_data.fits_on", lambda array, device: False)
    there = data.to("meta")
    rows, labels = there.batch(torch.tensor([1, 2]))
    assert (there.moments.device.type, rows.device.type, labels.device.type) == ("cpu", "meta", "meta")
    assert rows.shape == (2, *MOMENTS)


# ---- texts


def test_a_caption_is_drawn_of_each_images_own(captioned):
    data = load_data("features", captioned)
    assert data.has_text
    assert data.batch(torch.tensor([3]))[1] is None
    indices, draws = torch.tensor([3, 0, 3, 1, 3]), torch.tensor([0.999, 0.999, 0.26, 0.49, 1e-9], dtype=torch.float64)
    contexts = data.contexts(indices, draws)
    expected = [text(3, 3).astype(np.float16), text(0, 0), text(3, 1).astype(np.float16), text(1, 0), text(3, 0)]
    assert contexts.dtype == torch.float32
    assert torch.equal(contexts, torch.from_numpy(np.stack([each.astype(np.float32) for each in expected])))
    assert torch.equal(data.empty_context, torch.from_numpy(text(1000)))


def test_parts_and_prompts(captioned):
    data = load_data("features", captioned, split="test")
    assert torch.equal(data.batch(torch.tensor([0]))[0][0], torch.from_numpy(moments(99)))
    first, second = data.prompts
    assert first[0] == "a green train"
    assert torch.equal(second[1], torch.from_numpy(text(2001)))
    assert second[0] == "ünïcode"


def test_what_does_not_fit_the_network_is_told(captioned, labelled):
    data = load_data("features", captioned)
    data.check((4, 4, 4), TEXT)
    for shapes, line in {
        ((4, 8, 8),): "holds latents of 4x4x4 (channels, height, width); this network takes 4x8x8",
        ((3, 4, 4), TEXT): "holds latents of 4x4x4 (channels, height, width); this network takes 3x4x4",
        ((4, 4, 4), (5, 7)): "holds texts of 5x6 (tokens, width); this network takes 5x7",
    }.items():
        with pytest.raises(UserError) as caught:
            data.check(*shapes)
        assert str(caught.value) == f"data.path={str(captioned)!r} {line}"
    (captioned / "empty_context.npy").unlink()
    data = load_data("features", captioned)
    data.check((4, 4, 4))
    with pytest.raises(UserError, match=r"empty_context.npy, the empty text, is missing; python prepare_data.py text"):
        data.check((4, 4, 4), TEXT)
    for path in (captioned / "train").glob("*_*.npy"):
        path.unlink()
    with pytest.raises(UserError, match=r"has no captions \(\{i\}_\{k\}.npy\), which cond.kind='text' needs"):
        load_data("features", captioned).check((4, 4, 4), TEXT)


def test_refusals(tmp_path, labelled, captioned):
    refused("", "data.path is empty")
    refused(tmp_path / "nowhere", "is not a folder")
    (tmp_path / "none").mkdir()
    refused(tmp_path / "none", "there are no features (0.npy, 1.npy, ...)", "prepare_data.py latents")
    refused(tmp_path / "none", "data.split='test'", "has no folder val", split="test")
    write_feature(captioned / "train" / "7.npy", moments(7))
    refused(captioned, "1 of 5 images have no captions; the first: 7_0.npy")
    write_feature(captioned / "train" / "7_0.npy", text(7))
    write_feature(captioned / "train" / "7.npy", moments(7, (8, 8, 8)))
    refused(captioned, "train/7.npy holds moments of 8x8x8 without a label", "0.npy of 8x4x4 without a label")
    write_feature(captioned / "train" / "7.npy", moments(7), 3)
    refused(captioned, "train/7.npy holds moments of 8x4x4 with a label")
    for values in ([text(0)], [moments(0), -1], [moments(0), "cat"], [moments(0)[:7]], [np.zeros(MOMENTS, np.int64)]):
        write_feature(captioned / "train" / "0.npy", *values)
        refused(captioned, "train/0.npy ")
    assert kept(captioned / "train") == []
    write_feature(captioned / "val" / "0_0.npy", text(0, shape=(5, 7)))
    write_feature(captioned / "val" / "0_1.npy", text(0))
    data = load_data("features", captioned, split="test")
    with pytest.raises(UserError, match=r"0_1.npy holds a text of 5x6 \(tokens, width\), others have 5x7"):
        data.contexts(torch.tensor([0]), torch.tensor([0.9]))


def test_prompt_files_of_another_kind(tmp_path):
    with pytest.raises(UserError, match=r"^--prompts: there are no prompts"):
        read_prompt_features(tmp_path, "--prompts")
    write_feature(tmp_path / "0.npy", text(0))
    with pytest.raises(UserError, match=r"^--prompts: .*/0.npy holds no prompt with its hidden states"):
        read_prompt_features(tmp_path, "--prompts")


def test_latents_have_no_image_statistics(run_main, tmp_path, labelled):
    ran = run_main(prepare_data.main, "stats", "--config=configs/cifar10_uvit_tiny.py", f"--out={tmp_path}/a.npz",
                   "--config.data.name=features", f"--config.data.path={labelled}")
    assert (ran.status, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: data.name='features' holds latents; statistics are those of images")

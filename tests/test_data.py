"""Readers give the right pixels and labels, and refuse bad data in one line."""

import hashlib
import pickle

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from libs.data import ImageData, cache, load_data, pictures
from libs.data.folder import folder_batches
from libs.data.image_data import host_rows
from libs.data.images import image_grid, save_png
from libs.data.loaders import CIFAR10_CLASSES
from libs.errors import UserError
from libs.files import atomic_path


def write_image(path, size=(8, 8), color=(0, 0, 0), mode="RGB", **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path, **options)


# ---- digits


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    source = load_digits()
    data = load_data("digits", image_size=8, channels=1)
    assert data.images.shape == (1797, 8, 8, 1)
    assert data.images.dtype == torch.uint8
    assert (data.images.min(), data.images.max()) == (0, 255)
    # Every one of the 17 gray values can be told from the pixel.
    assert np.array_equal((data.images[..., 0].double() * 16 / 255).round().numpy(), source.images)
    assert data.labels.tolist() == source.target.tolist()
    assert data.class_names == tuple("0123456789")


def test_digits_have_one_shape_and_one_split():
    refused("data.image_size=16", "8x8", name="digits", image_size=16, channels=1)
    refused("data.channels=3", name="digits", image_size=8, channels=3)
    refused("data.split='test'", name="digits", image_size=8, channels=1, split="test")


def test_unknown_names_list_the_choices():
    refused("data.name='mnist'", "digits, cifar10, celeba, imagenet, coco, folder", name="mnist")
    refused("data.channels=4", "1, 3", name="folder", channels=4)
    refused("data.split='val'", "train, test", name="folder", split="val")
    refused("data.labels='names'", "none, folders", name="folder", labels="names")
    refused("data.image_size=0", name="folder", image_size=0)


# ---- CIFAR-10


def write_cifar10_folders(root, per_class=2):
    for label, name in enumerate(CIFAR10_CLASSES):
        for i in range(per_class):
            write_image(root / name / f"{i}.png", (32, 32), (label, i, 0))


@pytest.mark.parametrize("layout", ["train", "."])
def test_cifar10_folders(tmp_path, layout):
    write_cifar10_folders(tmp_path / layout)
    data = load_data("cifar10", tmp_path, cache=False)
    assert data.images.shape == (20, 32, 32, 3)
    assert data.labels.tolist() == [label for label in range(10) for _ in range(2)]
    assert torch.equal(data.images[:, 0, 0, 0].long(), data.labels)
    assert data.class_names[3] == "cat"


def test_cifar10_refuses_a_set_of_other_classes(tmp_path):
    refused("data.path", "cifar-10-batches-py", "data.download", name="cifar10", path=tmp_path)
    write_cifar10_folders(tmp_path)
    write_image(tmp_path / "zebra" / "0.png", (32, 32))
    refused("data.path", "zebra", name="cifar10", path=tmp_path)
    (tmp_path / "zebra" / "0.png").unlink()
    for file in (tmp_path / "dog").iterdir():
        file.unlink()
    refused("data.path", "class dog", name="cifar10", path=tmp_path)
    refused("data.split", name="folder", path=tmp_path, split="test")
    refused("data.image_size=64", "32x32", name="cifar10", path=tmp_path, image_size=64)


def test_cifar10_archive(tmp_path, monkeypatch):
    pytest.importorskip("torchvision")
    from torchvision.datasets import CIFAR10

    rng = np.random.default_rng(0)
    base = tmp_path / CIFAR10.base_folder
    base.mkdir()

    def write(name, content):
        (base / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((base / name).read_bytes()).hexdigest()

    pixels = rng.integers(0, 256, (2, 3, 32, 32), dtype=np.uint8)
    train = write("data_batch_1", {"data": pixels.reshape(2, -1), "labels": [9, 3]})
    test = write("test_batch", {"data": pixels[:1].reshape(1, -1), "labels": [5]})
    meta = write("batches.meta", {"label_names": list(CIFAR10_CLASSES)})
    monkeypatch.setattr(CIFAR10, "train_list", [list(train)])
    monkeypatch.setattr(CIFAR10, "test_list", [list(test)])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": meta[0], "key": "label_names", "md5": meta[1]})

    data = load_data("cifar10", tmp_path)
    assert np.array_equal(data.images.numpy(), pixels.transpose(0, 2, 3, 1))
    assert data.labels.tolist() == [9, 3]
    assert load_data("cifar10", tmp_path, split="test").labels.tolist() == [5]

    (base / "data_batch_1").write_bytes(b"damaged")
    refused("data.path", "CIFAR-10 cannot be read", name="cifar10", path=tmp_path)


def test_cifar10_damaged_archive_is_not_unpacked(tmp_path):
    pytest.importorskip("torchvision")
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"half a download")
    refused("data.path", "cifar-10-python.tar.gz is incomplete", name="cifar10", path=tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["cifar-10-python.tar.gz"]


# ---- image folders


def test_folder_crops_the_centre_and_resizes(tmp_path):
    pixels = np.zeros((16, 40, 3), np.uint8)
    pixels[:, :12] = (255, 0, 0)  # cut off
    pixels[:, 28:] = (0, 0, 255)  # cut off
    pixels[:, 12:28] = (10, 100, 200)
    Image.fromarray(pixels).save(tmp_path / "wide.png")
    data = load_data("folder", tmp_path, image_size=8)
    assert torch.equal(data.images, torch.tensor([10, 100, 200], dtype=torch.uint8).expand(1, 8, 8, 3))
    assert data.labels is None


def test_folder_resizes_with_antialiasing(tmp_path):
    stripes = np.zeros((64, 64), np.uint8)
    stripes[:, ::2] = 255  # finer than the small image can show: must become gray, not black or white
    Image.fromarray(stripes).save(tmp_path / "stripes.png")
    inner = load_data("folder", tmp_path, image_size=8, channels=1).images[:, :, 2:6].float()
    assert (inner - 127.5).abs().max() < 3


def test_folder_reads_every_format_sorted_and_recursive(tmp_path):
    for i, name in enumerate(["b/0.PNG", "a.jpg", "b/a/1.webp", "c.bmp", "d.jpeg"]):
        write_image(tmp_path / name, color=(40 * i,) * 3)
    write_image(tmp_path / ".hidden.png")
    (tmp_path / "notes.txt").write_text("no image")
    images = load_data("folder", tmp_path, image_size=8).images
    levels = images.float().mean((1, 2, 3)).div(40).round().tolist()
    assert levels == [1, 0, 2, 3, 4]  # a.jpg, b/0.PNG, b/a/1.webp, c.bmp, d.jpeg


def test_folder_color_modes(tmp_path):
    write_image(tmp_path / "0_gray.png", color=77, mode="L")
    write_image(tmp_path / "1_clear.png", color=(9, 9, 9, 0), mode="RGBA")
    Image.fromarray(np.full((8, 8), 0x8080, np.uint16)).save(tmp_path / "2_deep.png")
    images = load_data("folder", tmp_path, image_size=8).images
    assert images[:, 0, 0].tolist() == [[77] * 3, [255] * 3, [128] * 3]
    assert load_data("folder", tmp_path, image_size=8, channels=1).images.shape == (3, 8, 8, 1)


def test_folder_turns_photos_as_their_camera_says(tmp_path):
    image = Image.fromarray(np.array([[10, 20], [30, 40]], np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    images = load_data("folder", tmp_path, image_size=2, channels=1).images
    assert images[0, :, :, 0].tolist() == [[40, 30], [20, 10]]


def test_folder_labels_only_when_asked_for(tmp_path):
    write_image(tmp_path / "zoo" / "0.png")
    write_image(tmp_path / "art" / "deep" / "1.png")
    write_image(tmp_path / "art" / "2.png")
    assert load_data("folder", tmp_path, image_size=8).labels is None
    data = load_data("folder", tmp_path, image_size=8, labels="folders")
    assert data.class_names == ("art", "zoo")
    assert data.labels.tolist() == [0, 0, 1]
    write_image(tmp_path / "loose.png")
    refused("loose.png", "art, zoo", name="folder", path=tmp_path, image_size=8, labels="folders")


def test_folder_labels_need_class_folders(tmp_path):
    write_image(tmp_path / "0.png")
    refused("data.labels='folders'", name="folder", path=tmp_path, image_size=8, labels="folders")


def test_folder_splits(tmp_path):
    write_image(tmp_path / "train" / "0.png", color=(1, 1, 1))
    write_image(tmp_path / "test" / "0.png", color=(2, 2, 2))
    for level, split in (1, "train"), (2, "test"):
        assert load_data("folder", tmp_path, image_size=8, split=split).images.unique().tolist() == [level]


def test_folder_refusals(tmp_path):
    refused("data.path is empty", name="folder")
    refused("data.path", "missing", "not a folder", name="folder", path=tmp_path / "missing")
    refused("data.path", "no images", name="folder", path=tmp_path)
    write_image(tmp_path / "small.png", (31, 64))
    refused("data.image_size=32", "small.png", "31x64", name="folder", path=tmp_path, image_size=32)
    (tmp_path / "small.png").write_bytes(b"not an image")
    refused("data.path", "small.png", "cannot be read", name="folder", path=tmp_path, image_size=32)


def test_truncated_image_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(
        tmp_path / "a.png"
    )
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    refused("data.path", "a.png", "cannot be read", name="folder", path=tmp_path, image_size=32)


def test_reading_processes_give_the_same(tmp_path, monkeypatch):
    for i in range(7):
        write_image(tmp_path / f"{i}.png", color=(i, 2 * i, 3 * i))
    alone = load_data("folder", tmp_path, image_size=8, cache=False).images
    monkeypatch.setattr(pictures, "PARALLEL_FROM", 1)
    monkeypatch.setattr(pictures, "CHUNK_BYTES", 1)
    together = load_data("folder", tmp_path, image_size=8, cache=False, workers=2).images
    assert torch.equal(alone, together)
    (tmp_path / "3.png").write_bytes(b"not an image")
    refused("3.png", "cannot be read", name="folder", path=tmp_path, image_size=8, workers=2)


# ---- the stored copy


def stored_files(root):
    return sorted(path.name for path in root.iterdir() if path.name.startswith("."))


def test_second_read_takes_the_stored_copy(tmp_path, monkeypatch):
    for i in range(3):
        write_image(tmp_path / f"{i}.png", color=(i, 0, 0))
    first = load_data("folder", tmp_path, image_size=8).images
    with monkeypatch.context() as patch:
        patch.setattr(pictures, "decode", None)  # calling it would fail
        second = load_data("folder", tmp_path, image_size=8).images
    assert torch.equal(first, second)

    before = stored_files(tmp_path)
    write_image(tmp_path / "1.png", size=(9, 9), color=(100, 0, 0))
    assert load_data("folder", tmp_path, image_size=8).images[1, 0, 0, 0] == 100
    after = stored_files(tmp_path)
    assert len(before) == len(after) == 1
    assert before != after

    (tmp_path / after[0]).write_bytes(b"damaged")
    assert load_data("folder", tmp_path, image_size=8).images[1, 0, 0, 0] == 100


def test_stored_copies_of_two_sizes_live_together(tmp_path):
    write_image(tmp_path / "0.png")
    for size, channels in (8, 3), (4, 3), (8, 1):
        shape = load_data("folder", tmp_path, image_size=size, channels=channels).images.shape
        assert shape == (1, size, size, channels)
    assert len(stored_files(tmp_path)) == 3


def test_writing_into_a_batch_leaves_the_stored_copy_alone(tmp_path):
    write_image(tmp_path / "0.png")
    load_data("folder", tmp_path, image_size=8)
    load_data("folder", tmp_path, image_size=8).images.fill_(99)
    assert load_data("folder", tmp_path, image_size=8).images.max() == 0


def test_a_folder_that_cannot_be_written_is_read_all_the_same(tmp_path, monkeypatch):
    write_image(tmp_path / "0.png", color=(5, 5, 5))
    monkeypatch.setattr(cache.os, "access", lambda path, mode: False)
    assert load_data("folder", tmp_path, image_size=8).images.unique().tolist() == [5]
    assert stored_files(tmp_path) == []


# ---- batches


def some_data(n=6):
    images = torch.arange(n * 12, dtype=torch.uint8).view(n, 2, 2, 3)
    return ImageData(images, torch.arange(n) % 3, ("a", "b", "c"))


def test_batch_takes_rows_in_the_order_asked_for():
    data = some_data()
    images, labels = data.batch(torch.tensor([4, 1, 4]))
    assert torch.equal(images, data.images[[4, 1, 4]])
    assert labels.tolist() == [1, 1, 1]
    assert ImageData(data.images).batch(torch.tensor([0]))[1] is None
    assert len(data) == 6
    assert data.image_shape == (2, 2, 3)


def test_images_that_do_not_fit_stay_in_host_memory(monkeypatch):
    monkeypatch.setattr(ImageData, "fits_on", lambda self, device: False)
    data = some_data().to("meta")  # a second device that every machine has
    assert data.images.device.type == "cpu"
    images, labels = data.batch(torch.tensor([5, 0, 3]))
    assert images.device.type == labels.device.type == "meta"
    assert images.shape == (3, 2, 2, 3)
    rows = host_rows(data.images, torch.tensor([5, 0, 3]), torch.device("cpu"))
    assert torch.equal(rows, data.images[[5, 0, 3]])


def test_images_move_when_they_fit():
    data = some_data().to("meta")
    assert data.images.device.type == data.batch(torch.tensor([1]))[0].device.type == "meta"
    assert data.class_names == ("a", "b", "c")


def test_fits_on_leaves_room_for_the_model(monkeypatch):
    data = some_data()
    for free, fits in (data.images.nbytes, False), (10 * data.images.nbytes, True):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device, free=free: (free, 10**12))
        assert data.fits_on("cuda") is fits
    assert data.fits_on("cpu")


# ---- pictures and files


@pytest.mark.parametrize("channels", [1, 3])
def test_save_png_is_lossless(tmp_path, channels):
    image = torch.randint(
        0, 256, (5, 7, channels), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    save_png(tmp_path / "new" / "a.png", image)
    with Image.open(tmp_path / "new" / "a.png") as picture:
        assert np.array_equal(np.asarray(picture).reshape(5, 7, channels), image.numpy())
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.png"]


def test_save_png_refuses_in_one_line(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"cannot write .*a\.png"):
        save_png(tmp_path / "file" / "a.png", np.zeros((2, 2, 3), np.uint8))


@pytest.mark.parametrize(
    ("failure", "seen"), [(OSError(28, "No space left on device"), UserError), (KeyError("bug"), KeyError)]
)
def test_atomic_path_keeps_the_old_file_when_writing_fails(tmp_path, failure, seen):
    def write_half(path):
        with atomic_path(path) as temporary:
            temporary.write_text("ha")
            raise failure

    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(seen, match="No space left|bug"):
        write_half(target)
    assert target.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 1


def test_image_grid_places_images_row_by_row():
    images = torch.arange(1, 4, dtype=torch.uint8).view(3, 1, 1, 1).expand(3, 2, 2, 1)
    grid = image_grid(images, columns=2, pad=1)[..., 0]
    w = 255
    assert grid.tolist() == [
        [w, w, w, w, w, w, w],
        [w, 1, 1, w, 2, 2, w],
        [w, 1, 1, w, 2, 2, w],
        [w, w, w, w, w, w, w],
        [w, 3, 3, w, w, w, w],
        [w, 3, 3, w, w, w, w],
        [w, w, w, w, w, w, w],
    ]


def test_image_grid_upscales_pixels_to_squares():
    image = torch.tensor([[0, 50], [100, 150]], dtype=torch.uint8).view(1, 2, 2, 1)
    grid = image_grid(image, columns=4, pad=0, upscale=2)[..., 0]
    assert grid.tolist() == [[0, 0, 50, 50]] * 2 + [[100, 100, 150, 150]] * 2


def test_folder_batches_stream_in_order(tmp_path):
    for i in range(5):
        write_image(tmp_path / f"{i}.png", (6, 4), (i, i, i))
    batches = list(folder_batches(tmp_path, batch_size=2))
    assert [batch.shape for batch in batches] == [(2, 4, 6, 3), (2, 4, 6, 3), (1, 4, 6, 3)]
    assert torch.cat(batches)[:, 0, 0, 0].tolist() == [0, 1, 2, 3, 4]
    write_image(tmp_path / "5.png", (6, 5))
    with pytest.raises(UserError, match=r"--images: .*5\.png is 6x5 but the first image is 6x4"):
        list(folder_batches(tmp_path, batch_size=2, field="--images"))
    assert torch.cat(list(folder_batches(tmp_path, batch_size=4, image_size=4))).shape == (6, 4, 4, 3)

"""CelebA, ImageNet and MS-COCO as they are distributed: which images, which labels, which pixels."""

import io
import json
import multiprocessing
import time
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image
from refusals import refused

from libs.data import load_data, pictures
from libs.data.cache import cached_array
from libs.data.folder import centre
from libs.data.image_files import open_files
from libs.data.pictures import Pictures
from libs.data.raw import captioned, fit_coco, fit_imagenet, imagenet, read_captions
from libs.errors import UserError


def coordinates(width, height):
    """Each pixel says where it is: (x, y, 7)."""
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    return np.stack([x, y, np.full_like(x, 7)], -1).astype(np.uint8)


def png(pixels, **options):
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG", **options)
    return buffer.getvalue()


def gray(level, size=(8, 8)):
    return png(np.full((size[1], size[0], 3), level, np.uint8))


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def write_zip(path, files):
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)


def levels(data):
    return data.images.float().mean((1, 2, 3)).tolist()


# ---- CelebA


@pytest.fixture
def celeba(tmp_path):
    """Four images, PNG files under CelebA's names, so that pixels are exact; the last is a test image."""
    for number in (1, 2, 3, 4):
        pixels = coordinates(178, 218)
        pixels[..., 2] = number
        write(tmp_path / "img_align_celeba" / f"00000{number}.jpg", png(pixels))
    (tmp_path / "list_eval_partition.txt").write_text("000002.jpg 0\n000001.jpg 0\n000003.jpg 1\n000004.jpg 2\n")
    return tmp_path


def test_celeba_is_cut_at_its_columns_and_rows(celeba):
    data = load_data("celeba", celeba, image_size=128)
    assert data.images.shape == (2, 128, 128, 3)
    assert data.labels is None
    assert data.images[0, :, :, :2].equal(torch.from_numpy(coordinates(178, 218))[57:185, 25:153, :2])
    assert data.images[:, 0, 0, 2].tolist() == [2, 1]  # the order of the list
    assert load_data("celeba", celeba, image_size=128, split="test").images[:, 0, 0, 2].tolist() == [4]


def test_celeba_is_resized_as_torchvision_does_it(celeba):
    transforms = pytest.importorskip("torchvision.transforms.functional")
    pixels = np.random.default_rng(0).integers(0, 256, (218, 178, 3), dtype=np.uint8)
    write(celeba / "img_align_celeba" / "000002.jpg", png(pixels))
    expected = transforms.resize(transforms.crop(Image.fromarray(pixels), 57, 25, 128, 128), 64)
    assert np.array_equal(load_data("celeba", celeba, image_size=64).images[0], np.asarray(expected))


def test_celeba_in_kaggles_folders(celeba):
    expected = load_data("celeba", celeba, image_size=64, cache=False).images
    (celeba / "img_align_celeba").rename(celeba / "inner")
    (celeba / "celeba" / "img_align_celeba").mkdir(parents=True)
    (celeba / "inner").rename(celeba / "celeba" / "img_align_celeba" / "img_align_celeba")
    (celeba / "list_eval_partition.txt").unlink()
    rows = ["image_id,partition", "000002.jpg,0", "000001.jpg,0", "000004.jpg,2"]
    (celeba / "celeba" / "list_eval_partition.csv").write_text("\n".join(rows))
    assert load_data("celeba", celeba, image_size=64).images.equal(expected)


def test_celeba_refusals(celeba):
    refused("data.image_size=129", "128x128", name="celeba", path=celeba, image_size=129)
    write(celeba / "img_align_celeba" / "000001.jpg", png(coordinates(178, 219)[:, :, :]))
    refused("000001.jpg is 178x219", name="celeba", path=celeba, image_size=64)
    (celeba / "img_align_celeba" / "000001.jpg").unlink()
    refused("1 of the 2 train images that list_eval_partition.txt lists", "000001.jpg", name="celeba", path=celeba)
    (celeba / "list_eval_partition.txt").write_text("000002.jpg\n")
    refused("list_eval_partition.txt cannot be read", name="celeba", path=celeba)
    (celeba / "list_eval_partition.txt").write_text("000002.jpg 1\n")
    refused("lists no train images", name="celeba", path=celeba)
    (celeba / "list_eval_partition.txt").unlink()
    refused("holds no list_eval_partition.txt", name="celeba", path=celeba)


# ---- ImageNet


def imagenet_crop(pixels, size):
    return np.asarray(fit_imagenet(Image.fromarray(pixels), size, "x"))


def test_imagenet_is_halved_by_a_box_filter():
    pixels = np.random.default_rng(0).integers(0, 64, (32, 32, 3), dtype=np.uint8) * 4  # sums of four divide by four
    expected = pixels.reshape(16, 2, 16, 2, 3).astype(float).mean((1, 3))
    assert np.array_equal(imagenet_crop(pixels, 16), expected)


def test_imagenet_takes_the_centre_and_enlarges_what_is_small():
    wide = coordinates(60, 20)
    assert np.array_equal(imagenet_crop(wide, 20), wide[:, 20:40])
    resized = Image.fromarray(coordinates(60, 21)).resize((round(60 * 16 / 21), 16), Image.Resampling.BICUBIC)
    assert np.array_equal(imagenet_crop(coordinates(60, 21), 16), np.asarray(resized)[:, 15:31])
    assert imagenet_crop(coordinates(5, 7), 16).shape == (16, 16, 3)


@pytest.mark.parametrize("layout", ["{c}/{c}_{i}.JPEG", "{c}_{i}.JPEG", "train/{c}/x{i}.JPEG", "deep/er/{c}/{i}.JPEG"])
def test_imagenet_labels_are_places_among_the_sorted_classes(tmp_path, layout):
    for label, name in enumerate(["n01", "n02", "n10"]):
        for i in range(2):
            write(tmp_path / layout.format(c=name, i=i), gray(20 * label + i))
    data = load_data("imagenet", tmp_path, image_size=8)
    assert data.class_names == ("n01", "n02", "n10")
    assert data.labels.tolist() == [0, 0, 1, 1, 2, 2]
    assert levels(data) == [0, 1, 20, 21, 40, 41]
    assert data.labels.dtype == torch.int64


def test_imagenet_in_a_zip(tmp_path):
    write_zip(tmp_path / "a.zip", {f"train/{name}/{name}_{i}.JPEG": gray(i) for i, name in enumerate(["n02", "n01"])})
    found = imagenet(tmp_path / "a.zip", "train")
    assert found.class_names == ("n01", "n02")
    data = found.read(8, 3)
    assert (levels(data), data.labels.tolist()) == ([1, 0], [0, 1])


def test_imagenet_splits_and_strays(tmp_path):
    for folder, level in ("train", 1), ("val", 2):
        write(tmp_path / folder / "n01" / "a.JPEG", gray(level))
    assert levels(load_data("imagenet", tmp_path, image_size=8)) == [1]
    assert levels(load_data("imagenet", tmp_path, image_size=8, split="test")) == [2]
    refused("has no folder val or test", name="imagenet", path=tmp_path / "train", split="test")
    write(tmp_path / "train" / "stray.JPEG", gray(0))
    refused("train/stray.JPEG is unknown", "n01440764_10026.JPEG", name="imagenet", path=tmp_path, image_size=8)


def test_photos_of_published_data_sets_are_not_turned(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 3  # turned by 180 degrees
    write(tmp_path / "n01" / "a.JPEG", png(coordinates(8, 8), exif=exif))
    assert load_data("imagenet", tmp_path, image_size=8).images[0].equal(torch.from_numpy(coordinates(8, 8)))
    folder = load_data("folder", tmp_path, image_size=8).images[0]
    assert folder.equal(torch.from_numpy(coordinates(8, 8)).flip(0, 1))


# ---- MS-COCO


ANNOTATIONS = {  # images and captions in no order
    "images": [{"id": 30, "file_name": "COCO_train2014_30.jpg"}, {"id": 9, "file_name": "COCO_train2014_9.jpg"}],
    "annotations": [{"image_id": 9, "id": 5, "caption": "a cat"}, {"image_id": 30, "id": 1, "caption": "a dog"},
                    {"image_id": 9, "id": 2, "caption": "the cat"}],
}


@pytest.fixture
def coco(tmp_path):
    images = {"train2014/COCO_train2014_30.jpg": gray(30), "train2014/COCO_train2014_9.jpg": gray(9),
              "train2014/COCO_train2014_77.jpg": gray(77)}
    write_zip(tmp_path / "train2014.zip", images)
    val = json.dumps({"images": [{"id": 1, "file_name": "v.jpg"}], "annotations": [{"image_id": 1, "caption": "v"}]})
    write_zip(tmp_path / "annotations_trainval2014.zip",
              {"annotations/captions_train2014.json": json.dumps(ANNOTATIONS),
               "annotations/captions_val2014.json": val})
    write_zip(tmp_path / "val2014.zip", {"val2014/v.jpg": gray(100)})
    return tmp_path


def test_coco_from_its_zips(coco, monkeypatch):
    data = load_data("coco", coco, image_size=8)
    assert levels(data) == [9, 30]  # by id; what the captions do not name is left out
    assert levels(load_data("coco", coco, image_size=8, split="test")) == [100]
    captions = read_captions(coco / "annotations_trainval2014.zip", "train")
    assert captions == [("COCO_train2014_9.jpg", ["a cat", "the cat"]), ("COCO_train2014_30.jpg", ["a dog"])]
    assert len(list(coco.iterdir())) == 5  # nothing was extracted; a kept array of either zip
    monkeypatch.setattr(pictures, "decode", None)
    assert levels(load_data("coco", coco, image_size=8)) == [9, 30]


def test_coco_extracted(coco):
    for name in "train2014", "annotations_trainval2014":
        with zipfile.ZipFile(coco / f"{name}.zip") as archive:
            archive.extractall(coco)
        (coco / f"{name}.zip").unlink()
    assert levels(load_data("coco", coco, image_size=8)) == [9, 30]
    assert levels(load_data("coco", coco, image_size=8, split="test")) == [100]


def test_coco_images_are_cut_as_u_vit_does():
    pixels = np.random.default_rng(0).integers(0, 256, (33, 50, 3), dtype=np.uint8)
    expected = Image.fromarray(pixels[:, 8:41]).resize((16, 16), Image.Resampling.LANCZOS)
    assert np.array_equal(fit_coco(Image.fromarray(pixels), 16, "x"), expected)
    assert np.array_equal(centre(Image.fromarray(pixels), 16, "x"), expected)
    assert fit_coco(Image.fromarray(pixels), 64, "x").size == (64, 64)  # small images are enlarged


def test_zips_are_read_by_several_processes(coco, monkeypatch):
    monkeypatch.setattr(pictures, "PARALLEL_FROM", 1)
    monkeypatch.setattr(pictures, "CHUNK_BYTES", 1)
    assert levels(load_data("coco", coco, image_size=8, workers=2)) == [9, 30]


def test_coco_refusals(coco, tmp_path):
    write_zip(coco / "train2014.zip", {"train2014/COCO_train2014_9.jpg": b"no image", "a.txt": b""})
    refused("1 of 2 images", "are missing; the first: COCO_train2014_30.jpg", name="coco", path=coco, image_size=8)
    write_zip(coco / "train2014.zip", {"COCO_train2014_9.jpg": b"no image", "COCO_train2014_30.jpg": gray(1)})
    refused("train2014.zip/COCO_train2014_9.jpg cannot be read as an image", name="coco", path=coco, image_size=8)
    (coco / "train2014.zip").write_bytes(b"half a download")
    refused("cannot be read as a zip file", name="coco", path=coco, image_size=8)
    (coco / "train2014.zip").unlink()
    refused("holds none of train2014, train2014.zip", name="coco", path=coco)


@pytest.mark.parametrize(("content", "line"), [
    ("{}", "cannot be read as COCO's captions"),
    ("[", "cannot be read as COCO's captions"),
    ('{"images": [], "annotations": []}', "lists no images"),
    ('{"images": [{"id": 1, "file_name": "a"}], "annotations": []}', "has no captions of 1 images; the first: a"),
    ('{"images": [], "annotations": [{"image_id": 3, "caption": ""}]}', "cannot be read as COCO's captions"),
])
def test_captions_of_another_form(tmp_path, content, line):
    (tmp_path / "captions.json").write_text(content)
    with pytest.raises(UserError, match=line) as caught:
        read_captions(tmp_path / "captions.json", "train")
    assert str(caught.value).startswith(f"--captions: {tmp_path}/captions.json")
    assert "\n" not in str(caught.value)


def test_captions_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match="No such file"):
        read_captions(tmp_path / "captions.json", "train")
    write_zip(tmp_path / "a.zip", {"notes.txt": b""})
    with pytest.raises(UserError, match=r"a.zip/captions_val2014.json cannot be read"):
        read_captions(tmp_path / "a.zip", "test")


def test_images_that_captions_name_in_a_plain_folder(tmp_path):
    for name in "b", "a":
        write(tmp_path / "images" / f"{name}.png", gray(ord(name)))
    listed = {"images": [{"id": i, "file_name": f"{name}.png"} for i, name in enumerate("ba")],
              "annotations": [{"image_id": i, "caption": "x"} for i in range(2)]}
    (tmp_path / "captions.json").write_text(json.dumps(listed))
    found = captioned(tmp_path / "images", tmp_path / "captions.json", "train")
    assert levels(found.read(8, 3)) == [98, 97]
    with pytest.raises(UserError, match="--images='nowhere' is neither a folder nor a .zip file"):
        captioned("nowhere", tmp_path / "captions.json", "train")


# ---- what is kept


def test_the_kept_array_of_one_part_leaves_that_of_the_other(celeba):
    for split in "train", "test":
        load_data("celeba", celeba, image_size=64, split=split)
    assert len(list((celeba / "img_align_celeba").glob(".*.npy"))) == 2


@pytest.mark.parametrize("chunk", [1, 2 * 8 * 8 * 3, 1 << 20])
def test_a_stream_has_the_images_in_whole_batches_and_keeps_none(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(pictures, "CHUNK_BYTES", chunk)
    for level in range(7):
        write(tmp_path / f"{level}.png", gray(level))
    stream = load_data("folder", tmp_path, image_size=8, stream=True)
    batches = [batch.float().mean((1, 2, 3)).tolist() for batch in stream.batches(3)]
    assert (len(stream), batches) == (7, [[0, 1, 2], [3, 4, 5], [6]])
    assert not list(tmp_path.glob(".*"))
    assert levels(load_data("folder", tmp_path, image_size=8)) == [*range(7)]
    assert levels(load_data("folder", tmp_path, image_size=8, stream=True)) == [*range(7)]  # what is kept by now


def _make(path, log):
    def parts():
        with open(log, "a") as file:
            file.write("made\n")
        for row in range(4):
            time.sleep(0.1)
            yield np.full((1, 2), row, np.float32)

    assert cached_array(path, (4, 2), np.float32, parts())[:, 0].tolist() == [0, 1, 2, 3]


def test_of_processes_that_start_together_one_makes_the_array(tmp_path):
    left_over = tmp_path / "..images_1.npy.99999.tmp"  # of a process that was killed
    left_over.write_bytes(b"half")
    context = multiprocessing.get_context("fork")
    together = [context.Process(target=_make, args=(tmp_path / ".images_1.npy", tmp_path / "log")) for _ in range(3)]
    for process in together:
        process.start()
    for process in together:
        process.join()
    assert [process.exitcode for process in together] == [0, 0, 0]
    assert (tmp_path / "log").read_text() == "made\n"
    assert not left_over.exists()


def test_images_are_not_all_in_memory_while_they_are_stored(tmp_path):
    """Rows reach the file before the next ones are drawn."""
    seen = []

    def parts():
        for row in range(4):
            seen.append(sum(path.stat().st_size for path in tmp_path.glob("*.tmp")))
            yield np.full((1, 1 << 20), row, np.uint8)

    cached_array(tmp_path / ".images_1.npy", (4, 1 << 20), np.uint8, parts())
    assert seen[3] >= 2 << 20


def test_pictures_in_a_zip_know_when_the_zip_changes(tmp_path):
    for level in 1, 2:
        write_zip(tmp_path / "a.zip", {f"{i}.png": gray(level, (8, 8 + level)) for i in range(level)})
        files = open_files(tmp_path / "a.zip")
        assert levels(Pictures(files, files.names()).read(8, 3)) == [level] * level
    write_zip(tmp_path / "b.zip", {"a.txt": b""})
    with pytest.raises(UserError, match="b.zip' holds no images"):
        open_files(tmp_path / "b.zip").names()

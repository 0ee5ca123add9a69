"""CelebA, ImageNet and MS-COCO as they are distributed, cut and resized as in the works that report on them.

Photos are not turned as their camera says, since those works do not do it either, and small ones are enlarged.
"""

import csv
import json
from pathlib import Path

from PIL import Image

from ..errors import UserError
from ..files import reason
from .folder import centre_square
from .image_files import Folder, Zip, open_files
from .pictures import Pictures

CELEBA_BOX = (25, 57, 153, 185)  # left, top, right, bottom: columns 25 to 153, rows 57 to 185
CELEBA_SIZE = (178, 218)  # of an aligned image
CELEBA_SPLITS = {"train": "0", "test": "2"}  # 1 is the validation part
COCO_SPLITS = {"train": "train2014", "test": "val2014"}
COCO_CAPTIONS = "annotations_trainval2014.zip"


# ---- CelebA


def celeba(root: Path, split: str) -> Pictures:
    """Aligned CelebA: `img_align_celeba` and `list_eval_partition.txt` (torchvision's) or `.csv`, in `root` or in
    `root/celeba`; 162,770 images to train, 19,962 to test, in the order of the list.

    Raises UserError where something is missing, an image of the list too.
    """
    lists = [folder / f"list_eval_partition{suffix}" for folder in (root, root / "celeba")
             for suffix in (".txt", ".csv")]
    found = next((path for path in lists if path.is_file()), None)
    if found is None:
        raise UserError(f"data.path={str(root)!r} holds no list_eval_partition.txt (or .csv), which says what CelebA's "
                        "train and test images are")
    files = Folder(found.parent / "img_align_celeba")
    there = {name.rsplit("/", 1)[-1]: name for name in files.names()}  # Kaggle's copy has one more folder inside
    wanted = _partition(found, split)
    missing = [name for name in wanted if name not in there]
    if missing:
        raise UserError(f"data.path={str(root)!r}: {len(missing)} of the {len(wanted)} {split} images that "
                        f"{found.name} lists are not in {files.root}; the first: {missing[0]}")
    return Pictures(files, [there[name] for name in wanted], fit=fit_celeba, upright=False, kept_as=f"celeba_{split}")


def _partition(path: Path, split: str) -> list[str]:
    try:
        with open(path, newline="") as file:
            rows = list(csv.reader(file)) if path.suffix == ".csv" else [line.split() for line in file]
        names = [row[0] for row in rows if row and row[1] == CELEBA_SPLITS[split]]
    except (OSError, ValueError, IndexError, csv.Error) as error:
        raise UserError(f"data.path: {path} cannot be read as lines of an image and its part "
                        f"({getattr(error, 'strerror', None) or reason(error)})") from error
    if not names:
        raise UserError(f"data.path: {path} lists no {split} images")
    return names


def fit_celeba(image: Image.Image, size: int, where: str) -> Image.Image:
    """The square of 128 x 128 pixels around (x, y) = (89, 121), resized as torchvision does it (bilinear, antialiased).

    That is the cut of the reference statistics that U-ViT and DDIM are compared with.
    """
    if image.size != CELEBA_SIZE:
        raise UserError(f"data.path: {where} is {image.width}x{image.height}; the aligned images of CelebA are 178x218")
    side = CELEBA_BOX[2] - CELEBA_BOX[0]
    if size > side:
        raise UserError(f"data.image_size={size}: CelebA's faces are cut out at {side}x{side}, and images are not "
                        "enlarged")
    return image.crop(CELEBA_BOX).resize((size, size), Image.Resampling.BILINEAR)


# ---- ImageNet


def imagenet(path: Path, split: str, field: str = "data.path") -> Pictures:
    """ImageNet as class folders, or as one folder of files named `n01440764_10026.JPEG`; a zip of either, too.

    path: the images, or a folder in which `train` and `val` hold them.
    A label is the position of the class among the sorted names of the folders, or of what stands before the files'
    first "_".
    """
    for name in ("train",) if split == "train" else ("val", "test"):
        if (path / name).is_dir():
            path = path / name
            break
    else:
        if split != "train":
            raise UserError(f"data.split={split!r}: {path} has no folder val or test")
    files = open_files(path, field)
    names = files.names()
    classes = [_class_of(name) for name in names]
    if None in classes:
        stray = names[classes.index(None)]
        raise UserError(f"{field}: the class of {files.root}/{stray} is unknown: want class folders, or names such as "
                        "n01440764_10026.JPEG")
    class_names = sorted(set(classes))
    number = {name: i for i, name in enumerate(class_names)}
    return Pictures(files, names, [number[name] for name in classes], tuple(class_names), fit=fit_imagenet,
                    upright=False, kept_as="imagenet")


def _class_of(name: str) -> str | None:
    folder, _, file = name.rpartition("/")
    if folder:
        return folder.rsplit("/", 1)[-1]
    return file.partition("_")[0] if "_" in file else None


def fit_imagenet(image: Image.Image, size: int, where: str) -> Image.Image:
    """guided-diffusion's centre crop (2105.05233): halved by a box filter while twice the size fits, then bicubic."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))


# ---- MS-COCO


def coco(root: Path, split: str) -> Pictures:
    """MS-COCO 2014: `train2014.zip`, `val2014.zip` (the test images) and `annotations_trainval2014.zip`, not extracted.

    The folders `train2014`, `val2014` and `annotations`, or `captions_train2014.json` itself, do as well.
    """
    name = COCO_SPLITS[split]
    images = _first_of(root, name, f"{name}.zip")
    captions = _first_of(root, f"captions_{name}.json", f"annotations/captions_{name}.json", COCO_CAPTIONS)
    return captioned(images, captions, split, "data.path", "data.path")


def _first_of(root: Path, *names: str) -> Path:
    for name in names:
        if (root / name).exists():
            return root / name
    raise UserError(f"data.path={str(root)!r} holds none of {', '.join(names)}")


def captioned(images: Path, captions: Path, split: str, images_field: str = "--images",
              captions_field: str = "--captions") -> Pictures:
    """The images, in a folder or a zip, that captions in COCO's format name; they stand in the order of their id.

    captions: a .json file, or a zip with `captions_train2014.json` (or val, by `split`) in it.
    Raises UserError where an image of the captions' file is missing.
    """
    files = open_files(images, images_field)
    listed = read_captions(captions, split, captions_field)
    names = files.names()
    there = {name.rsplit("/", 1)[-1]: name for name in names} | {name: name for name in names}
    missing = [file for file, _ in listed if file not in there]
    if missing:
        raise UserError(f"{images_field}={str(images)!r}: {len(missing)} of {len(listed)} images that {captions} names "
                        f"are missing; the first: {missing[0]}")
    return Pictures(files, [there[file] for file, _ in listed], fit=fit_coco, upright=False, kept_as=f"coco_{split}")


def read_captions(path: Path, split: str, field: str = "--captions") -> list[tuple[str, list[str]]]:
    """(file name, captions in the order of the file) of each image of a COCO annotation file, by the images' id.

    path: a .json file, or a zip that holds `captions_{train2014 or val2014}.json`.
    Raises UserError, naming `field`, for a file that is missing or of another form, or an image without captions.
    """
    where = str(path)
    try:
        if path.suffix == ".zip":
            wanted = f"captions_{COCO_SPLITS[split]}.json"
            where = f"{path}/{wanted}"
            text = Zip(path, field).read_ending(wanted)
        else:
            text = path.read_bytes()
        content = json.loads(text)
        texts = {int(image["id"]): (str(image["file_name"]), []) for image in content["images"]}
        for annotation in content["annotations"]:
            texts[annotation["image_id"]][1].append(str(annotation["caption"]))
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError) as error:
        why = getattr(error, "strerror", None) or f"{type(error).__name__}: {reason(error)}"
        raise UserError(f"{field}: {where} cannot be read as COCO's captions, images with id and file_name and "
                        f"annotations with image_id and caption ({why})") from error
    listed = [texts[number] for number in sorted(texts)]
    if not listed:
        raise UserError(f"{field}: {where} lists no images")
    bare = [file for file, captions in listed if not captions]
    if bare:
        raise UserError(f"{field}: {where} has no captions of {len(bare)} images; the first: {bare[0]}")
    return listed


def fit_coco(image: Image.Image, size: int, where: str) -> Image.Image:
    """The centre square, resized (Lanczos), small images enlarged: U-ViT's cut (2209.12152)."""
    return centre_square(image).resize((size, size), Image.Resampling.LANCZOS)

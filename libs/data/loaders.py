"""Data sets by name: `load_data("cifar10", path, image_size=32, channels=3)`."""

import dataclasses
import tarfile
from collections.abc import Mapping
from pathlib import Path

import torch

from ..errors import UserError, choose
from ..factory import load_function
from ..files import reason
from .feature_data import FeatureData, read_features
from .folder import MODES
from .image_data import ImageData, hold_out
from .image_files import Folder
from .lmdb_images import read_lmdb
from .pictures import Pictures, PictureStream
from .raw import celeba, coco, imagenet
from .shard_cache import ShardCache, default_folder
from .shard_files import FolderShard, TarShard
from .shard_filters import at_least, present, read_maps
from .shard_urls import list_shards
from .shards import ShardData, open_shards
from .torch_dataset import read_dataset

# The order of CIFAR-10's own labels 0 to 9.
CIFAR10_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


@dataclasses.dataclass(frozen=True)
class DataRequest:
    """What `load_data` was asked for; each field is the config's `data.<field>`."""

    path: str
    image_size: int
    channels: int
    split: str
    labels: str
    download: bool
    cache: bool
    workers: int
    factory: str
    keys: str
    caption_key: str
    score_key: str
    min_score: float
    maps: str
    shard_cache: str
    shard_cache_gb: float


def load_data(
    name: str,
    path: str | Path = "",
    image_size: int = 32,
    channels: int = 3,
    split: str = "train",
    labels: str = "none",
    download: bool = False,
    cache: bool = True,
    workers: int = 0,
    factory: str = "",
    keys: str = "",
    caption_key: str = "caption",
    score_key: str = "aesthetic_score",
    min_score: float = 0.0,
    maps: str = "",
    shard_cache: str = "",
    shard_cache_gb: float = 50.0,
    stream: bool = False,
) -> ImageData | FeatureData | ShardData | PictureStream:
    """Read a data set into host memory, as uint8 images (n, image_size, image_size, channels), or the latents that
    stand in their place (name="features"); or index one whose images, with captions, are decoded when they are asked
    for (name="webdataset", "captioned_folder").

    name: one of READERS.
    path: folder of the data; `digits` and `factory` need none.
    split: "train" or "test"; for image folders a sub-folder of that name, where there is one.
    labels: for name="folder" only: "folders" makes each sub-folder a class (names sorted), "none" gives no
        labels. The other data sets bring their own.
    download: lets torchvision fetch CIFAR-10 into `path`.
    cache: keep decoded images in one hidden file beside the files they come from, for the next time.
    workers: processes that read image files, or threads that decode shards; 0 chooses by the number of cores.
    factory: for name="factory" only: "path/to/module.py:function", whose function returns a torch data set.

    For name="webdataset", whose `path` holds addresses as in shard_urls.py, and "captioned_folder":
    keys: extensions of files that each sample has to have, as in "json edge.png".
    caption_key: field of a sample's JSON that holds its caption.
    score_key, min_score: only samples whose JSON has `min_score` or more in this field; 0 takes all.
    maps: what is done with each sample before its image is cut and resized, as in shard_filters.py.
    shard_cache, shard_cache_gb: folder of fetched shards (default: in ~/.cache) and how much stays in it.

    stream: for who looks at the images once: files that were not decoded yet become a `PictureStream`.
    Raises UserError, naming the field, for everything that a user can get wrong.
    """
    reader = choose("data.name", name, READERS)
    choose("data.channels", channels, list(MODES))
    choose("data.split", split, ["train", "test"])
    choose("data.labels", labels, ["none", "folders"])
    if image_size < 1:
        raise UserError(f"data.image_size={image_size} must be at least 1")
    data = reader(DataRequest(str(path), image_size, channels, split, labels, download, cache, workers, factory,
                              keys, caption_key, score_key, min_score, maps, shard_cache, shard_cache_gb))
    if not isinstance(data, Pictures):
        return data
    if stream and not (cache and data.kept(image_size, channels).is_file()):
        return PictureStream(data, image_size, channels, workers)
    return data.read(image_size, channels, workers, cache)


def load_section(section: Mapping, stream: bool = False) -> ImageData | FeatureData | ShardData | PictureStream:
    """`load_data` of a config's `data` section, all of it: the section's `flip` and `hold_out` concern training."""
    fields = {name: value for name, value in section.items() if name not in ("flip", "hold_out")}
    return load_data(**fields, stream=stream)


def load_learned(section: Mapping) -> ImageData | FeatureData | ShardData:
    """What training learns from: a config's `data` section without every `hold_out`-th image."""
    data, every = load_section(section), section["hold_out"]
    return hold_out(data, every)[0] if every else data


def read_digits(request: DataRequest) -> ImageData:
    """scikit-learn's 1,797 handwritten digits, 8 x 8, gray values 0 to 16 spread to 0 to 255; one split."""
    from sklearn.datasets import load_digits

    _native_shape("digits", request, image_size=8, channels=1)
    _one_split("digits", request)
    digits = load_digits()
    images = torch.from_numpy(digits.images * (255 / 16)).round().to(torch.uint8)[..., None]  # n h w 1
    return ImageData(images, torch.from_numpy(digits.target).long(), tuple(map(str, range(10))))


def read_cifar10(request: DataRequest) -> ImageData | Pictures:
    """CIFAR-10 from torchvision's archive or from folders `[train/]airplane/*.png`; labels in its order."""
    _native_shape("cifar10", request, image_size=32, channels=3)
    root = _existing_folder(request, make=request.download)
    archive = any((root / name).exists() for name in ("cifar-10-batches-py", "cifar-10-python.tar.gz"))
    if not archive:
        folders = [root / request.split] + ([root] if request.split == "train" else [])
        for folder in folders:
            if any((folder / name).is_dir() for name in CIFAR10_CLASSES):
                return _class_folders(folder, CIFAR10_CLASSES)
    if archive or request.download:
        return _read_cifar10_archive(root, request)
    raise UserError(
        f"data.path={request.path!r} holds neither cifar-10-batches-py, cifar-10-python.tar.gz nor "
        f"class folders {request.split}/airplane ... truck; data.download=True fetches CIFAR-10 there"
    )


def read_image_folder(request: DataRequest) -> Pictures:
    """Any folder of images, centre-cropped and resized; labels only where the config asks for them."""
    root = _existing_folder(request)
    if (root / request.split).is_dir():
        root = root / request.split
    elif request.split != "train":
        raise UserError(f"data.split={request.split!r}: {root} has no folder of that name")
    if request.labels == "none":
        files = Folder(root)
        return Pictures(files, files.names())
    classes = {name.split("/")[0] for name in Folder(root).names() if "/" in name}
    if not classes:
        raise UserError(f"data.labels='folders', but the images of {root} lie in no class folders")
    return _class_folders(root, tuple(sorted(classes)))


def read_image_database(request: DataRequest) -> ImageData:
    """An LMDB as prepare_data.py and diffusion_distiller make it; it knows neither classes nor splits."""
    root = _existing_folder(request)
    _one_split("lmdb", request)
    if request.labels != "none":
        raise UserError(f"data.labels={request.labels!r}: an LMDB of images holds no labels; choose none")
    return ImageData(read_lmdb(root, request.image_size, request.channels, request.workers, request.cache))


def read_factory(request: DataRequest) -> ImageData:
    """The torch data set of (image, label) that a function of the user's own returns; see torch_dataset.py."""
    _one_split("factory", request)
    field = f"data.factory={request.factory!r}"
    dataset = load_function("data.factory", request.factory)()
    return ImageData(*read_dataset(dataset, field, request.image_size, request.channels, request.workers))


def read_celeba(request: DataRequest) -> Pictures:
    """CelebA's aligned faces, cut out as in the works that report on them; no labels."""
    return celeba(_existing_folder(request), request.split)


def read_imagenet(request: DataRequest) -> Pictures:
    """ImageNet with guided-diffusion's centre crop; classes by folders or by the files' names."""
    return imagenet(_existing_folder(request), request.split)


def read_coco(request: DataRequest) -> Pictures:
    """MS-COCO 2014 from its zip files; its test images are val2014."""
    return coco(_existing_folder(request), request.split)


def read_feature_files(request: DataRequest) -> FeatureData:
    """Latents and text features as prepare_data.py latents, prepare_data.py text and U-ViT write them."""
    return read_features(_existing_folder(request), request.split, request.cache)


def read_webdataset(request: DataRequest) -> ShardData:
    """Tar files of images with captions, local or fetched, in random access; see shards.py."""
    cache = _shard_cache(request)
    return _open_shards(request, [TarShard(address, cache) for address in list_shards(request.path)])


def read_captioned_folder(request: DataRequest) -> ShardData:
    """A folder of images with their captions beside them, `a.png` with `a.txt` or `a.json`, as one shard."""
    return _open_shards(request, [FolderShard(_existing_folder(request), _shard_cache(request))])


READERS = {"digits": read_digits, "cifar10": read_cifar10, "celeba": read_celeba, "imagenet": read_imagenet,
           "coco": read_coco, "folder": read_image_folder, "lmdb": read_image_database, "factory": read_factory,
           "features": read_feature_files, "webdataset": read_webdataset, "captioned_folder": read_captioned_folder}


def _shard_cache(request: DataRequest) -> ShardCache:
    if request.shard_cache_gb < 0:
        raise UserError(f"data.shard_cache_gb={request.shard_cache_gb} must be at least 0")
    folder = Path(request.shard_cache).expanduser() if request.shard_cache else default_folder()
    return ShardCache(folder, request.shard_cache_gb * 1e9)


def _open_shards(request: DataRequest, shards: list[TarShard] | list[FolderShard]) -> ShardData:
    """The samples with a score that is high enough. All of a data set's samples are its one split."""
    _one_split("a data set with captions", request)
    filters = [present(*request.keys.split())]
    if request.min_score:
        filters.append(at_least(request.score_key, request.min_score))
    field = f"data.path={request.path!r}" + f" (data.min_score={request.min_score:g})" * bool(request.min_score)
    return open_shards(shards, request.image_size, request.channels, filters, read_maps(request.maps),
                       request.caption_key, request.workers, request.cache, field)


def _one_split(name: str, request: DataRequest) -> None:
    if request.split != "train":
        raise UserError(f"data.split={request.split!r}: {name} has one split, train")


def _native_shape(name: str, request: DataRequest, image_size: int, channels: int) -> None:
    if request.image_size != image_size:
        raise UserError(
            f"data.image_size={request.image_size}: {name} has images of {image_size}x{image_size}"
        )
    if request.channels != channels:
        raise UserError(f"data.channels={request.channels}: {name} has {channels}")


def _existing_folder(request: DataRequest, make: bool = False) -> Path:
    if not request.path:
        raise UserError("data.path is empty; it must name the folder of the images")
    root = Path(request.path).expanduser()
    if not root.is_dir() and not make:
        raise UserError(f"data.path={request.path!r} is not a folder")
    return root


def _class_folders(root: Path, classes: tuple[str, ...]) -> Pictures:
    """Images of `root/{class}/`, label = position in `classes`."""
    files = Folder(root)
    names = files.names()
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers.get(name.split("/")[0]) for name in names]
    if None in labels:
        stray = root / names[labels.index(None)]
        raise UserError(f"data.path: {stray} lies in none of the class folders {', '.join(classes)}")
    present = set(labels)
    empty = [name for name in classes if numbers[name] not in present]
    if empty:
        raise UserError(f"data.path={str(root)!r} has no images of the class {', '.join(empty)}")
    return Pictures(files, names, labels, classes)


def _read_cifar10_archive(root: Path, request: DataRequest) -> ImageData:
    """torchvision's copy; torchvision compares the files' checksums before it reads them."""
    try:
        from torchvision.datasets import CIFAR10
    # A torchvision that was built for another torch fails in any of these ways.
    except (ImportError, RuntimeError, OSError) as error:
        raise UserError(
            f"data.path={request.path!r} needs torchvision, which does not import ({reason(error)}); "
            "install one that fits torch, or give an image folder"
        ) from error
    try:
        _unpack_cifar10(root, CIFAR10)
        data = CIFAR10(root, train=request.split == "train", download=request.download)
    except (RuntimeError, OSError, tarfile.TarError) as error:
        raise UserError(f"data.path={request.path!r}: CIFAR-10 cannot be read ({reason(error)})") from error
    return ImageData(torch.from_numpy(data.data), torch.tensor(data.targets), CIFAR10_CLASSES)


def _unpack_cifar10(root: Path, cifar10: type) -> None:
    """Unpack an archive that was put there by hand; torchvision itself does so only when told to download."""
    archive = root / cifar10.filename
    if archive.exists() and not (root / cifar10.base_folder).exists():
        from torchvision.datasets.utils import check_integrity

        if not check_integrity(archive, cifar10.tgz_md5):
            raise RuntimeError(f"{archive.name} is incomplete or damaged")
        with tarfile.open(archive) as tar:
            tar.extractall(root, filter="data")

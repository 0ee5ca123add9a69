"""Captions in text files beside the images, or in webdataset shards, into one file in COCO's format.

    python -m libs.data.caption_files --images=data/emoji64 --out=data/emoji64/captions.json
    python -m libs.data.caption_files --shards=data/emoji64.tar --out=data/captions.json

`00000.txt` holds the captions of `00000.png`, one a line; those of shards may be in a json as well. prepare_data.py and
sample.py --prompts read the file.
"""

import json
import sys
from collections.abc import Iterable
from pathlib import Path

from absl import flags as absl_flags
from absl import logging

from .. import cli
from ..errors import UserError
from ..files import atomic_path, reason, require_json
from .image_files import list_images
from .shard_cache import CACHE_BYTES, ShardCache, default_folder
from .shard_files import LeftOut, TarShard
from .shard_index import read_texts
from .shard_urls import list_shards
from .shards import used_samples


def coco_captions(root: Path, field: str = "--images") -> dict[str, list[dict]]:
    """The images below `root`, sorted, their ids counted from 0, and their captions in the order of the lines.

    Raises UserError, naming `field`, for an image whose text file is missing, empty or unreadable.
    """
    listed = []
    for name in list_images(root, field):
        path = (root / name).with_suffix(".txt")
        try:
            captions = [" ".join(line.split()) for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{field}={root}: the captions of {name} cannot be read from {path} "
                            f"({getattr(error, 'strerror', None) or reason(error)})") from error
        if not captions:
            raise UserError(f"{field}={root}: {path} holds no caption of {name}")
        listed.append((name, captions))
    return _in_cocos_format(listed)


def shard_captions(addresses: str, field: str = "--shards", caption_key: str = "caption") -> dict[str, list[dict]]:
    """The images of the shards at `addresses` (libs/data/shard_urls.py), their ids counted from 0, and their captions.

    caption_key: field of a sample's json. Samples without a caption, or with an image that cannot be read, are left out
    and told. Raises UserError, naming `field`, where none is left and for a shard that cannot be had.
    """
    cache, left_out, listed = ShardCache(default_folder(), CACHE_BYTES, field), LeftOut(), []
    shards = [TarShard(address, cache) for address in list_shards(addresses, field)]
    for shard, index in zip(shards, used_samples(shards, left_out, caption_key=caption_key, field=field), strict=True):
        with shard.reading() as read:
            listed += [(f"{sample.key}.{sample.image}", read_texts(read, sample.members, caption_key)[0])
                       for sample in index.samples]
    for line in left_out.lines():
        logging.warning("left out: %s", line)
    return _in_cocos_format(listed)


def _in_cocos_format(listed: Iterable[tuple[str, list[str]]]) -> dict[str, list[dict]]:
    """Of (file name, captions) of each image."""
    images, annotations = [], []
    for number, (name, captions) in enumerate(listed):
        images.append({"id": number, "file_name": name})
        annotations += [{"id": len(annotations) + k, "image_id": number, "caption": caption}
                        for k, caption in enumerate(captions)]
    return {"images": images, "annotations": annotations}


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("images", None, "folder of images, each with a text file of its name", flag_values=fv)
    absl_flags.DEFINE_string("shards", None, "instead of it: shards, by their addresses", flag_values=fv)
    absl_flags.DEFINE_string("caption_key", "caption", "field of a shard's json", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "file to write (.json)", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def collect(config, flags) -> None:
    require_json(flags.out)
    if (flags.images is None) == (flags.shards is None):
        raise UserError("--images or --shards is missing, or both are given; give one of them")
    if flags.shards is not None:
        content = shard_captions(flags.shards, caption_key=flags.caption_key)
    else:
        content = coco_captions(Path(flags.images).expanduser())
    with atomic_path(flags.out) as temporary:
        temporary.write_text(json.dumps(content))
    logging.info("%s: %d captions of %d images", flags.out, len(content["annotations"]), len(content["images"]))


def main(argv: list[str] | None = None) -> int:
    return cli.run(collect, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

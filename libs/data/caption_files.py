"""Captions in text files beside the images, as webdatasets unpack, into one file in COCO's format.

    python -m libs.data.caption_files --images=data/emoji64 --out=data/emoji64/captions.json

`00000.txt` holds the captions of `00000.png`, one a line. prepare_data.py and sample.py --prompts read the file.
"""

import json
import sys
from pathlib import Path

from absl import flags as absl_flags
from absl import logging

from .. import cli
from ..errors import UserError
from ..files import atomic_path, reason
from .image_files import list_images


def coco_captions(root: Path, field: str = "--images") -> dict[str, list[dict]]:
    """The images below `root`, sorted, their ids counted from 0, and their captions in the order of the lines.

    Raises UserError, naming `field`, for an image whose text file is missing, empty or unreadable.
    """
    images, annotations = [], []
    for number, name in enumerate(list_images(root, field)):
        path = (root / name).with_suffix(".txt")
        try:
            captions = [" ".join(line.split()) for line in path.read_text("utf-8").splitlines() if line.strip()]
        except (OSError, ValueError) as error:
            raise UserError(f"{field}={root}: the captions of {name} cannot be read from {path} "
                            f"({getattr(error, 'strerror', None) or reason(error)})") from error
        if not captions:
            raise UserError(f"{field}={root}: {path} holds no caption of {name}")
        images.append({"id": number, "file_name": name})
        annotations += [{"id": len(annotations) + k, "image_id": number, "caption": caption}
                        for k, caption in enumerate(captions)]
    return {"images": images, "annotations": annotations}


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("images", None, "folder of images, each with a text file of its name", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "file to write (.json)", flag_values=fv)
    absl_flags.mark_flags_as_required(["images", "out"], fv)


def collect(config, flags) -> None:
    if not flags.out.endswith(".json"):
        raise UserError(f"--out={flags.out} must end in .json")
    content = coco_captions(Path(flags.images).expanduser())
    with atomic_path(flags.out) as temporary:
        temporary.write_text(json.dumps(content))
    logging.info("%s: %d captions of %d images", flags.out, len(content["annotations"]), len(content["images"]))


def main(argv: list[str] | None = None) -> int:
    return cli.run(collect, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

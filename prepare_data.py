"""Get data ready, once, before training or evaluation.

    python prepare_data.py stats --config=configs/cifar10_uvit_tiny.py --out=assets/features/cifar10_train_stats.npz
    python prepare_data.py stats --images=DIR --features=inception --out=outputs/fid_stats.npz
    python prepare_data.py lmdb --size=256 --out=data/celeba_256 DIR
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags as absl_flags

from libs import cli
from libs.data import load_data
from libs.data.folder import list_images
from libs.data.lmdb_images import RESAMPLE, pack_images
from libs.defaults import base_config
from libs.errors import UserError
from libs.metrics import EXTRACTORS, make_extractor
from libs.metrics.statistics import reference_statistics


def define_stats_flags(fv) -> None:
    absl_flags.DEFINE_enum("features", "cifar10_resnet", list(EXTRACTORS), "kind of features", flag_values=fv)
    absl_flags.DEFINE_string("images", None, "folder of images, instead of the config's data set", flag_values=fv)
    absl_flags.DEFINE_string("inception_weights", None, "file of FID's network; else fetched", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 256, "images at a time", lower_bound=1, flag_values=fv)
    absl_flags.DEFINE_string("out", None, "file to write (.npz)", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def stats(config, flags) -> None:
    """Write the feature statistics (mu, sigma, n) of a data set or an image folder, for eval.reference.

    The images are those of the config's data section (--config.data.path=DIR), or of --images with pixels as they
    are. FID's convention is the config's eval.fid_mode.
    """
    if not flags.out.endswith(".npz"):
        raise UserError(f"--out={flags.out} must end in .npz")
    if config is None and flags.images is None:
        raise UserError("give --config, whose data set is read, or --images=DIR")
    if flags.images is None and "data" not in config:
        raise UserError(f"--config={flags.config}: a pipeline has no data set; give --images=DIR")
    cli.output_dir(Path(flags.out).parent)
    if flags.images is None:
        source = load_data(**{name: value for name, value in config.data.items() if name != "flip"})
    else:
        source = flags.images
        list_images(source, "--images")
    settings = config or base_config()
    options = {"weights": flags.inception_weights, "mode": settings.eval.fid_mode}
    extractor = make_extractor(flags.features, device=cli.choose_device(settings.compute.device),
                               **(options if flags.features == "inception" else {}))
    statistics = reference_statistics(source, extractor, flags.batch_size, field="--images")
    statistics.save(flags.out, np.float32)  # changes a distance by less than 1e-6, at half the size
    print(f"{flags.out}: mu and sigma of {statistics.n:,} images, {statistics.dim} features of {statistics.features}")


def define_lmdb_flags(fv) -> None:
    absl_flags.DEFINE_string("images", None, "folder of images; --images= may be left out", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "folder of the database", flag_values=fv)
    absl_flags.DEFINE_string("size", "128,256,512,1024", "width and height of the images; one size or several",
                             flag_values=fv)
    absl_flags.DEFINE_enum("resample", "lanczos", list(RESAMPLE), "filter of the resizing", flag_values=fv)
    absl_flags.DEFINE_integer("n_worker", 8, "processes, at most one a core", lower_bound=1, flag_values=fv)
    absl_flags.mark_flags_as_required(["images", "out"], fv)


def pack_lmdb(config, flags) -> None:
    """Pack a folder of images into an LMDB of JPEG files, for data.name=lmdb (diffusion_distiller's format).

    Sub-folders are searched too. The short side is resized to --size and the centre is cut out; images that cannot be
    read or are smaller are skipped, and named at the end. The same command goes on where it was stopped; another
    --size is added to a finished database.
    """
    sizes = _sizes(flags.size)
    list_images(flags.images, "--images")  # before a folder is made
    record = pack_images(flags.images, cli.output_dir(flags.out), sizes, flags.resample, flags.n_worker)
    print(f"{flags.out}: {record.length:,} images at each of {', '.join(map(str, record.finished))}, "
          f"{len(record.skipped):,} skipped")
    for _, why in record.skipped:
        print(f"skipped {why}")


def _sizes(text: str) -> list[int]:
    parts = [part.strip() for part in text.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts):
        raise UserError(f"--size={text}: want whole numbers, as in 128,256")
    return sorted({int(part) for part in parts})


COMMANDS = {"stats": cli.Command(stats, define_stats_flags, "optional"),
            "lmdb": cli.Command(pack_lmdb, define_lmdb_flags, positional="images")}


def main(argv: list[str] | None = None) -> int:
    return cli.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())

"""Get data ready, once, before training or evaluation.

    python prepare_data.py stats --config=configs/cifar10_uvit_tiny.py --out=assets/features/cifar10_train_stats.npz
    python prepare_data.py stats --images=DIR --features=inception --out=outputs/fid_stats.npz
"""

import sys
from pathlib import Path

import numpy as np
from absl import flags as absl_flags

from libs import cli
from libs.data import load_data
from libs.data.folder import list_images
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


COMMANDS = {"stats": cli.Command(stats, define_stats_flags, "optional")}


def main(argv: list[str] | None = None) -> int:
    return cli.run_command(COMMANDS, argv, __doc__)


if __name__ == "__main__":
    sys.exit(main())

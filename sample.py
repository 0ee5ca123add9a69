"""Images from seeds: one PNG a seed and grid.png, or one npz.

    python sample.py --config=configs/cifar10_uvit_tiny.py --seeds=0-63 --out=outputs/uvit_tiny
    python sample.py --config=configs/cifar10_unet.py --seeds=0-9 --labels=3 --config.sampler.steps=20 \\
        --config.sampler.name=dpm_solver_pp --out=outputs/cats

The same seed gives the same image in any batch. The same command again makes only what is missing.
"""

import sys

import numpy as np
import torch
from absl import flags as absl_flags
from absl import logging
from accelerate import PartialState
from tqdm import tqdm

from libs import build, cli
from libs.data.files import atomic_path
from libs.data.images import image_grid, save_png
from libs.errors import UserError
from libs.image_folder import ImageFolder, fingerprint
from libs.seeds import parse_labels, parse_seeds

GRID = 100  # images in grid.png at most


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("seeds", "0-15", "seeds of the images: 0-63 or 1,5,7-9", flag_values=fv)
    absl_flags.DEFINE_string("labels", None, "classes, given to the seeds in turn: 3 or 0-9", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 0, "images written at a time; 0 is compute.rows", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_string("out", "outputs/samples", "folder, or a file that ends in .npz", flag_values=fv)


def sample(config, flags) -> None:
    seeds = parse_seeds(flags.seeds)
    if flags.batch_size < 0:
        raise UserError(f"--batch_size={flags.batch_size} must be at least 1")
    as_npz = flags.out.endswith(".npz")
    device = cli.choose_device(config.compute.device)
    chain, source = build.load_chain(config, flags.checkpoint, device, flags.overrides)
    labels = parse_labels(flags.labels, seeds, chain.num_classes)
    folder = ImageFolder(cli.output_dir(f"{flags.out}.parts" if as_npz else flags.out),
                         fingerprint(config, source, labels_rule=flags.labels))

    state = PartialState()
    label_of = dict(zip(seeds, labels or [None] * len(seeds), strict=True))
    with state.split_between_processes(folder.missing(seeds)) as own:
        own_labels = None if labels is None else [label_of[seed] for seed in own]
        progress = tqdm(total=len(own), unit="image", disable=not state.is_main_process)
        for batch, images in chain.images(own, own_labels, flags.batch_size or None):
            folder.save(batch, images)
            progress.update(len(batch))
        progress.close()
    state.wait_for_everyone()
    if not state.is_main_process:
        return
    if as_npz:
        with atomic_path(flags.out) as temporary, open(temporary, "wb") as file:
            np.savez(file, images=folder.load(seeds).numpy(), seeds=seeds, labels=labels or [])
        folder.remove()
    else:
        columns = 10 if chain.num_classes == 10 and flags.labels is None else 8
        images = folder.load(seeds[:GRID])
        save_png(folder.path / "grid.png", image_grid(images, columns, upscale=max(1, 32 // images.shape[1])))
    logging.info("%d images of %d evaluations each in %s", len(seeds), chain.nfe, flags.out)


def main(argv: list[str] | None = None) -> int:
    return cli.run(sample, define_flags, argv)


if __name__ == "__main__":
    torch.set_float32_matmul_precision("highest")
    sys.exit(main())

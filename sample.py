"""Images from seeds: one PNG a seed with grid.png and summary.json, or one npz (and its json).

    python sample.py --config=configs/cifar10_uvit_tiny.py --seeds=0-63 --out=outputs/uvit_tiny
    python sample.py --config=configs/cifar10_unet.py --seeds=0-9 --labels=3 --config.sampler.steps=20 \\
        --config.sampler.name=dpm_solver_pp --out=outputs/cats

The same seed gives the same image in any batch. The same command again makes only what is missing.
"""

import json
import sys
from pathlib import Path

import numpy as np
from absl import flags as absl_flags
from absl import logging
from tqdm import tqdm

from libs import build, cli
from libs.cost import gmacs_per_image
from libs.data.images import image_grid, save_png
from libs.errors import UserError
from libs.files import atomic_path
from libs.image_folder import ImageFolder, fingerprint
from libs.processes import Processes
from libs.seeds import parse_labels, parse_seeds

GRID = 100  # images in grid.png at most


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("seeds", "0-15", "seeds of the images: 0-63 or 1,5,7-9", flag_values=fv)
    absl_flags.DEFINE_string("labels", None, "classes, given to the seeds in turn: 3 or 0-9", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 0, "images written at a time; 0 is compute.rows", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_bool("cost", False, "count multiply-adds, by sampling one more image", flag_values=fv)
    absl_flags.DEFINE_string("out", "outputs/samples", "folder, or a file that ends in .npz", flag_values=fv)


def sample(config, flags) -> None:
    seeds = parse_seeds(flags.seeds)
    if flags.batch_size < 0:
        raise UserError(f"--batch_size={flags.batch_size} must be at least 1")
    as_npz = flags.out.endswith(".npz")
    out = cli.output_dir(f"{flags.out}.parts" if as_npz else flags.out)
    processes = Processes(cli.choose_device(config.compute.device))
    chain, checkpoint = build.load_chain(config, flags.checkpoint, processes.device, flags.overrides)
    labels = parse_labels(flags.labels, seeds, chain.num_classes)
    folder = ImageFolder(out, fingerprint(config, checkpoint, flags.labels))

    own = folder.missing(processes.share(seeds, chain.rows))
    own_labels = parse_labels(flags.labels, own, chain.num_classes)
    with tqdm(total=len(own), unit="image", disable=not processes.is_main) as progress:
        for batch, images in chain.images(own, own_labels, flags.batch_size or None):
            folder.save(batch, images)
            progress.update(len(batch))
    seconds = progress.format_dict["elapsed"]
    made = sum(processes.gather(len(own)))  # by now all images are there
    if processes.is_main:
        if own:
            summary = {"model": Path(flags.checkpoint or config.checkpoint).name,
                       "sampler": config.sampler.name, "nfe": chain.nfe, "cfg_scale": chain.cfg_scale,
                       "images": made, "processes": processes.count, "seconds_per_image": seconds / made}
            if flags.cost:
                summary["gmacs_per_image"] = gmacs_per_image(chain, own[:1], labels and own_labels[:1])
            path = Path(flags.out).with_suffix(".json") if as_npz else out / "summary.json"
            with atomic_path(path) as temporary:
                temporary.write_text(json.dumps(summary, indent=1))
        if as_npz:
            with atomic_path(flags.out) as temporary, open(temporary, "wb") as file:
                np.savez(file, images=folder.load(seeds).numpy(), seeds=seeds, labels=labels or [])
            folder.remove()
        else:
            images = folder.load(seeds[:GRID])
            columns = 10 if chain.num_classes == 10 and flags.labels is None else 8
            save_png(out / "grid.png", image_grid(images, columns, upscale=max(1, 32 // images.shape[1])))
        logging.info("%d images of %d evaluations each: %s", len(seeds), chain.nfe, flags.out)
    processes.close()


def main(argv: list[str] | None = None) -> int:
    return cli.run(sample, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

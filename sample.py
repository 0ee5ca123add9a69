"""Images from seeds: one PNG a seed with grid.png and summary.json, or one npz (and its json).

    python sample.py --config=configs/cifar10_uvit_tiny.py --seeds=0-63 --out=outputs/uvit_tiny
    python sample.py --config=configs/cifar10_unet.py --seeds=0-9 --labels=3 --config.sampler.steps=20 \\
        --config.sampler.name=dpm_solver_pp --out=outputs/cats
    python sample.py --config=configs/mscoco_uvit_small.py --checkpoint=data/pretrained/mscoco_uvit_small.pth \\
        --prompts=prompts.txt --out=outputs/mscoco
    python sample.py --config=configs/cifar10_super_resolution.py --checkpoint=runs/super_resolution \\
        --images=photos --seeds=0-15 --out=outputs/super_resolution
    python sample.py --config=configs/sd15.py:encoder_propagation --prompts="a photo of an astronaut" --seeds=0-3 \\
        --out=outputs/sd15 --compare
    python sample.py --config=configs/sd15.py --checkpoint=runs/flash_sd15 --prompts="a photo of an astronaut" \\
        --seeds=0-3 --out=outputs/flash_sd15

The same seed gives the same image in any batch. The same command again makes only what is missing. --captures=5
adds montage.png: the first seeds' states at five times, from noise to image. Seed i shows prompt i modulo their
number, and so with the images of --images, of which a model of images makes its conditions; its grid.png has condition,
image and original side by side. --compare times the plain pipeline against the accelerated one and writes compare.json
and compare.png (left plain, right accelerated).
"""

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
from libs.files import atomic_path, write_json
from libs.image_folder import ImageFolder, fingerprint
from libs.montage import capture_indices, captures, montage
from libs.processes import Processes
from libs.seeds import parse_labels, parse_seeds

GRID = 100  # images in grid.png at most
COLUMNS = 16  # images in montage.png at most


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("seeds", "0-15", "seeds of the images: 0-63 or 1,5,7-9", flag_values=fv)
    absl_flags.DEFINE_string("labels", None, "classes, given to the seeds in turn: 3 or 0-9", flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "a text, a file with one a line, COCO's .json, or a folder of "
                             "run_vis features", flag_values=fv)
    absl_flags.DEFINE_string("fields", None, "what else a model's conditions are made of: \"aesthetic_score=6.5; "
                             "edges=drawings\", numbers or images", flag_values=fv)
    absl_flags.DEFINE_string("images", None, "folder of images to make conditions of, for super-resolution, inpainting",
                             flag_values=fv)
    absl_flags.DEFINE_string("control_image", None, "a ControlNet's image, or a folder of them", flag_values=fv)
    absl_flags.DEFINE_integer("batch_size", 0, "images written at a time; 0 is compute.rows", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder; of a pipeline: its student",
                             flag_values=fv)
    absl_flags.DEFINE_bool("cost", False, "count multiply-adds, by sampling one more image", flag_values=fv)
    absl_flags.DEFINE_integer("captures", 0, "rows of montage.png, from noise to image; 0 is none", flag_values=fv)
    absl_flags.DEFINE_bool("compare", False, "time a pipeline's policy beside the plain pipeline", flag_values=fv)
    absl_flags.DEFINE_integer("repeats", 3, "timed calls of each of the two of --compare", flag_values=fv)
    absl_flags.DEFINE_string("out", "outputs/samples", "folder, or a file that ends in .npz", flag_values=fv)


def open_chain(config, flags, device):
    """(chain, its fingerprint, what the summary says of it, what its policy ran, and likewise in all processes)."""
    for flag in ("control_image", "compare"):
        if getattr(flags, flag):
            raise UserError(f"--{flag}={getattr(flags, flag)} belongs to a pipeline, such as configs/sd15.py")
    chain, checkpoint = build.load_chain(config, flags.checkpoint, device, flags.chosen, flags.prompts, flags.images,
                                        flags.fields)
    about = {"model": Path(flags.checkpoint or config.checkpoint).name, "sampler": config.sampler.name}
    made_by = fingerprint(config, checkpoint, flags.labels)
    if chain.contexts is not None:
        about["prompts"] = flags.prompts
        made_by |= chain.contexts.fingerprint
    if chain.shown is not None:
        about |= {name: given for name, given in (("images_folder", flags.images), ("prompts", flags.prompts),
                                                   ("fields", flags.fields)) if given}
        made_by |= chain.shown.fingerprint
    return chain, made_by, about, chain.policy.stats, chain.policy.report


def open_pipeline(config, flags, device):
    """The same of a diffusers pipeline."""
    from libs.pipelines.sampling import check_compare, open_sampler  # diffusers takes seconds to import

    for flag in ("labels", "images", "fields", "cost", "captures"):
        if getattr(flags, flag):
            raise UserError(f"--{flag}={getattr(flags, flag)} belongs to a config without a pipeline")
    if flags.compare:
        check_compare(config.policy, flags.out, flags.repeats)
    sampler = open_sampler(config, flags.prompts, flags.checkpoint, device, flags.control_image, flags.chosen)
    about = {"model": Path(config.pipeline.path).name, "student": config.pipeline.student,
             "sampler": config.pipeline.scheduler, "prompts": flags.prompts, "method": config.policy.to_dict()}
    return sampler, sampler.fingerprint, about, sampler.stats, lambda processes: {}


def sample(config, flags) -> None:
    seeds = parse_seeds(flags.seeds)
    if flags.batch_size < 0:
        raise UserError(f"--batch_size={flags.batch_size} must be at least 1")
    as_npz = flags.out.endswith(".npz")
    if as_npz and flags.captures:
        raise UserError(f"--captures={flags.captures} writes a picture into a folder, --out={flags.out} is none")
    out = cli.output_dir(f"{flags.out}.parts" if as_npz else flags.out)
    processes = Processes(cli.choose_device(config.compute.device))
    open_source = open_pipeline if "pipeline" in config else open_chain
    source, made_by, about, stats, report = open_source(config, flags, processes.device)
    labels = parse_labels(flags.labels, seeds, source.num_classes)
    captured = capture_indices(source, flags.captures) if flags.captures else []
    folder = ImageFolder(out, made_by)

    own = folder.missing(processes.share(seeds, source.rows))
    own_labels = parse_labels(flags.labels, own, source.num_classes)
    with tqdm(total=len(own), unit="image", disable=not processes.is_main) as progress:
        for batch, images in source.images(own, own_labels, flags.batch_size or None):
            folder.save(batch, images)
            progress.update(len(batch))
    seconds = max(processes.gather(progress.format_dict["elapsed"]))
    made = sum(processes.gather(len(own)))  # by now all images are there
    ran = add_up(processes.gather(stats()), report(processes))
    if processes.is_main:
        if made:
            summary = {**about, "nfe": source.nfe, "cfg_scale": source.cfg_scale, "stats": ran,
                       "images": made, "processes": processes.count, "seconds_per_image": seconds / made}
            if flags.cost:
                summary["gmacs_per_image"] = gmacs_per_image(source, seeds[:1], labels and labels[:1])
            write_json(Path(flags.out).with_suffix(".json") if as_npz else out / "summary.json", summary)
        if captured:
            rows = captures(source, seeds[:COLUMNS], labels and labels[:COLUMNS], captured)
            save_png(out / "montage.png", montage(rows))
        if flags.compare:
            compare_with_plain(source, seeds, folder, flags.repeats)
        if as_npz:
            with atomic_path(flags.out) as temporary, open(temporary, "wb") as file:
                np.savez(file, images=folder.load(seeds).numpy(), seeds=seeds, labels=labels or [])
            folder.remove()
        else:
            images = folder.load(seeds[:GRID])
            columns = 10 if source.num_classes == 10 and flags.labels is None else 8
            if source.shown is not None and source.shown.of_images:
                images, columns = source.shown.beside(seeds[:GRID], images), columns // 2
            save_png(out / "grid.png", image_grid(images, columns, upscale=max(1, 32 // images.shape[1])))
        logging.info("%d images of %d evaluations each: %s", len(seeds), source.nfe, flags.out)
    processes.close()


def add_up(parts: list[dict], told: dict) -> dict:
    """The `stats` of a policy in all processes: counts add up, what is `told` of all their images stands as it is.

    >>> add_up([{"calls": 2, "layer_ratio": 0.5}, {"calls": 1, "layer_ratio": None}], {"layer_ratio": 0.5})
    {'calls': 3, 'layer_ratio': 0.5}
    """
    return {name: told[name] if name in told else sum(part[name] for part in parts) for name in parts[0]}


def compare_with_plain(sampler, seeds: list[int], folder: ImageFolder, repeats: int) -> None:
    """Write compare.json and compare.png (left plain, right accelerated), and the plain images into plain/."""
    from libs.pipelines.sampling import compare

    result, picture = compare(sampler, seeds, folder, repeats)
    write_json(folder.path / "compare.json", result)
    save_png(folder.path / "compare.png", picture)
    print(f"plain {result['plain_seconds']:.3f} s, {result['method']['name']} {result['accelerated_seconds']:.3f} s a "
          f"call of {result['images_in_a_call']} images: {result['ratio']:.2f} x")


def main(argv: list[str] | None = None) -> int:
    return cli.run(sample, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

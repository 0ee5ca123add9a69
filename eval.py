"""Seeds (or a folder of images) -> Frechet distances and the other metrics, and what they cost: one JSON a run.

    python eval.py --config=configs/cifar10_uvit_tiny.py --seeds=0-499 --out=outputs/eval/uvit_tiny.json
    python eval.py --config=configs/cifar10_unet.py --config.eval.metrics=frechet_cifar10,class_accuracy \\
        --seeds=0-499 --keep_images=outputs/unet --benchmark --out=outputs/eval/unet.json
    python eval.py --config=configs/mscoco_uvit_small.py --checkpoint=data/pretrained/mscoco_uvit_small.pth \\
        --prompts=captions_val2014.json --config.eval.reference=data/fid_stats/fid_stats_mscoco256_val.npz \\
        --seeds=0-29999 --out=outputs/eval/coco.json
    python eval.py --config=configs/cifar10_super_resolution.py --checkpoint=runs/super_resolution --images=photos \\
        --config.eval.metrics=psnr --seeds=0-499 --out=outputs/eval/super_resolution.json
    python eval.py --config=configs/sd15.py --checkpoint=runs/flash_sd15 --prompts=captions.txt --seeds=0-4999 \\
        --config.eval.reference=photos --out=outputs/eval/flash_sd15.json
    python eval.py --images=outputs/unet --out=outputs/eval/unet_again.json
    python eval.py --config=configs/sd15.py --images=outputs/sd15 --prompts=captions.txt \\
        --config.eval.metrics=clip_score --out=outputs/eval/sd15.json

Metrics are the names in --config.eval.metrics. With --keep_images the same command again goes on where the last one
was interrupted.
"""

import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from absl import flags as absl_flags

from libs import build, cli
from libs.benchmark import benchmark, check_benchmark
from libs.cost import gmacs_per_image
from libs.data.folder import folder_batches
from libs.defaults import base_config
from libs.errors import UserError
from libs.evaluation import Metrics, Request, score_files, score_seeds
from libs.files import require_json, write_json
from libs.generate import Chain
from libs.image_folder import ImageFolder, fingerprint, image_names, read_chain
from libs.markdown import markdown_table
from libs.processes import Processes
from libs.prompts import prompts_of_files
from libs.provenance import machine, origin
from libs.seeds import parse_labels, parse_seeds
from libs.tables import result_row

FLAGS = ("seeds", "labels", "checkpoint", "keep_images", "images", "prompts", "fields", "image_size",
         "benchmark", "inception_weights", "out")


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("seeds", None, "seeds of the images to score: 0-499", flag_values=fv)
    absl_flags.DEFINE_string("labels", None, "classes, given to the seeds in turn: 3 or 0-9", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder; of a pipeline: its student",
                             flag_values=fv)
    absl_flags.DEFINE_string("keep_images", None, "folder that keeps the images of the seeds", flag_values=fv)
    absl_flags.DEFINE_string("fields", None, "what else a model's conditions are made of: \"aesthetic_score=6.5; "
                             "edges=drawings\", numbers or images", flag_values=fv)
    absl_flags.DEFINE_string("images", None, "score the images of this folder, instead of seeds; with --seeds: what a "
                             "model of images makes its conditions of", flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "of the --seeds of a model of texts, or of --images: a text, a file, or "
                             "a folder of run_vis features", flag_values=fv)
    absl_flags.DEFINE_integer("image_size", None, "crop and resize --images, and the reference, to it", flag_values=fv)
    absl_flags.DEFINE_boolean("benchmark", False, "time the sampling too, see config.eval", flag_values=fv)
    absl_flags.DEFINE_string("inception_weights", None, "file of FID's network; else fetched", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "result file (.json)", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def evaluate(config, flags) -> None:
    of_images = config is not None and config.get("cond", {}).get("kind") == "image"
    if (flags.seeds is None) == (flags.images is None) and not (of_images and flags.seeds):
        raise UserError(f"--seeds={flags.seeds}, --images={flags.images}: give one of them")
    require_json(flags.out)
    cli.output_dir(Path(flags.out).parent)
    result = (evaluate_folder if flags.seeds is None else evaluate_seeds)(config, flags)
    if result is None:  # not the main process
        return
    result |= origin("eval.py", config, flags, FLAGS)
    write_json(flags.out, result)
    print(markdown_table([result_row(result)]))


class Opened(NamedTuple):
    """What makes the images of the seeds, one of two: a chain of our own links, or a diffusers pipeline.

    source   a `Chain` or a `PipelineSampler`
    shape    (h, w, c) of an image
    made_by  what decides the image of a seed
    about    what the result says of it
    cost     (seeds, labels) -> multiply-adds an image
    report   (processes or None) -> what a policy says of the images made so far
    timed    the chain that --benchmark times
    """

    source: Any
    shape: tuple[int, int, int]
    made_by: dict[str, Any]
    about: dict[str, Any]
    cost: Callable[[list[int], list[int] | None], dict]
    report: Callable[..., dict]
    timed: Chain | None = None


def open_chain(config, flags, device) -> Opened:
    chain, file = build.load_chain(config, flags.checkpoint, device, flags.chosen, flags.prompts, flags.images,
                                   flags.fields)
    steps = config.eval.benchmark_steps or config.sampler.steps
    timed = replace(chain, ts=build.make_times({**config.sampler, "steps": steps}, chain.denoiser.schedule))
    made_by = fingerprint(config, file, flags.labels)
    for shown in chain.contexts, chain.shown:
        made_by |= {} if shown is None else shown.fingerprint
    about = {"model": flags.checkpoint or config.checkpoint, "checkpoint_sha256": made_by["checkpoint_sha256"],
             "sampler": config.sampler.to_dict()}
    blank = chain.codec.decode(torch.zeros(1, *chain.shape, device=chain.device))  # 1 h w c
    return Opened(chain, tuple(blank.shape[1:]), made_by, about, partial(gmacs_per_image, chain), chain.policy.report,
                  timed)


def open_pipeline(config, flags, device) -> Opened:
    from libs.pipelines.loading import CONTROLS  # diffusers takes seconds to import
    from libs.pipelines.sampling import open_sampler

    for flag in ("labels", "fields"):
        if getattr(flags, flag) is not None:
            raise UserError(f"--{flag}={getattr(flags, flag)} belongs to a config without a pipeline")
    if flags.benchmark:
        raise UserError("--benchmark times a chain of a config without a pipeline; sample.py --compare times a "
                        "pipeline's policy")
    if any(field in config.pipeline for field in CONTROLS):
        raise UserError(f"--seeds={flags.seeds}: images that others steer are made by sample.py with --control_image, "
                        "and scored with --images")
    sampler = open_sampler(config, flags.prompts, flags.checkpoint, device, chosen=flags.chosen)
    section = config.pipeline
    about = {"model": section.student or section.path, "chain": sampler.fingerprint, "sampler": {
        "name": section.scheduler, "steps": section.steps, "cfg_scale": max(1.0, sampler.cfg_scale)}}  # below 1: none
    return Opened(sampler, sampler.image_shape, sampler.fingerprint, about,
                  lambda seeds, labels: sampler.gmacs_per_image(seeds), lambda *_: {})


def evaluate_seeds(config, flags) -> dict | None:
    """Generate the seeds' images (or take them from --keep_images), score and cost them."""
    if config is None:
        raise UserError("--config is missing: --seeds needs a model")
    if flags.image_size is not None:
        raise UserError(f"--image_size={flags.image_size} belongs to --images, not to --seeds")
    seeds = parse_seeds(flags.seeds)
    section = config.eval
    check_benchmark(section.benchmark_rows, section.benchmark_steps, section.benchmark_repeats)
    if section.cost_images < 1:
        raise UserError(f"eval.cost_images={section.cost_images} must be at least 1")
    processes = Processes(cli.choose_device(config.compute.device))
    opened = (open_pipeline if "pipeline" in config else open_chain)(config, flags, processes.device)
    source = opened.source
    labels = parse_labels(flags.labels, seeds, source.num_classes)
    label_of = dict(zip(seeds, labels, strict=True)) if labels else None
    metrics = Metrics(Request(
        section, len(seeds), opened.shape, source.device, config.get("data"), source.num_classes,
        flags.inception_weights, with_reference=processes.is_main, prompts=flags.prompts is not None,
        shown=source.shown is not None and source.shown.of_images))
    folder = None
    if flags.keep_images:
        folder = ImageFolder(cli.output_dir(flags.keep_images, "keep_images"), opened.made_by, "keep_images")

    own = processes.share(seeds, source.rows)
    sampled, seconds = score_seeds(metrics, source, own, label_of, folder, processes.is_main)
    measured = metrics.compute(processes)
    sampled, told = sum(processes.gather(sampled)), opened.report(processes)
    processes.close()
    if not processes.is_main:
        return None
    few = seeds[:section.cost_images]
    result = opened.about | {
        "config": flags.config, "method": config.policy.to_dict(), "compute": config.compute.to_dict(),
        "nfe": source.nfe, "rows": source.rows,
        "seeds": flags.seeds, "labels": flags.labels or ("all in turn" if labels else None),
        "prompts": flags.prompts, "images": flags.images, "fields": flags.fields, "samples": len(seeds),
        "metrics": measured,
        "gmacs_per_image": opened.cost(few, labels and labels[:len(few)]),
        "sampling": {"images": sampled, "seconds": seconds, "processes": processes.count},
        "machine": machine(source.device),
    }
    if told and not sampled:  # all images were there: of those whose cost was counted
        told = opened.report()
    if told:
        result["policy"] = told
    if flags.benchmark:
        result["benchmark"] = benchmark(source, opened.timed, section.benchmark_rows, section.benchmark_repeats)
    return result


def evaluate_folder(config, flags) -> dict | None:
    """Score the images of --images as they are."""
    for flag in ("labels", "checkpoint", "keep_images", "fields"):
        if getattr(flags, flag) is not None:
            raise UserError(f"--{flag}={getattr(flags, flag)} belongs to --seeds, not to --images")
    if flags.benchmark:
        raise UserError("--benchmark belongs to --seeds, not to --images")
    if flags.image_size is not None and flags.image_size < 1:
        raise UserError(f"--image_size={flags.image_size} must be at least 1")
    names, prompts = image_names(flags.images), None
    if flags.prompts is not None:
        prompts = prompts_of_files(flags.prompts, flags.images, names)
    settings = config or base_config()
    processes = Processes(cli.choose_device(settings.compute.device))
    first = next(folder_batches(flags.images, 1, 3, flags.image_size, "--images", names[:1]))
    metrics = Metrics(Request(
        settings.eval, len(names), tuple(first.shape[1:]), processes.device, config and config.get("data"),
        inception_weights=flags.inception_weights, with_reference=processes.is_main, prompts=prompts is not None))
    own = slice(processes.rank, None, processes.count)
    score_files(metrics, flags.images, names[own], processes.is_main, flags.image_size, prompts and prompts[own])
    measured = metrics.compute(processes)
    processes.close()
    if not processes.is_main:
        return None
    return {"model": flags.images, "images": flags.images, "chain": read_chain(Path(flags.images)),
            "config": flags.config, "prompts": flags.prompts, "image_size": flags.image_size, "samples": len(names),
            "metrics": measured}


def main(argv: list[str] | None = None) -> int:
    return cli.run(evaluate, define_flags, argv, takes_config="optional")


if __name__ == "__main__":
    sys.exit(main())

"""What early exit does: how deep each image goes at each step, how uncertain it is there, and whether that is true.

    python -m libs.exits.report --config=configs/cifar10_uvit_tiny.py:early_exit \\
        --checkpoint=runs/early_exit --seeds=0-63 --out=outputs/exits

Samples the seeds and writes into --out
    report.json      layer ratio, executed ratio, threshold; of each call of the network the histogram of exit layers
                     and their spread across the images; seconds, images a second, GMACs; the calibration's numbers
    exits.png        that histogram
    uncertainty.png  of some seeds and steps: the predicted image x_0, and 1 - c of the layer that it left at
    calibration.png  predicted against true certainty, on images of the config's data set noised to all times; of a
                     student of few steps to the times at which it samples

--benchmark times the loop at the batch sizes of config.eval, as eval.py does. Under `accelerate launch` the processes
share the seeds.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from absl import flags as absl_flags
from absl import logging
from tqdm import tqdm

from .. import build, cli
from .. import checkpoint as checkpoints
from ..benchmark import benchmark, check_benchmark, synchronize
from ..contexts import make_contexts
from ..cost import gmacs_per_image
from ..data.images import save_png
from ..errors import UserError
from ..files import write_json
from ..generate import Chain
from ..montage import montage
from ..processes import Processes
from ..provenance import file_sha256, machine, origin
from ..seeds import parse_labels, parse_seeds
from ..training.batches import Batches, load_training_data
from .calibration import Certainties, calibration, certainties, join
from .pictures import draw_calibration, draw_exits, uncertainty_rows
from .watch import every_layer, exit_uncertainty, plain_denoiser, watch

BINS = 10  # of t in the calibration
FLAGS = ("seeds", "labels", "prompts", "checkpoint", "shown", "shown_steps", "data_images", "benchmark", "out")


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("seeds", "0-63", "seeds of the images: 0-63 or 1,5,7-9", flag_values=fv)
    absl_flags.DEFINE_string("labels", None, "classes, given to the seeds in turn: 3 or 0-9", flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "of a text model, see sample.py", flag_values=fv)
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_integer("shown", 8, "seeds in uncertainty.png", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("shown_steps", 4, "calls of the network in uncertainty.png", flag_values=fv,
                              lower_bound=1)
    absl_flags.DEFINE_integer("data_images", 640, f"images of the calibration, spread over {BINS} parts of the time; 0 "
                              "leaves it out", flag_values=fv, lower_bound=0)
    absl_flags.DEFINE_boolean("benchmark", False, "time the sampling too, see config.eval", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "folder of the report", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def load(config, flags, device: torch.device) -> tuple[Chain, Path, dict]:
    """(chain, its checkpoint, the description of its network). Raises UserError where it has no uncertainty heads."""
    if config.get("policy", {}).get("name") != "early_exit":
        raise UserError(f"--config={flags.config} samples without early exit; name the method, as in "
                        "--config=configs/cifar10_uvit_tiny.py:early_exit")
    net, description = build.load_model(config, flags.checkpoint)
    if getattr(net, "lte_classifer", None) is None:
        raise UserError(f"checkpoint={flags.checkpoint or config.checkpoint!r} has no uncertainty heads; train them by "
                        f"train.py --config={flags.config}")
    build.adopt_sampler(config, description, flags.chosen)
    build.adopt_places(config, description, flags.chosen)
    chain = build.make_chain(config, build.prepare_backbone(net, config.compute, device), description, device,
                             make_contexts(flags.prompts, description, device))
    return chain, checkpoints.resolve(flags.checkpoint or config.checkpoint), description


def sample(chain: Chain, seeds: list[int], labels: list[int] | None, bar: bool) -> float:
    """Sample the seeds for the policy's record; the seconds that took."""
    chain.policy.start(chain.denoiser.time_input(chain.times))  # what it does once is no time of an image
    began = time.perf_counter()
    with tqdm(total=len(seeds), desc="sampling", unit="image", disable=not bar) as progress:
        for batch, _ in chain.images(seeds, labels):
            synchronize(chain.device)
            progress.update(len(batch))
    return time.perf_counter() - began


def calibrate(config, chain: Chain, description: Mapping, processes: Processes, images: int,
              times: torch.Tensor | None = None) -> Certainties:
    """Predicted and true certainties of `images` images of the data set, of all processes; at these times of a student.
    """
    cond = {**description["cond"], "drop": 0.0}
    data = load_training_data(config.data, {**description, "cond": cond}, chain.device)
    step_rows = chain.rows * processes.count
    batches = Batches(data, chain.codec, cond, False, config.seed, step_rows, rank=processes.rank,
                      count=processes.count)
    denoiser, parts = plain_denoiser(chain), []
    with tqdm(total=images, desc="calibration", unit="image", disable=not processes.is_main) as progress:
        for step in range(-(-images // step_rows)):
            for batch in batches.parts(step):
                wanted = batch.positions < images
                parts.append(certainties(denoiser, batch, BINS if times is None else len(times), times).of(wanted))
            progress.update(min(step_rows, images - step * step_rows))
    return join(part for own in processes.gather(parts) for part in own)


def shown_calls(nfe: int, number: int) -> list[int]:
    """`number` calls of a loop, evenly spread from the first to the last; all of a shorter loop."""
    number = min(number, nfe)
    return sorted({round(i * (nfe - 1) / max(1, number - 1)) for i in range(number)})


def show(chain: Chain, seeds: list[int], labels: list[int] | None, number: int) -> torch.Tensor:
    """The picture of predictions and their uncertainty: uint8 (H, W, c)."""
    denoiser, columns, steps = plain_denoiser(chain), len(seeds), []
    for call in watch(chain, shown_calls(chain.nfe, number), seeds, labels):
        _, certainty = every_layer(denoiser, call)
        maps = exit_uncertainty(certainty, call.exit_layer, columns)
        layers = call.exit_layer[:columns]
        depth = f"{int(layers.min())} to {int(layers.max())}" if layers.min() < layers.max() else f"{int(layers[0])}"
        steps.append((f"x_0 at t = {float(call.t):.2g}, after {depth} layers",
                      chain.codec.decode(call.x_0[:columns]).cpu(), maps.cpu()))
    return montage(uncertainty_rows(steps))


def measure(config, flags, chain: Chain, seeds: list[int], labels: list[int] | None,
            processes: Processes) -> dict[str, Any] | None:
    """Depth, time and cost of the seeds; None but on the main process."""
    label_of = dict(zip(seeds, labels, strict=True)) if labels else None
    own = processes.share(seeds, chain.rows)
    seconds = sample(chain, own, label_of and [label_of[seed] for seed in own], processes.is_main)
    seconds, policy = max(processes.gather(seconds)), chain.policy.report(processes)
    processes.close()
    if not processes.is_main:
        return None
    section = config.eval
    few = seeds[:max(section.cost_images, chain.rows)]
    result = {
        "policy": policy, "nfe": chain.nfe, "times": chain.times.tolist(), "rows": chain.rows, "samples": len(seeds),
        "gmacs_per_image": gmacs_per_image(chain, few, labels and labels[:len(few)]),
        "sampling": {"images": len(seeds), "seconds": seconds, "images_per_second": len(seeds) / seconds,
                     "processes": processes.count},
        "machine": machine(chain.device),
    }
    if flags.benchmark:
        steps = section.benchmark_steps or config.sampler.steps
        timed = replace(chain, ts=build.make_times({**config.sampler, "steps": steps}, chain.denoiser.schedule))
        result["benchmark"] = benchmark(chain, timed, section.benchmark_rows, section.benchmark_repeats)
    return result


def report(config, flags) -> None:
    seeds = parse_seeds(flags.seeds)
    processes = Processes(cli.choose_device(config.compute.device))
    chain, source, description = load(config, flags, processes.device)
    check_benchmark(config.eval.benchmark_rows, config.eval.benchmark_steps, config.eval.benchmark_repeats)
    labels = parse_labels(flags.labels, seeds, chain.num_classes)
    out = cli.output_dir(flags.out)
    times, held = build.sampled_times(description, chain.denoiser.schedule), None
    if flags.data_images:
        held = calibrate(config, chain, description, processes, flags.data_images, times)
    measured = measure(config, flags, chain, seeds, labels, processes)
    if measured is None:  # not the main process
        return
    result = {
        "model": flags.checkpoint or config.checkpoint, "checkpoint_sha256": file_sha256(source),
        "config": flags.config, "method": config.policy.to_dict(), "sampler": config.sampler.to_dict(),
        "compute": config.compute.to_dict(), "seeds": flags.seeds,
        "labels": flags.labels or ("all in turn" if labels else None), "prompts": flags.prompts, **measured,
    }
    draw_exits(measured["policy"]["histogram"], measured["times"], out / "exits.png")
    columns = min(flags.shown, chain.rows, len(seeds))
    save_png(out / "uncertainty.png", show(chain, seeds[:columns], labels and labels[:columns], flags.shown_steps))
    if held is not None:
        result["calibration"] = calibration(held, BINS if times is None else len(times), times)
        draw_calibration(result["calibration"], out / "calibration.png")
    result |= origin("-m libs.exits.report", config, flags, FLAGS)
    write_json(out / "report.json", result)
    logging.info("%d images by %.3f of the layers: %s", len(seeds), measured["policy"]["layer_ratio"], out)


def main(argv: list[str] | None = None) -> int:
    return cli.run(report, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

"""How fast early exit is on the clock, beside the layers that it saves.

    python -m libs.exits.speed --config=configs/cifar10_uvit_tiny.py:early_exit,dpm_solver \\
        --checkpoint=runs/early_exit --out=outputs/exit_speed.json
    python -m libs.exits.speed --config=configs/cifar10_uvit_small.py:early_exit,dpm_solver --random_heads=0.55 \\
        --checkpoint=data/pretrained/cifar10_uvit_small.pth --rows=128 --config.compute.precision=bf16 \\
        --config.compute.compile=true --config.compute.compile_mode=reduce-overhead --out=outputs/exit_speed_gpu.json

Whole loops of one network, in turns in one run, so that a busy machine slows all: the full model; `schedule` and
`per_sample` with the config's threshold or target ratio; both with a depth that nothing leaves early; and the released
algorithm for one image at a time. --random_heads=RATIO replaces the network's uncertainty heads by random ones that use
about that share of the layers: its images are worth nothing, its times are.
"""

import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from itertools import groupby
from statistics import median
from typing import Any

import torch
from absl import flags as absl_flags
from torch import Tensor, nn
from tqdm import tqdm

from .. import build, cli
from ..benchmark import WARM_UP, timed_loop
from ..contexts import Contexts, make_contexts
from ..errors import UserError
from ..files import require_json, write_json
from ..generate import Chain
from ..markdown import EMPTY, markdown_table
from ..peak_tensors import PeakTensors
from ..policies import Full
from ..policies.exit_walk import run_layer
from ..policies.sites import unwrap
from ..provenance import machine, origin
from .random_heads import add_random_heads

PROTOCOL = ("a timed loop goes from seeds to uint8 images, the device synchronised before and after; after {warm_up} "
            "untimed round, {repeats} rounds, each variant once a round; images_per_second is that of the median loop; "
            "speed_up is the median of the full model's time over a variant's of the same round; share = speed_up * "
            "executed_ratio, which is 1 where saved layers are saved time; overhead = 1 / speed_up - 1; on a CPU the "
            "same of processor time, which a busy machine disturbs less; peak_memory_mib is the most that tensors took "
            "in a loop of few steps, weights included")
SHORT = 3  # sampler steps of the loop whose memory is taken
BY_DEFAULT = {"compile_mode": "default"}
FLAGS = ("checkpoint", "prompts", "rows", "repeats", "steps", "released_images", "random_heads", "out")
NEVER = 0.999999  # a threshold that nothing reaches, at which all heads are asked
# Of `share` (at least), by device; of `overhead` (at most).
MEMORY = 1.02  # of the full model's, at most, by the policies
RELEASED, RELEASED_ROWS = 20, 128  # times the images a second of the released algorithm, on a GPU at so many rows
SHARES = {"schedule": {"cpu": 0.93, "cuda": 0.93}, "per_sample": {"cpu": 0.90, "cuda": 0.75}}
OVERHEADS = {"schedule_never": {"cpu": 0.0, "cuda": 0.0}, "per_sample_never": {"cpu": 0.04, "cuda": 0.10}}


class Released(Full):
    """AdaDiff's released sampling, for the benchmark alone: every row by itself; after every layer its uncertainty head
    and the output head, whose result is used nowhere; the decision on the host; then the output head once more.

    exits: (loops, calls, rows) int64, exit layers of all loops so far
    """

    def __init__(self, net: nn.Module, threshold: float, patience: int):
        super().__init__(net)
        self.threshold, self.patience = threshold, patience
        self._exits: list[list[list[int]]] = []

    @property
    def exits(self) -> Tensor:
        return torch.tensor(self._exits)

    def start(self, times: Tensor, rows_per_image: int = 1) -> None:
        super().start(times, rows_per_image)
        self._exits.append([])

    def __call__(self, x: Tensor, timesteps: Tensor, **cond: Tensor) -> Tensor:
        self._exits[-1].append([])
        rows = [slice(i, i + 1) for i in range(len(x))]
        return torch.cat([self._row(x[row], timesteps[row], {name: each[row] for name, each in cond.items()})
                          for row in rows])

    def _row(self, x: Tensor, timesteps: Tensor, cond: dict[str, Tensor]) -> Tensor:
        net, skips, crossings = self.net, [], 0
        mean_certainty = net.mean_certainty()
        tokens, time = net.embed(x, timesteps, **cond), net.uem_time(timesteps)
        for layer, block in enumerate(net.block_list(), start=1):
            tokens = run_layer(net, block, layer, tokens, skips)
            net.head(tokens)
            if mean_certainty(layer - 1, tokens, time)[0] > self.threshold:  # waits for the device
                crossings += 1
                if layer > len(net.in_blocks) or crossings >= self.patience:
                    break
        self._exits[-1][-1].append(layer)
        return net.head(tokens)

    def report(self, processes: Any = None) -> dict[str, Any]:
        ratio = float(self.exits.double().mean()) / len(self.net.block_list())
        return {"layer_ratio": ratio, "executed_ratio": ratio}


class Variant:
    """A chain that is timed with the others, and its loops so far."""

    def __init__(self, name: str, chain: Chain, images: int):
        self.name, self.chain, self.seeds = name, chain, list(range(images))
        self.labels = [seed % chain.num_classes for seed in self.seeds] if chain.num_classes else None
        self.seconds: list[float] = []
        self.processor: list[float] = []  # seconds of the host's processor, all threads

    def loop(self) -> None:
        busy = time.process_time()
        self.seconds.append(timed_loop(self.chain, self.seeds, self.labels)[0])
        self.processor.append(time.process_time() - busy)

    def close(self) -> None:
        """Note what the policy did in these loops, then how much memory tensors take in a short one."""
        self.told, self.exits = self.chain.policy.report(), getattr(self.chain.policy, "exits", None)
        ts = self.chain.ts
        short = replace(self.chain, ts=ts[torch.linspace(0, len(ts) - 1, min(len(ts), SHORT + 1)).round().long()])
        with PeakTensors(unwrap(self.chain.policy.net), self.chain.device) as peak:
            short.sample(self.seeds[:short.rows], self.labels and self.labels[:short.rows])
        self.mib = peak.mib

    def row(self, full: "Variant") -> dict[str, Any]:
        """What was measured, beside the full model's."""
        own = self.seconds[WARM_UP:]
        ratio = self.told.get("executed_ratio", 1.0)
        found = {"variant": self.name, "rows": self.chain.rows, "images": len(self.seeds),
                 "images_per_second": len(self.seeds) / median(own), "layer_ratio": self.told.get("layer_ratio", 1.0),
                 "executed_ratio": ratio, "peak_memory_mib": self.mib}
        if self.name == "released":  # which makes fewer images a round
            return found
        times = {"": (own, full.seconds[WARM_UP:])}
        if self.chain.device.type == "cpu":
            times["processor_"] = self.processor[WARM_UP:], full.processor[WARM_UP:]
        for kind, (ours, theirs) in times.items():
            speed_up = median(b / a for a, b in zip(ours, theirs, strict=True))
            found |= {f"{kind}speed_up": speed_up, f"{kind}share": speed_up * ratio,
                      f"{kind}overhead": 1 / speed_up - 1}
        return found | ({} if self.mib is None else {"peak_memory_ratio": self.mib / full.mib})


class Bench:
    """The variants around one network.

    config: with the policy whose threshold or target ratio counts. The threshold and the schedule are found once, so
    that they are those of all numbers of rows. contexts: what a text model is shown. Where `net` was compiled into CUDA
    graphs, which cannot serve `per_sample`, that is timed on the same network compiled by default.
    """

    def __init__(self, config: Mapping, net: nn.Module, description: Mapping, device: torch.device,
                 contexts: Contexts | None = None):
        self.config, self.net, self.description, self.device = config, net, description, device
        self.contexts, self.blockwise = contexts, net
        if build.uses_cuda_graphs(config["compute"]):
            self.blockwise = build.prepare_backbone(unwrap(net), {**config["compute"], **BY_DEFAULT}, device)
        found = [self._calibrated(mode) for mode in ("per_sample", "schedule")]
        self.threshold, self.depths = found[0]["threshold"], found[1]["schedule"]

    def _calibrated(self, mode: str) -> dict[str, Any]:
        policy = {**self.config["policy"], "mode": mode}
        chain = self.chain(policy | ({} if mode == "schedule" else {"schedule": ""}), self.config["compute"]["rows"])
        chain.policy.start(chain.denoiser.time_input(chain.times))
        return chain.policy.report()

    def chain(self, policy: Mapping, rows: int) -> Chain:
        compute, net = {**self.config["compute"], "rows": rows}, self.net
        if policy.get("mode") in ("per_sample", "batch_mean"):
            compute, net = compute | BY_DEFAULT, self.blockwise
        config = {**self.config, "policy": policy, "compute": compute}
        return build.make_chain(config, net, self.description, self.device, self.contexts)

    @property
    def schedule(self) -> str:
        """The depths as the text of a schedule."""
        return ",".join(f"{depth}x{len(list(same))}" for depth, same in groupby(self.depths))

    def variants(self, rows: int) -> list[Variant]:
        """The full model and the policies, at so many rows."""
        given = {**self.config["policy"], "target_layer_ratio": 0.0, "schedule": ""}
        layers = unwrap(self.net).depth + 1
        policies = {
            "full": {"name": "full"},
            "schedule": given | {"mode": "schedule", "schedule": self.schedule},
            "schedule_never": given | {"mode": "schedule", "schedule": str(layers)},
            "per_sample": given | {"mode": "per_sample", "threshold": self.threshold},
            "per_sample_never": given | {"mode": "per_sample", "threshold": NEVER},
        }
        return [Variant(name, self.chain(policy, rows), rows) for name, policy in policies.items()]

    def released(self, images: int) -> Variant:
        chain = self.chain({"name": "full"}, 1)
        policy = Released(unwrap(self.net), self.threshold, self.config["policy"]["patience"])
        chain.policy = chain.denoiser.net = policy
        return Variant("released", chain, images)

    def measure(self, rows: int, repeats: int, released_images: int) -> list[dict[str, Any]]:
        """Rows of the result at one number of rows."""
        torch.compiler.reset()  # graphs for other numbers of rows, which are more general, are not this one's
        variants = self.variants(rows)
        if released_images:
            variants.append(self.released(min(released_images, rows)))
        acts = [*[Variant.loop] * (WARM_UP + repeats), Variant.close]
        with tqdm(total=len(acts) * len(variants), desc=f"{rows} rows", unit="loop") as bar:
            for act in acts:
                for variant in variants:
                    bar.set_postfix_str(variant.name)
                    act(variant)
                    bar.update()
        found = [variant.row(variants[0]) for variant in variants]
        if released_images:
            self._compare(found, variants)
        return found

    def _compare(self, found: list[dict[str, Any]], variants: list[Variant]) -> None:
        """Add how much faster per_sample is than the released algorithm, and the share of equal exits of the same
        images.
        """
        images = len(variants[-1].seeds)
        place = next(i for i, variant in enumerate(variants) if variant.name == "per_sample")
        own = variants[place].exits  # calls, rows: under guidance twice the images
        own = own.unflatten(1, (-1, len(variants[place].seeds)))[:, :, :images].permute(2, 0, 1)
        theirs = variants[-1].exits[-images:]  # images, calls, 1 or 2
        found[-1]["equal_exits"] = float((own == theirs).double().mean())
        found[place]["times_released"] = found[place]["images_per_second"] / found[-1]["images_per_second"]


def goal(row: Mapping[str, Any], device: str) -> str:
    """What is wanted of a variant, in words; "" for nothing."""
    name, wanted = row["variant"], []
    if device in SHARES.get(name, ()):
        wanted.append(f"share >= {SHARES[name][device]:g}")
    if device in OVERHEADS.get(name, ()):
        wanted.append(f"overhead <= {OVERHEADS[name][device]:.0%}")
    if wanted and row.get("peak_memory_ratio") is not None:
        wanted.append(f"peak memory <= {MEMORY:g}")
    if device == "cuda" and "times_released" in row and row["rows"] >= RELEASED_ROWS:
        wanted.append(f"x released >= {RELEASED}")
    return ", ".join(wanted)


def table(result: Mapping[str, Any]) -> str:
    """The Markdown table of a result file, a row a variant."""
    return markdown_table(table_row(row) for row in result["variants"])


def table_row(row: Mapping[str, Any]) -> dict[str, str]:
    def text(name: str, form: str) -> str:
        return EMPTY if row.get(name) is None else format(row[name], form)

    cells = {"variant": row["variant"], "rows": str(row["rows"]), "images/s": text("images_per_second", ".4g"),
             "layer ratio": text("layer_ratio", ".3f"), "executed": text("executed_ratio", ".3f"),
             "speed-up": text("speed_up", ".3f")}
    measures = [("share", ".3f"), ("overhead", ".1%")]
    for (name, form), shown in zip(measures, (row["variant"] in SHARES, row["variant"] in OVERHEADS), strict=True):
        cells[name] = text(name, form) if shown else EMPTY
        if f"processor_{name}" in row:
            cells[f"{name} of processor time"] = text(f"processor_{name}", form) if shown else EMPTY
    return cells | {"goal": row["goal"] or EMPTY, "peak memory": text("peak_memory_ratio", ".3f"),
                    "x released": text("times_released", ".1f")}


def define_flags(fv) -> None:
    absl_flags.DEFINE_string("checkpoint", None, "released name, file or training folder", flag_values=fv)
    absl_flags.DEFINE_string("prompts", None, "of a text model, see sample.py", flag_values=fv)
    absl_flags.DEFINE_list("rows", ["16", "128"], "images in one call of the network", flag_values=fv)
    absl_flags.DEFINE_integer("repeats", 5, "timed rounds", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("steps", 0, "of the sampler; 0 is config.sampler.steps", flag_values=fv, lower_bound=0)
    absl_flags.DEFINE_integer("released_images", 2, "of the released algorithm in a round; 0 leaves it out",
                              flag_values=fv, lower_bound=0)
    absl_flags.DEFINE_float("random_heads", 0.0, "layer ratio of random uncertainty heads, for timing alone; 0 keeps "
                            "the checkpoint's", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "the result file (.json)", flag_values=fv)
    absl_flags.mark_flag_as_required("out", fv)


def make_bench(config, flags, device: torch.device) -> Bench:
    """The bench of the checkpoint, or of its network with random heads."""
    net, description = build.load_model(config, flags.checkpoint)
    build.adopt_sampler(config, description, flags.chosen | ({"sampler.steps"} if flags.steps else set()))
    build.adopt_places(config, description, flags.chosen)
    contexts = make_contexts(flags.prompts, description, device)
    if flags.random_heads:
        add_random_heads(net, config, description, device, flags.random_heads, contexts)
    return Bench(config, build.prepare_backbone(net, config.compute, device), description, device, contexts)


def exit_speed(config, flags) -> None:
    if config.get("policy", {}).get("name") != "early_exit":
        raise UserError(f"--config={flags.config} samples without early exit; name the method, as in "
                        "--config=configs/cifar10_uvit_tiny.py:early_exit")
    require_json(flags.out)
    wrong = [word for word in flags.rows if not word.isdecimal() or int(word) < 1]
    if wrong or not flags.rows:
        raise UserError(f"--rows={','.join(flags.rows)}: want numbers of at least 1")
    if flags.random_heads and not 0 < flags.random_heads < 1:
        raise UserError(f"--random_heads={flags.random_heads} must be a layer ratio between 0 and 1")
    if config.policy.by_step and flags.released_images:
        raise UserError("--config.policy.by_step=true: the released algorithm has one threshold for all calls; leave "
                        "it out by --released_images=0")
    if flags.steps:
        config.sampler.steps = flags.steps
    device = cli.choose_device(config.compute.device)
    bench = make_bench(config, flags, device)
    found = [row for rows in flags.rows for row in bench.measure(int(rows), flags.repeats, flags.released_images)]
    result = {"variants": [row | {"goal": goal(row, device.type)} for row in found],
              "protocol": PROTOCOL.format(warm_up=WARM_UP, repeats=flags.repeats),
              "model": flags.checkpoint or config.checkpoint, "config": flags.config, "method": config.policy.to_dict(),
              "sampler": config.sampler.to_dict(), "compute": config.compute.to_dict(), "repeats": flags.repeats,
              "random_heads": flags.random_heads or None, "threshold": bench.threshold, "schedule": bench.schedule,
              "machine": machine(device), **origin("-m libs.exits.speed", config, flags, FLAGS)}
    write_json(flags.out, result)
    sys.stdout.write(table(result) + "\n")


def main(argv: list[str] | None = None) -> int:
    return cli.run(exit_speed, define_flags, argv)


if __name__ == "__main__":
    sys.exit(main())

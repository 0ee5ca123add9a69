"""What an epoch of Clockwork's adaptor costs on Stable Diffusion 1.5's architecture with random weights.

    python -m libs.distillation.adaptor_speed --latent=32 --out=outputs/adaptor_speed.json
    python -m libs.distillation.adaptor_speed --width=small --latent=16 --dtype=fp32

The epoch is a round of `distillate.py --config=configs/sd15.py:clockwork_adaptor`, by the same code and with the same
optimizer: new trajectories of the whole guided pipeline, then updates that unroll the adaptor over the steps between
two full ones. Text encoder and autoencoder are left out. The weights change neither time nor memory; what the adaptor
learns of random ones means nothing.
"""

import json
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from absl import flags as absl_flags
from ml_collections import ConfigDict
from torch import nn

from .. import cli
from .. import config as config_files
from ..benchmark import PeakMemory, synchronize
from ..errors import UserError
from ..files import reason, require_json
from ..markdown import EMPTY, markdown_table
from ..pipelines import untrained
from ..processes import Processes
from ..provenance import machine, origin
from ..training import Run
from .adaptor_training import LEARNED, AdaptorTraining
from .clockwork_adaptor import check
from .speed import tell
from .trajectories import Teacher

CONFIG = "configs/sd15.py:clockwork_adaptor"
PROTOCOL = ("one round: seconds_per_trajectory_step is the time to draw its trajectories over the calls of the "
            "network, each of a guided pair for each of `rows` images; seconds_per_update is the updates' median, "
            "optimizer included; processor_seconds are those of the processor (all threads), which a busy machine "
            "disturbs less; ratio is the squared error of the adaptor over the identity adaptor's, over all updates")
MEMORY = {"cuda": "most memory allocated by torch", "cpu": "peak of the process' resident memory over the round"}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def untrained_teacher(width: str, latent: int, steps: int, rows: int, device: torch.device,
                      dtype: torch.dtype) -> Teacher:
    """A pipeline with random weights, see `pipelines.untrained`; every image is of the same random embeddings."""
    net = nn.Module.to(untrained.unet(width), device, dtype).requires_grad_(False)  # diffusers' own warns of a cast
    pipe, kwargs = untrained.text_to_image(net, steps, latent, rows)
    kwargs = {name: value.to(device, dtype) if torch.is_tensor(value) else value for name, value in kwargs.items()}

    def denoise(seeds: list[int]) -> None:
        pipe(**kwargs, generator=[torch.Generator().manual_seed(seed) for seed in seeds])

    return Teacher(net, denoise, rows, steps, {"name": type(net).__name__, "width": width}, {"scheduler": "ddim"})


def epoch_config(flags) -> ConfigDict:
    """The config of such a training, with one round as its whole length."""
    config = config_files.load(CONFIG)
    config.distill.update(adaptor=flags.adaptor, clock=flags.clock, trajectories=flags.trajectories,
                          updates=flags.updates, rounds_kept=1)
    config.train.update(steps=flags.updates, batch_size=flags.batch_size)
    return config


def mark(device: torch.device) -> tuple[float, float]:
    """The time, and that of the host's processor (all threads), in seconds, once the device has done its work."""
    synchronize(device)
    return time.perf_counter(), time.process_time()


def measure(config: ConfigDict, teacher: Teacher, processes: Processes) -> dict[str, Any]:
    """Seconds and memory of one round."""
    device, section = processes.device, config.distill
    with tempfile.TemporaryDirectory() as folder:  # nothing is saved
        training = AdaptorTraining(config, Run(Path(folder), config, "", processes), teacher)
        with PeakMemory(device) as memory:
            marks = [mark(device)]
            groups = sum(1 for _ in training.data.draw(0))
            marks.append(mark(device))
            for _ in range(section.updates):
                training.update()
                marks.append(mark(device))
    names = ["seconds", "processor_seconds"][:2 if device.type == "cpu" else 1]
    times = {}
    for name, clock in zip(names, zip(*marks, strict=True), strict=False):
        drawn, *updates = (end - start for start, end in pairwise(clock))
        times |= {name: clock[-1] - clock[0], f"{name}_per_trajectory_step": drawn / (groups * teacher.steps),
                  f"{name}_per_update": median(updates)}
    learned, identity = training.sums.tolist()
    return {**times, "ratio": learned / identity, "peak_memory_mib": memory.total_mib,
            "parameters": {"network": sum(each.numel() for each in teacher.net.parameters()),
                           "adaptor": sum(each.numel() for each in training.parameters)}}


def table_row(result: Mapping[str, Any]) -> dict[str, str]:
    settings, memory = result["settings"], result["peak_memory_mib"]
    network, adaptor = (result["parameters"][name] / 1e6 for name in ("network", "adaptor"))
    return {"network": f"{network:,.0f} M", "latents": f"{settings['latent']} x {settings['latent']}",
            "precision": settings["dtype"], "adaptor": f"{settings['adaptor']}, {adaptor:.2f} M",
            "clock": str(settings["clock"]),
            "trajectories x steps": f"{settings['trajectories']} x {settings['steps']}",
            "s a step": _seconds(result, "per_trajectory_step"),
            "updates x runs": f"{settings['updates']} x {settings['batch_size']}",
            "s an update": _seconds(result, "per_update"),
            "peak memory": EMPTY if memory is None else f"{memory:,.0f} MiB", "machine": result["machine"]}


def _seconds(result: Mapping[str, Any], name: str) -> str:
    processor = result.get(f"processor_seconds_{name}")
    return f"{result[f'seconds_{name}']:.3g}" + ("" if processor is None else f" (processor {processor:.3g})")


def read_table(paths: Iterable[str | Path]) -> str:
    """The table of result files, a row each. Raises UserError for a file that is none."""
    rows = []
    for path in paths:
        try:
            rows.append(table_row(json.loads(Path(path).read_text())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of libs.distillation.adaptor_speed ({reason(error)})") from error
    return markdown_table(rows)


def define_flags(fv) -> None:
    absl_flags.DEFINE_enum("width", "full", list(untrained.WIDTHS), "channels of the network; full is SD 1.5's",
                           flag_values=fv)
    absl_flags.DEFINE_integer("latent", 64, "height and width of the latents", flag_values=fv, lower_bound=8)
    absl_flags.DEFINE_enum("adaptor", "resnet", list(LEARNED), "what learns", flag_values=fv)
    absl_flags.DEFINE_integer("clock", 4, "every clock-th step is full; the adaptor unrolls over the others",
                              flag_values=fv, lower_bound=2)
    absl_flags.DEFINE_integer("steps", 8, "DDIM steps of a trajectory", flag_values=fv, lower_bound=2)
    absl_flags.DEFINE_integer("trajectories", 32, "images drawn; guidance makes two trajectories of each",
                              flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("rows", 1, "images in a call of the network", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("updates", 64, "of the adaptor", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("batch_size", 16, "unrolled runs in an update", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_enum("dtype", "bf16", list(DTYPES), "of the network; the adaptor learns in fp32", flag_values=fv)
    absl_flags.DEFINE_string("device", "auto", "auto, cuda, mps or cpu", flag_values=fv)
    absl_flags.DEFINE_string("out", None, "file for the result (.json)", flag_values=fv)


SETTINGS = ("width", "latent", "adaptor", "clock", "steps", "trajectories", "rows", "updates", "batch_size", "dtype")


def speed(_, flags) -> int:
    if flags.latent % 8:
        raise UserError(f"--latent={flags.latent} must be a multiple of 8: the network halves it three times")
    require_json(flags.out)
    processes = Processes(cli.choose_device(flags.device, "--device"))
    config = epoch_config(flags)
    check(config, processes.count)
    device = processes.device
    teacher = untrained_teacher(flags.width, flags.latent, flags.steps, flags.rows, device, DTYPES[flags.dtype])
    settings = {name: getattr(flags, name) for name in SETTINGS}
    result = {**measure(config, teacher, processes), "settings": settings, "protocol": PROTOCOL,
              "memory": MEMORY.get(device.type), "machine": machine(device),
              **origin("-m libs.distillation.adaptor_speed", None, flags, (*SETTINGS, "device", "out"))}
    tell(markdown_table([table_row(result)]), result, flags.out)
    return 0


def main(argv: list[str] | None = None) -> int:
    return cli.run(speed, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

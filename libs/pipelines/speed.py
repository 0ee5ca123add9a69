"""How fast the caching policies are on Stable Diffusion 1.5's architecture, beside what their multiply-adds promise.

    python -m libs.pipelines.speed --policies=plain,clockwork:4,encoder_propagation:parallel
    python -m libs.pipelines.speed --compile --batch=4
    python -m libs.pipelines.speed --width=small --latent=32 --steps=10

Whole denoising loops of a diffusers pipeline with random weights, DDIM, guidance in one call of the network a step;
text encoder and autoencoder are left out. The policies take turns, so that a busy machine slows all of them.

Policies: plain, clockwork:CLOCK, encoder_propagation[:parallel[:WINDOW]] with the paper's key steps, and, where
DeepCache is installed, deepcache:INTERVAL. --reference=DIR adds the Clockwork reference beside each clockwork:CLOCK;
DIR is the folder of a module `clockwork` that has its ClockworkWrapper.
"""

import copy
import importlib.util
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from statistics import median, quantiles
from typing import Any, NamedTuple

import torch
from absl import flags as absl_flags
from torch import nn
from tqdm import tqdm

from .. import cli
from ..benchmark import CLOCKS, SYNCHRONISED, CallClock, PeakMemory, synchronize
from ..cost import MacCounter, countable
from ..errors import UserError, choose
from ..files import reason, write_json
from ..markdown import EMPTY, markdown_table
from ..policies.clockwork import Clockwork
from ..policies.encoder_propagation import EncoderPropagation
from ..provenance import machine, origin
from . import untrained
from .apply import apply_policy

FLAGS = ("policies", "reference", "steps", "batch", "latent", "width", "dtype", "device", "compile", "compile_mode",
         "repeats", "out")
PROTOCOL = ("a timed loop is one call of the pipeline that hands out latents, the device synchronised before and "
            "after it; after a loop in which multiply-adds are counted and one to warm up, {repeats} rounds, each "
            "policy once a round; ratios are medians of a policy's time over the plain one's of the same round, "
            "on a CPU also of processor time, which a busy machine disturbs less; ms_outside is the time of a loop "
            "that is not spent inside the network's own calls ({clock}): the scheduler's and, beyond the plain "
            "pipeline's, the policy's own; bookkeeping is that excess over the time of the loop")
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RATIOS = {"time": "time_ratio", "processor time": "processor_time_ratio", "MACs": "macs_ratio"}  # to the plain one's
GRAPHS = 64  # that torch.compile may make of one function: the policies' networks share it

# Switched on on a pipeline: what begins an image, and what tells the calls so far.
Policy = Callable[[Any], tuple[Callable[[], Any], Callable[[], Mapping[str, int]]]]


class Times(NamedTuple):
    """Seconds of a loop, of these inside the network's own calls, and those of the host's processor (all threads)."""

    loop: float
    network: float
    processor: float

    @property
    def outside(self) -> float:
        return self.loop - self.network


class NetworkClock(CallClock):
    """A CallClock that torch.compile steps over: what it times is compiled, the clock is not."""

    __call__ = torch.compiler.disable(CallClock.__call__, recursive=False)
    _mark = torch.compiler.disable(CallClock._mark)


class Runner:
    """One policy on a pipeline of its own, around a network that shares the weights of `net`."""

    def __init__(self, name: str, policy: Policy, net: nn.Module, compiled: Mapping[str, str] | None, **call):
        shared = {id(each): each for each in itertools.chain(net.parameters(), net.buffers())}
        inner = copy.deepcopy(net, shared)
        self.name, self.device = name, next(net.parameters()).device
        self.clock = inner.forward = NetworkClock(inner.forward, self.device)
        self.pipe, kwargs = untrained.text_to_image(inner, **call)
        size = call["latent"]
        given = {"latents": untrained.random(call["batch"], 4, size, size)}
        self.kwargs = {key: value.to(self.device, net.dtype) if torch.is_tensor(value) else value
                       for key, value in (kwargs | given).items()}
        if compiled is not None:
            self.pipe.unet = torch.compile(self.pipe.unet, **compiled)
        self.reset, self.stats = policy(self.pipe)
        self.times: list[Times] = []
        self.peak_mib: float | None = None

    def count(self) -> None:
        """Count the multiply-adds and the calls of a loop."""
        with countable(self.pipe.unet), MacCounter() as counter:
            self.loop()
        self.gmacs, self.calls = counter.total / 1e9, dict(self.stats())

    def loop(self) -> Times:
        self.clock.marks.clear()
        self.reset()
        synchronize(self.device)
        start, busy = time.perf_counter(), time.process_time()
        self.pipe(**self.kwargs)
        synchronize(self.device)
        return Times(time.perf_counter() - start, self.clock.seconds(), time.process_time() - busy)

    def time(self) -> None:
        with PeakMemory(self.device) as memory:
            self.times.append(self.loop())
        self.peak_mib = memory.mib


def nothing() -> dict[str, int]:
    return {}


def plain(pipe: Any):
    return nothing, nothing


def caching(settings: Clockwork | EncoderPropagation) -> Policy:
    def switch_on(pipe: Any):
        handle = apply_policy(pipe, settings)
        return nothing, handle.stats

    return switch_on


def deepcache(interval: int) -> Policy:
    def switch_on(pipe: Any):
        from DeepCache import DeepCacheSDHelper

        helper = DeepCacheSDHelper(pipe=pipe)
        helper.set_params(cache_interval=interval, cache_branch_id=0)
        helper.enable()
        return nothing, nothing

    return switch_on


def reference(module: Any, clock: int) -> Policy:
    """Clockwork by the code that its authors released."""
    def switch_on(pipe: Any):
        wrapper = module.ClockworkWrapper(pipe.unet, clock=clock)
        if not hasattr(wrapper, "dtype"):  # today's diffusers asks for it
            wrapper.dtype = pipe.unet.dtype
        pipe.unet = wrapper
        return wrapper.reset, nothing

    return switch_on


def parse_policy(text: str) -> Policy:
    """The policy that a word of --policies names. Raises UserError."""
    name, *options = text.split(":")
    choose("--policies", name, ("plain", "clockwork", "encoder_propagation", "deepcache"))
    if name == "encoder_propagation":
        if options and options[0] != "parallel" or len(options) > 2:
            raise UserError(f"--policies={text}: want encoder_propagation[:parallel[:WINDOW]]")
        window = {"max_parallel": _number(text, options[1])} if options[1:] else {}
        return caching(EncoderPropagation(parallel=bool(options), **window))
    if name == "plain" and not options:
        return plain
    if name == "plain" or len(options) != 1:
        raise UserError(f"--policies={text}: want plain, clockwork:CLOCK or deepcache:INTERVAL")
    if name == "clockwork":
        return caching(Clockwork(_number(text, options[0])))
    if importlib.util.find_spec("DeepCache") is None:
        raise UserError(f"--policies={text}: DeepCache is not installed (pip install -r requirements-peers.txt)")
    return deepcache(_number(text, options[0]))


def _number(text: str, word: str) -> int:
    if not word.isdecimal() or int(word) < 1:
        raise UserError(f"--policies={text}: {word!r} must be a whole number of at least 1")
    return int(word)


def import_reference(folder: str) -> Any:
    """The module `clockwork` in `folder`. Raises UserError where there is none with a ClockworkWrapper."""
    spec = PathFinder.find_spec("clockwork", [str(Path(folder).resolve())])
    if spec is None or spec.loader is None:
        raise UserError(f"--reference={folder}: there is no module `clockwork`")
    module = sys.modules["clockwork"] = importlib.util.module_from_spec(spec)  # there for its own imports
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise UserError(f"--reference={folder}: its module `clockwork` cannot be imported ({reason(error)})") from error
    if not hasattr(module, "ClockworkWrapper"):
        raise UserError(f"--reference={folder}: its module `clockwork` has no ClockworkWrapper")
    return module


def chosen_policies(words: Sequence[str], folder: str) -> dict[str, Policy]:
    """The policies by name, plain first, those of the reference behind their counterparts."""
    policies = {"plain": plain}
    module = import_reference(folder) if folder else None
    for word in words:
        policies[word] = parse_policy(word)
        if module is not None and word.startswith("clockwork:"):
            policies[f"reference_{word}"] = reference(module, int(word.partition(":")[2]))
    return policies


def measure(runners: Sequence[Runner], repeats: int) -> list[dict[str, Any]]:
    """Count, warm up and time the runners in turns; a row of the result for each. The first one is the plain one."""
    with tqdm(total=len(runners) * (2 + repeats), desc="speed", unit="loop") as bar:
        for act in (Runner.count, Runner.loop, *[Runner.time] * repeats):
            for runner in runners:
                bar.set_postfix_str(runner.name)
                act(runner)
                bar.update()
    return [row(runner, runners[0]) for runner in runners]


def row(runner: Runner, base: Runner) -> dict[str, Any]:
    """What was measured of a policy; times in ms."""
    times = [1000 * each.loop for each in runner.times]
    low, middle, high = quantiles(times, n=4, method="inclusive")
    rounds = list(zip(runner.times, base.times, strict=True))
    ratios = {"time_ratio": median(own.loop / other.loop for own, other in rounds)}
    if runner.device.type == "cpu":
        ratios["processor_time_ratio"] = median(own.processor / other.processor for own, other in rounds)
    return {"policy": runner.name,
            "ms": {"median": middle, "lower_quartile": low, "upper_quartile": high}, **ratios,
            "gmacs": runner.gmacs, "macs_ratio": runner.gmacs / base.gmacs, "calls_of_a_loop": runner.calls,
            "ms_outside": 1000 * median(each.outside for each in runner.times),
            "bookkeeping": median((own.outside - other.outside) / own.loop for own, other in rounds),
            "peak_memory_mib": runner.peak_mib}


def table(result: Mapping[str, Any]) -> str:
    """The Markdown table of a result file, a row a policy."""
    return markdown_table(table_row(row) for row in result["policies"])


def table_row(row: Mapping[str, Any]) -> dict[str, str]:
    ms, memory, calls = row["ms"], row["peak_memory_mib"], row["calls_of_a_loop"]
    return {"policy": row["policy"], "milliseconds": f"{ms['median']:,.0f}",
            "quartiles": f"{ms['lower_quartile']:,.0f} - {ms['upper_quartile']:,.0f}",
            "speed-up": f"{1 / row['time_ratio']:.2f} x",
            **{title: f"{row[name]:.3f}" for title, name in RATIOS.items() if name in row},
            "full + reusing calls": f"{calls['full_calls']} + {calls['reuse_calls']}" if calls else EMPTY,
            "bookkeeping": f"{row['bookkeeping']:.2%}",
            "peak memory": EMPTY if memory is None else f"{memory:,.0f} MiB"}


def read_table(paths: Iterable[str | Path]) -> str:
    """The tables of result files. Raises UserError for a file that is none."""
    tables = []
    for path in paths:
        try:
            tables.append(table(json.loads(Path(path).read_text())))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(f"{path} is no result of libs.pipelines.speed ({reason(error)})") from error
    return "\n\n".join(tables)


def define_flags(fv) -> None:
    absl_flags.DEFINE_list("policies", ["plain", "clockwork:4", "encoder_propagation", "encoder_propagation:parallel"],
                           "what is timed; plain always is", flag_values=fv)
    absl_flags.DEFINE_string("reference", "", "folder with the Clockwork reference's module", flag_values=fv)
    absl_flags.DEFINE_integer("steps", 50, "DDIM steps", flag_values=fv, lower_bound=1)
    absl_flags.DEFINE_integer("batch", 1, "images a loop; the network sees twice as many rows", flag_values=fv,
                              lower_bound=1)
    absl_flags.DEFINE_integer("latent", 64, "height and width of the latents", flag_values=fv, lower_bound=8)
    absl_flags.DEFINE_enum("width", "full", list(untrained.WIDTHS), "channels of the network; full is SD 1.5's",
                           flag_values=fv)
    absl_flags.DEFINE_enum("dtype", "fp16", list(DTYPES), "of weights and latents", flag_values=fv)
    absl_flags.DEFINE_string("device", "auto", "auto, cuda, mps or cpu", flag_values=fv)
    absl_flags.DEFINE_boolean("compile", False, "torch.compile every network", flag_values=fv)
    absl_flags.DEFINE_string("compile_mode", "default", "mode of torch.compile", flag_values=fv)
    absl_flags.DEFINE_integer("repeats", 5, "timed rounds", flag_values=fv, lower_bound=2)
    absl_flags.DEFINE_string("out", "outputs/speed.json", "the result file", flag_values=fv)


def speed(_, flags) -> None:
    if flags.latent % 8:
        raise UserError(f"--latent={flags.latent} must be a multiple of 8: the network halves it three times")
    if flags.compile:
        choose("--compile_mode", flags.compile_mode, list(torch._inductor.list_mode_options()))
        if flags.reference:
            raise UserError("--reference: ClockworkWrapper takes no compiled network; leave --compile out")
    device, policies = cli.choose_device(flags.device, "--device"), chosen_policies(flags.policies, flags.reference)
    out = Path(flags.out)
    cli.output_dir(out.parent)
    net = nn.Module.to(untrained.unet(flags.width), device, DTYPES[flags.dtype])  # diffusers' own warns of a cast
    call = {"steps": flags.steps, "latent": flags.latent, "batch": flags.batch}
    compiled = {"mode": flags.compile_mode} if flags.compile else None
    with torch._dynamo.config.patch(recompile_limit=GRAPHS):
        rows = measure([Runner(*policy, net, compiled, **call) for policy in policies.items()], flags.repeats)
    clock = CLOCKS.get(device.type, SYNCHRONISED)
    result = {"policies": rows, "protocol": PROTOCOL.format(repeats=flags.repeats, clock=clock),
              "settings": call | {"width": flags.width, "dtype": flags.dtype, "repeats": flags.repeats,
                                  "compile": compiled and compiled["mode"]},
              "parameters": sum(each.numel() for each in net.parameters()),
              "machine": machine(device), **origin("-m libs.pipelines.speed", None, flags, FLAGS)}
    write_json(out, result)
    sys.stdout.write(table(result) + "\n")


def main(argv: list[str] | None = None) -> int:
    return cli.run(speed, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

"""What goes wrong with UNet caching in a real pipeline: the same checks on our policies and on the installed peers.

    python -m libs.pipelines.safety --out=outputs/safety.json

Every cell of the table starts from fresh pipelines of a tiny Stable Diffusion with random weights. "ok" is equality of
all bits unless the check says otherwise; "differs by" is the largest absolute difference of the latents. Peers that
are not installed are rows that say so: pip install -r requirements-peers.txt
"""

import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from absl import flags as absl_flags
from diffusers import HeunDiscreteScheduler
from torch import Tensor
from tqdm import tqdm

from .. import cli
from ..errors import UserError, choose
from ..files import reason, write_json
from ..markdown import markdown_table
from ..provenance import origin
from . import untrained
from .peers import STEPS, TOOLS, Tool, installed

COMPILED_STEPS = 12
CLOSE = 1e-4  # relative: where rows are batched otherwise, or kernels are others
LONGEST = 90  # characters of a cell


class Finding(Exception):
    """What is wrong, in a few words."""


class DoesNotApply(Exception):
    """The check makes no sense for the tool."""


def pipeline(kind: str = "text_to_image", steps: int = STEPS):
    """(fresh pipeline, arguments of its call)."""
    net = untrained.unet("tiny")
    if kind == "controlnet":
        return untrained.controlled(net, untrained.control_net("tiny"), steps)
    return getattr(untrained, kind)(net, steps)


def fresh(tool: Tool, kind: str = "text_to_image", steps: int = STEPS):
    """(fresh pipeline with the tool on, what draws on it, arguments of its call)."""
    pipe, kwargs = pipeline(kind, steps)
    return pipe, tool.switch_on(pipe), kwargs


def image(draw: Callable[..., Any], kwargs: Mapping[str, Any], seed: int = 0, **others) -> Tensor:
    """Latents (1, 4, h, w). The global generator is seeded too, for tools that have random numbers of their own."""
    torch.manual_seed(seed)
    latents = draw(**kwargs | others, generator=torch.Generator().manual_seed(seed)).images
    if not latents.isfinite().all():
        raise Finding("not finite")
    return latents


def expect_equal(a: Tensor, b: Tensor, tolerance: float = 0.0) -> None:
    """Raise a Finding unless the largest difference is at most `tolerance` times the largest value."""
    if a.shape != b.shape:
        raise Finding(f"shape {tuple(a.shape)} instead of {tuple(b.shape)}")
    difference = float((a - b).abs().max())
    if not difference <= tolerance * float(b.abs().max()):
        raise Finding(f"differs by {difference:.2g}")


def expect_different(a: Tensor, b: Tensor, what: str) -> None:
    if torch.equal(a, b):
        raise Finding(f"{what} has no effect")


def acts(tool: Tool) -> None:
    """the image is not the plain one"""
    _, running, kwargs = fresh(tool)
    expect_different(image(running.draw, kwargs), image(*pipeline()), "it")


def off(tool: Tool) -> None:
    """switched off after an image, the pipeline draws as one on which it never was"""
    pipe, running, kwargs = fresh(tool)
    image(running.draw, kwargs)
    running.off()
    expect_equal(image(pipe, kwargs), image(*pipeline()))


def second_image(tool: Tool) -> None:
    """the second image of a pipeline is the first of a fresh one"""
    _, running, kwargs = fresh(tool)
    image(running.draw, kwargs)
    again = image(running.draw, kwargs, seed=1)
    _, running, kwargs = fresh(tool)
    expect_equal(again, image(running.draw, kwargs, seed=1))


def other_steps(tool: Tool) -> None:
    """an image after one with another number of steps is that of a fresh pipeline"""
    _, running, kwargs = fresh(tool)
    image(running.draw, kwargs, num_inference_steps=STEPS - 1)
    after = image(running.draw, kwargs)
    _, running, kwargs = fresh(tool)
    expect_equal(after, image(running.draw, kwargs))


def strengths(tool: Tool) -> None:
    """image to image: strength 0.5 after 0.9 is that of a fresh pipeline"""
    _, running, kwargs = fresh(tool, "image_to_image", steps=10)
    strong = image(running.draw, kwargs, strength=0.9)
    after = image(running.draw, kwargs, strength=0.5)
    _, running, kwargs = fresh(tool, "image_to_image", steps=10)
    want = image(running.draw, kwargs, strength=0.5)
    expect_different(strong, want, "strength")
    expect_equal(after, want)


def exception(tool: Tool) -> None:
    """an image after one that an exception broke off is that of a fresh pipeline"""
    class Broken(Exception):
        pass

    def break_off(pipe: Any, step: int, timestep: Tensor, state: dict) -> dict:
        if step == 2:
            raise Broken
        return state

    _, running, kwargs = fresh(tool)
    try:
        image(running.draw, kwargs, callback_on_step_end=break_off)
    except Broken:
        after = image(running.draw, kwargs)
    else:
        raise Finding("callback_on_step_end was not called")
    _, running, kwargs = fresh(tool)
    expect_equal(after, image(running.draw, kwargs))


def twice(tool: Tool) -> None:
    """switched on twice, it raises a ValueError or draws the same image"""
    pipe, running, kwargs = fresh(tool)
    try:
        if running.again is not None:
            running.again()
        else:
            running = tool.switch_on(pipe)
    except ValueError as error:
        if not str(error):
            raise
    after = image(running.draw, kwargs)
    _, running, kwargs = fresh(tool)
    expect_equal(after, image(running.draw, kwargs))


def separate_guidance(tool: Tool) -> None:
    """guidance in two calls of the UNet a step draws what it draws in one call (relative 1e-4)"""
    images = []
    for separate in (True, False):
        pipe, running, kwargs = fresh(tool)
        if running.draw is not pipe:
            raise DoesNotApply
        images.append(guided_loop(pipe, kwargs, separate))
    expect_equal(*images, CLOSE)


@torch.no_grad()
def guided_loop(pipe: Any, kwargs: Mapping[str, Any], separate: bool) -> Tensor:
    """A denoising loop as users write it themselves, (1, 4, h, w)."""
    torch.manual_seed(0)
    size = kwargs["height"] // untrained.FACTOR
    texts = [kwargs["negative_prompt_embeds"], kwargs["prompt_embeds"]]
    x = untrained.random(1, 4, size, size)
    pipe.scheduler.set_timesteps(kwargs["num_inference_steps"])
    for t in pipe.scheduler.timesteps:
        if separate:
            null, text = (pipe.unet(x, t, encoder_hidden_states=each).sample for each in texts)
        else:
            null, text = pipe.unet(torch.cat([x, x]), t, encoder_hidden_states=torch.cat(texts)).sample.chunk(2)
        x = pipe.scheduler.step(null + kwargs["guidance_scale"] * (text - null), t, x).prev_sample
    return x


def heun(tool: Tool) -> None:
    """Heun, which asks for most timesteps twice: runs, and the second image is that of a fresh pipeline"""
    def draw(seeds: Iterable[int]) -> Tensor:
        pipe, running, kwargs = fresh(tool)
        pipe.scheduler = HeunDiscreteScheduler.from_config(pipe.scheduler.config)
        return [image(running.draw, kwargs, seed) for seed in seeds][-1]

    expect_equal(draw((0, 1)), draw((1,)))


def controlnet(tool: Tool) -> None:
    """a ControlNet runs and steers, also after another control image"""
    _, running, kwargs = fresh(tool, "controlnet")
    first = image(running.draw, kwargs)
    other = {"image": 1 - kwargs["image"]}
    after = image(running.draw, kwargs, **other)
    expect_different(first, after, "the ControlNet")
    _, running, kwargs = fresh(tool, "controlnet")
    expect_equal(after, image(running.draw, kwargs, **other))


def graphs(tool: Tool) -> str:
    """graphs that torch.compile makes of two images of 12 steps, whose pictures stay the same (relative 1e-4)"""
    from torch import _dynamo as dynamo

    _, running, kwargs = fresh(tool, steps=COMPILED_STEPS)
    want = image(running.draw, kwargs)
    count = 0

    def backend(graph: torch.fx.GraphModule, inputs: list) -> Callable:
        nonlocal count
        count += 1
        return graph.forward

    dynamo.reset()
    pipe, kwargs = pipeline(steps=COMPILED_STEPS)
    pipe.unet = torch.compile(pipe.unet, backend=backend)
    try:
        running = tool.switch_on(pipe)
        with dynamo.config.patch(fail_on_recompile_limit_hit=True):
            first, _ = (image(running.draw, kwargs, seed) for seed in (0, 1))
    except dynamo.exc.FailOnRecompileLimitHit:
        return f"{count}, then the recompile limit"
    finally:
        dynamo.reset()
    expect_equal(first, want, CLOSE)
    return str(count)


CHECKS: dict[str, Callable[[Tool], str | None]] = {
    "does something": acts,
    "off is never on": off,
    "second image": second_image,
    "other steps": other_steps,
    "strength 0.9, 0.5": strengths,
    "after an exception": exception,
    "on twice": twice,
    "separate guidance": separate_guidance,
    "Heun": heun,
    "ControlNet": controlnet,
    "compiled graphs": graphs,
}


def cell(tool: Tool, check: Callable[[Tool], str | None]) -> str:
    """What a check finds, whatever it raises."""
    try:
        with torch.random.fork_rng(devices=[]):
            return check(tool) or "ok"
    except DoesNotApply:
        return "does not apply"
    except Finding as finding:
        return str(finding)
    except Exception as error:
        text = f"{type(error).__name__}: {reason(error)}"
        return text if len(text) <= LONGEST else f"{text[:LONGEST - 3]}..."


def measure(tools: Iterable[Tool], checks: Mapping[str, Callable] = CHECKS) -> Iterator[dict[str, Any]]:
    """One row a tool: {"tool", "version", "checks": {check: what was found}}; no checks if it is not installed."""
    tools = list(tools)
    with tqdm(total=len(tools) * len(checks), desc="safety", unit="check") as bar:
        for tool in tools:
            held, found = installed(tool), {}
            for name, check in checks.items():
                bar.set_postfix_str(f"{tool.label}: {name}")
                if held is not None:
                    found[name] = cell(tool, check)
                bar.update()
            yield {"tool": tool.label, "version": held, "checks": found}


def table(result: Mapping[str, Any]) -> str:
    """The Markdown table of a result file, a row a tool."""
    return markdown_table(
        {"tool": " ".join(filter(None, [row["tool"], row["version"]]))}
        | {check: row["checks"].get(check, "not installed").replace("|", "\\|") for check in result["checks"]}
        for row in result["tools"])


def read_table(paths: Iterable[str | Path]) -> str:
    """The tables of result files. Raises UserError for a file that is none."""
    tables = []
    for path in paths:
        try:
            tables.append(table(json.loads(Path(path).read_text())))
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path} is no result of libs.pipelines.safety ({reason(error)})") from error
    return "\n\n".join(tables)


def define_flags(fv) -> None:
    absl_flags.DEFINE_list("tools", list(TOOLS), "rows of the table", flag_values=fv)
    absl_flags.DEFINE_string("out", "outputs/safety.json", "the result file", flag_values=fv)


def safety(_, flags) -> None:
    tools = [choose("--tools", name, TOOLS) for name in flags.tools]
    out = Path(flags.out)
    cli.output_dir(out.parent)
    result = {"checks": {name: check.__doc__ for name, check in CHECKS.items()}, "tools": list(measure(tools)),
              **origin("-m libs.pipelines.safety", None, flags, ("tools", "out"))}
    write_json(out, result)
    sys.stdout.write(table(result) + "\n")


def main(argv: list[str] | None = None) -> int:
    return cli.run(safety, define_flags, argv, takes_config="no")


if __name__ == "__main__":
    sys.exit(main())

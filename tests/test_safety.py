"""The safety table finds what is broken in a tool made to be broken, and nothing in ours."""

import functools
import json
from types import SimpleNamespace

import pytest
import torch

from libs.errors import UserError
from libs.pipelines import safety
from libs.pipelines.peers import TOOLS, Running, Tool
from libs.pipelines.safety import CHECKS


def leaky(pipe) -> Running:
    """Scales the UNet's output by more with every call it ever made, and cannot be switched off or on twice."""
    plain, calls = pipe.unet.forward, []
    if getattr(plain, "leaky", False):
        raise RecursionError("forward calls itself\nin a second line")

    def forward(sample, timestep, encoder_hidden_states, **kwargs):
        calls.append(timestep)
        out = plain(sample, timestep, encoder_hidden_states=encoder_hidden_states, **kwargs)
        scale = 1 - 0.01 * len(calls)
        return (out[0] * scale,) if isinstance(out, tuple) else type(out)(sample=out.sample * scale)

    forward.leaky = True
    pipe.unet.forward = forward
    return Running(pipe, lambda: None)


def deaf(pipe) -> Running:
    """Takes no notice of the control image, and draws by a method of its own."""
    nothing = torch.zeros(1, 3, 64, 64)
    return Running(lambda **kwargs: pipe(**kwargs | ({"image": nothing} if "image" in kwargs else {})), lambda: None)


def found(tool: Tool, *checks: str) -> dict[str, str]:
    return {check: safety.cell(tool, CHECKS[check]) for check in checks}


@pytest.mark.parametrize(("tool", "checks"), [
    ("clockwork", ["strength 0.9, 0.5", "on twice", "Heun", "ControlNet"]),
    ("encoder_propagation_parallel", ["does something", "off is never on", "other steps", "separate guidance"]),
])
def test_ours_pass(tool, checks):
    assert found(TOOLS[tool], *checks) == dict.fromkeys(checks, "ok")


def test_a_leaky_tool():
    cells = found(Tool("leaky", leaky), "off is never on", "second image", "after an exception", "separate guidance",
                  "on twice")
    assert cells.pop("on twice") == "RecursionError: forward calls itself"
    assert all(text.startswith("differs by ") and float(text.split()[-1]) > 1e-4 for text in cells.values()), cells


def test_a_tool_that_does_nothing():
    cells = found(Tool("deaf", deaf), "ControlNet", "separate guidance")
    assert list(cells.values()) == ["the ControlNet has no effect", "does not apply"]


@pytest.mark.parametrize(("spoils", "text"), [(False, "ok"), (True, "differs by")])
def test_refusing_a_second_time_is_right_if_the_first_still_works(spoils, text):
    def refuses(pipe) -> Running:
        if hasattr(pipe, "is_on"):
            if spoils:
                pipe.unet.conv_out.bias.data += 1
            raise ValueError("it is on already")
        pipe.is_on = True
        return Running(pipe, lambda: None)

    assert found(Tool("refuses", refuses), "on twice")["on twice"].startswith(text)


class Loop:
    """A pipeline of one small layer, which compiles in no time."""

    def __init__(self):
        self.unet = torch.nn.Linear(4, 4)

    @torch.no_grad()
    def __call__(self, num_inference_steps: int, generator: torch.Generator) -> SimpleNamespace:
        x = torch.randn(1, 4, generator=generator)
        for _ in range(num_inference_steps):
            x = self.unet(x)
        return SimpleNamespace(images=x)


def counting(pipe: Loop) -> Running:
    """Does something else in every call, which torch.compile can only follow by another graph."""
    inner = getattr(pipe.unet, "_orig_mod", pipe.unet)
    plain, state = type(inner).forward, SimpleNamespace(calls=())

    def forward(x):
        state.calls = (*state.calls, None)
        return plain(inner, x) * len(state.calls)

    inner.forward = forward
    return Running(pipe, lambda: None)


@pytest.mark.parametrize(("switch_on", "graphs"), [
    (lambda pipe: Running(pipe, lambda: None), "1"),
    (counting, "8, then the recompile limit"),
])
def test_graphs_are_counted(switch_on, graphs, monkeypatch):
    def pipeline(steps):
        torch.manual_seed(0)
        return Loop(), {"num_inference_steps": steps}

    monkeypatch.setattr(safety, "pipeline", lambda kind="text_to_image", steps=safety.STEPS: pipeline(steps))
    assert found(Tool("", switch_on), "compiled graphs") == {"compiled graphs": graphs}


def test_the_table_renders():
    rows = list(safety.measure([Tool("deaf", deaf), Tool("absent", deaf, "no-such-package")],
                               {"does something": safety.acts}))
    result = {"checks": {"does something": ""}, "tools": rows}
    assert safety.table(result).splitlines() == [
        "| tool | does something |", "| --- | --- |", "| deaf | it has no effect |", "| absent | not installed |"]


def test_a_result_file_and_what_is_none(tmp_path, monkeypatch, run_main):
    monkeypatch.setattr(safety, "TOOLS", {"deaf": Tool("deaf", deaf)})
    checks = {"second image": CHECKS["second image"]}
    monkeypatch.setattr(safety, "measure", functools.partial(safety.measure, checks=checks))
    ran = run_main(safety.main, "--tools=deaf", f"--out={tmp_path}/safety.json")
    assert ran.status == 0
    result = json.loads((tmp_path / "safety.json").read_text())
    assert result["tools"] == [{"tool": "deaf", "version": "", "checks": {"second image": "ok"}}]
    assert ran.stdout.strip() == safety.read_table([tmp_path / "safety.json"])
    (tmp_path / "none.json").write_text("[1]")
    for name in ("none.json", "missing.json"):
        with pytest.raises(UserError, match=f"{name} is no result of libs.pipelines.safety"):
            safety.read_table([tmp_path / name])


def test_an_unknown_tool(run_main):
    ran = run_main(safety.main, "--tools=deepcash")
    assert (ran.status, ran.stderr.count("\n")) == (2, 1)
    assert "--tools='deepcash' is unknown; choose from clockwork, " in ran.stderr

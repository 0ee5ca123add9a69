"""Models of the user's own: which files and functions are taken, and the commands with them."""

import copy
import json

import pytest
import torch

import distillate
import sample
import train
from libs import build
from libs import config as config_files
from libs.checkpoint import build_backbone, load_described, read, save_backbone
from libs.errors import UserError
from libs.factory import load_function

MODULE = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, channels=1, labels=0):
        super().__init__()
        self.conv = nn.Conv2d(channels, 8, 3, padding=1)
        self.time = nn.Linear(1, 8)
        self.label = nn.Embedding(labels, 8) if labels else None
        self.out = nn.Conv2d(8, channels, 3, padding=1)
        self.image_size = [1, channels, 8, 8]

    def forward(self, x, t, **extra_args):
        assert x.dtype == t.dtype == torch.float32
        hidden = self.time(t[:, None] / 1024)
        if self.label is not None:
            hidden = hidden + self.label(extra_args["y"])
        return self.out(torch.relu(self.conv(x) + hidden[:, :, None, None]))

class TimeOnly(Net):
    def forward(self, x, t):
        return super().forward(x, t)

class Labelled(Net):
    def forward(self, x, t, y):
        return super().forward(x, t, y=y)

class Looks(TimeOnly):
    def forward(self, x, t):
        if x.sum().item() > 1e9:
            raise RuntimeError
        return super().forward(x, t)

class Both(TimeOnly):
    def forward(self, x, t):
        return torch.cat([x - super().forward(x, t), super().forward(x, t)], dim=1)

class Triples(Net):
    def forward(self, x, t):
        return torch.cat([x, x, x], dim=1)

class Tuples(Net):
    def forward(self, x, t):
        return x, t

class Fails(Net):
    def forward(self, x, t):
        return self.nothing(x)

class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.module = Net()
        self.image_size = [1, 1, 8, 8]

    def forward(self, x, t):
        return self.module(x, t)

def make_model():
    return TimeOnly()

def make_labelled():
    return Labelled(labels=11)

def make_any(): return Net()
def make_nested(): return Nested()
def make_looking(): return Looks()
def make_both(): return Both()
def make_tripling(): return Triples()
def make_tuple(): return Tuples()
def make_failing(): return Fails()
def make_nothing(): return None
def make_colour(): return TimeOnly(3)

def make_sizeless():
    net = Net()
    net.image_size = 8
    return net

def make_error():
    raise KeyError("a\\nb")

NUMBER = 3
"""


@pytest.fixture
def module(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(MODULE)
    return path


def section(module, name="make_model"):
    return {"name": "factory", "factory": f"{module}:{name}"}


def test_load_function(tmp_path, monkeypatch):
    (tmp_path / "neighbour_of_own.py").write_text("VALUE = 7")
    (tmp_path / "own.py").write_text("from neighbour_of_own import VALUE\ndef make(add=0): return VALUE + add")
    monkeypatch.chdir(tmp_path)
    assert load_function("data.factory", "own.py:make")() == 7
    assert load_function("data.factory", f"{tmp_path}/own.py:make")(add=1) == 8
    (tmp_path / "own.py").write_text("from neighbour_of_own import VALUE\ndef make(add=0): return VALUE - add")
    assert load_function("data.factory", "own.py:make")(add=1) == 6  # no stale code


@pytest.mark.parametrize(("source", "name", "problem"), [
    ("", "", "data.factory is empty; give --config.data.factory=path/to/module.py:function"),
    ("", "{path}", "want path/to/module.py:function"),
    ("", "{path}:", "want path/to/module.py:function"),
    ("", "{path}x:make", "there is no file {path}x"),
    ("def make(): pass", "{path}:mak", "own.py has no function mak"),
    ("make = 3", "{path}:make", "own.py has no function make"),
    ("x = 1\n1 / 0", "{path}:make", "ZeroDivisionError in line 2: division by zero"),
    ("import nosuchmodule", "{path}:make", "ModuleNotFoundError in line 1: No module named 'nosuchmodule'"),
    ("def make(:", "{path}:make", "SyntaxError in line 1: "),
    ("import sys\nsys.exit('usage')", "{path}:make", "SystemExit in line 2: usage"),
    ("def make():\n    raise KeyError('a\\nb')", "{path}:make", "KeyError in line 2: "),
])
def test_bad_factory(tmp_path, source, name, problem):
    path = tmp_path / "own.py"
    path.write_text(source)
    for _ in range(2):  # a file that failed is no half-made module the second time
        with pytest.raises(UserError) as caught:
            load_function("data.factory", name.format(path=path))()
        text = str(caught.value)
        assert text.startswith("data.factory")
        assert problem.format(path=path) in text
        assert "\n" not in text


def test_model_behind_our_call(module):
    net = build_backbone(section(module))
    assert list(net.state_dict()) == [f"{layer}.{kind}" for layer in ("conv", "time", "out")
                                      for kind in ("weight", "bias")]
    assert net.training
    x, t = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0])
    hidden = net.conv(x) + net.time(t[:, None] / 1024)[:, :, None, None]
    expect = net.out(torch.relu(hidden))
    assert torch.equal(net(x, t, y=None, context=None), expect)
    assert torch.equal(copy.deepcopy(net)(x, t, y=None, context=None), expect)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    assert torch.allclose(compiled(x, t, y=None, context=None), expect, atol=1e-6)
    with pytest.raises(UserError, match="the model takes no y"):
        net(x, t, y=torch.tensor([1, 2]))
    with pytest.raises(UserError, match=r"image_size is \[1, 1, 8, 8\], but .* images of 1 x 16 x 16"):
        net(torch.randn(2, 1, 16, 16), t)


@pytest.mark.parametrize("name", ["make_any", "make_looking"])
def test_other_forms_of_a_model(module, name):
    net = build_backbone(section(module, name))
    x = torch.randn(2, 1, 8, 8)
    assert net(x, torch.tensor([1.0, 2.0]), y=None, context=None).shape == x.shape


def test_labels(module):
    net = build_backbone(section(module, "make_labelled"))
    x, t, y = torch.randn(2, 1, 8, 8), torch.tensor([3.0, 900.0]), torch.tensor([0, 10])
    assert not torch.equal(net(x, t, y=y, context=None), net(x, t, y=y.flip(0), context=None))


@pytest.mark.parametrize(("name", "problem"), [
    ("make_tripling", r"makes \(1, 3, 8, 8\) of an image of its image_size \(1, 1, 8, 8\); want the same shape"),
    ("make_tuple", r"makes None of an image"),
    ("make_failing", r"fails on an image of its image_size .*: AttributeError in line \d+: .*nothing"),
    ("make_nothing", "returns a NoneType, not an nn.Module"),
    ("make_sizeless", r"image_size is 8; want \[1, channels, height, width\]"),
    ("make_error", "KeyError in line"),
    ("NUMBER", "has no function NUMBER"),
])
def test_bad_model(module, name, problem):
    with pytest.raises(UserError, match=problem) as caught:
        build_backbone(section(module, name))
    assert str(caught.value).startswith(f"backbone.factory='{module}:{name}'")
    assert "\n" not in str(caught.value)


def test_weights_choose_no_code(module, tmp_path):
    """The code is the config's, whatever file the weights name."""
    other = tmp_path / "other.py"
    other.write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n" + MODULE)
    net, weights = build_backbone(section(module)), tmp_path / "own.safetensors"
    save_backbone(weights, net.state_dict(), {"backbone": section(other)})
    for backbone in (None, {"name": "ddpm_unet"}):
        with pytest.raises(UserError, match=r"other.py:make_model.*name it by --config.backbone.factory"):
            load_described(weights, backbone)
    with pytest.raises(UserError, match="backbone.factory is empty; give --config.backbone.factory="):
        load_described(weights, {"name": "factory", "factory": ""})
    loaded, description = load_described(weights, section(module))
    assert not (tmp_path / "ran").exists()
    assert torch.equal(loaded.conv.weight, net.conv.weight)
    assert description["backbone"] == section(module)
    with pytest.raises(UserError, match="of another architecture: conv.weight has shape"):
        load_described(weights, section(module, "make_colour"))


@pytest.mark.parametrize("before", ["", "module."])
def test_an_own_model_may_call_its_network_module(module, tmp_path, before):
    """Its names are no DistributedDataParallel's, which may stand before them."""
    net = build_backbone(section(module, "make_nested"))
    assert {name.split(".")[0] for name in net.state_dict()} == {"module"}
    torch.save({before + name: each for name, each in net.state_dict().items()}, tmp_path / "own.pth")
    held = load_described(tmp_path / "own.pth", section(module, "make_nested"))[0].state_dict()
    assert all(torch.equal(held[name], each) for name, each in net.state_dict().items())


def test_checkpoint_pt_of_an_own_model(module, tmp_path):
    """diffusion_distiller's file for a module of diffusion_distiller's form; the codec stays the config's."""
    net = build_backbone(section(module))
    torch.save({"G": net.state_dict(), "n_timesteps": 8, "time_scale": 128}, tmp_path / "checkpoint.pt")
    config = config_files.load("configs/own_model.py")
    config.backbone.factory = f"{module}:make_model"
    config.data.update(image_size=8, channels=1)
    loaded, description = build.load_model(config, str(tmp_path / "checkpoint.pt"))
    assert torch.equal(loaded.conv.weight, net.conv.weight)
    assert description["denoiser"]["time_scale"] == 128
    assert description["codec"] == {"name": "pixel", "order": "rgb"}


def test_commands(run_main, module, tmp_path):
    """Train, distil and sample a model of one's own on the digits."""
    own = ("--config.data.name=digits", "--config.data.image_size=8", "--config.data.channels=1",
           "--config.compute.device=cpu", "--config.compute.rows=4", "--config.train.steps=2",
           "--config.train.batch_size=4", "--config.train.preview_every=0")
    model = f"--config.backbone.factory={module}:make_model"

    def run(main, method="", *flags):
        return run_main(main, f"--config=configs/own_model.py{method}", *own, *flags)

    workdir = tmp_path / "run"
    ran = run(train.main, "", f"--workdir={workdir}")
    assert ran.status == 2
    assert "error: backbone.factory is empty; give --config.backbone.factory=path/to/module.py:function" in ran.stderr
    ran = run(train.main, "", f"--config.backbone.factory={module}:make_colour", f"--workdir={workdir}")
    assert ran.status == 2
    assert "image_size is [1, 3, 8, 8], but data.channels and data.image_size make images of 1 x 8 x 8" in ran.stderr
    assert not (workdir / "config.json").exists()

    ran = run(train.main, "", model, f"--workdir={workdir}")
    assert ran.status == 0, ran.stderr
    _, description = read(workdir / "ckpts/00000002/backbone_ema.safetensors")
    assert description["backbone"] == section(module)
    ran = run(distillate.main, ":progressive", model, "--config.distill.start_steps=4",
              f"--checkpoint={workdir}", f"--workdir={tmp_path / 'students'}")
    assert ran.status == 0, ran.stderr
    out = tmp_path / "out"
    ran = run(sample.main, "", model, f"--checkpoint={tmp_path / 'students'}", "--seeds=0-1", f"--out={out}")
    assert ran.status == 0, ran.stderr
    assert json.loads((out / "summary.json").read_text())["nfe"] == 2

    both = f"--config.backbone.factory={module}:make_both"
    ran = run(train.main, "", both, f"--workdir={tmp_path / 'both'}")
    assert ran.stderr.endswith("make_both' makes 2 channels; want 1\n")
    ran = run(train.main, "", both, "--config.denoiser.prediction=both", f"--workdir={tmp_path / 'both'}")
    assert ran.status == 0, ran.stderr
    ran = run(distillate.main, ":progressive", both, "--config.distill.start_steps=4",
              f"--checkpoint={tmp_path / 'both'}", f"--workdir={tmp_path / 'students_of_both'}")
    assert ran.status == 0, ran.stderr
    ran = run(train.main, "", model, "--config.denoiser.prediction=both", f"--workdir={tmp_path / 'other'}")
    assert (ran.status, ran.stderr) == (2, f"error: denoiser.prediction='both': backbone.factory='{module}:make_model' "
                                           "makes 1 channels; want 2\n")
    assert not (tmp_path / "other").exists()

    ran = run(train.main, "", f"--config.backbone.factory={module}:make_labelled", "--config.cond.kind=label",
              "--config.cond.num_classes=10", "--config.cond.null_label=10", f"--workdir={tmp_path / 'labelled'}")
    assert ran.status == 0, ran.stderr

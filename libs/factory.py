"""Functions of the user's own files, named as `path/to/module.py:function`: a model or a data set.

A model's function takes no argument and returns an `nn.Module` with the attribute `image_size = [1, C, H, W]`, whose
call is `net(x, t)`: x (b, C, H, W) and t (b,) float32 -> (b, C, H, W), or (b, 2 C, H, W) of a model that predicts both
x_0 and eps; with labels `net(x, t, y=y)`, y (b,) int64; with
an image as its condition `net(x, t, concat=concat)`, (b, n, H, W), and the attribute `concat_channels = n`; with texts
`net(x, t, context=context)`, (b, tokens, width), and `context_shape = [tokens, width]`, or `net(x, t, vector=vector)`,
(b, d), and `vector_size = d`.
"""

import contextlib
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from .config import describe_error, find_file
from .errors import UserError

MODEL = "backbone.factory"


def load_function(field: str, text: str) -> Callable:
    """The function that `text`, "path/to/module.py:function", names: the config's `field` says so.

    The path is relative to the working directory or, failing that, to the repository. The file runs once a process,
    and may import its neighbours. Raises UserError for a text without a colon, a file that is missing or fails, and a
    function that is not there; so does the function itself when it fails.
    """
    path, name = _split(field, text)
    with _told(field, text, path):
        function = getattr(_run(path), name, None)
    if not callable(function):
        raise UserError(f"{field}={text!r}: {path.name} has no function {name}")

    @functools.wraps(function)
    def call(*args, **kwargs):
        with _told(field, text, path):
            return function(*args, **kwargs)

    return call


def make_network(factory: str = "") -> nn.Module:
    """The user's own model, called as all backbones: `net(x, timesteps, y=None, context=None)`.

    It is the module itself, with its own names in the state dict; a hook leaves out the conditions that are None.
    Raises UserError for a model that is not of the form above: it is tried on one image of zeros.
    """
    net = load_function(MODEL, factory)()
    if not isinstance(net, nn.Module):
        raise UserError(f"{MODEL}={factory!r} returns a {type(net).__name__}, not an nn.Module")
    shape = getattr(net, "image_size", None)
    if not isinstance(shape, list | tuple) or len(shape) != 4 or not all(type(n) is int and n > 0 for n in shape):
        raise UserError(f"{MODEL}={factory!r}: the model's image_size is {shape!r}; want [1, channels, height, width]")
    shape = (1, *shape[1:])
    takes = _arguments(net)
    out = _output_shape(net, shape, factory)
    if out not in (shape, _doubled(shape)):
        raise UserError(f"{MODEL}={factory!r}: the model makes {out} of an image of its image_size {shape}; want the "
                        "same shape")
    net.predicts_both = out != shape

    def without_none(_, args, kwargs):
        for name, value in kwargs.items():
            if value is not None and name not in takes:
                raise UserError(f"{MODEL}={factory!r}: the model takes no {name}")
        if args[0].shape[1:] != shape[1:]:
            raise UserError(_other_size(factory, shape, args[0].shape))
        return args, {name: value for name, value in kwargs.items() if value is not None}

    net.register_forward_pre_hook(without_none, with_kwargs=True)
    return net


def _doubled(shape: tuple[int, ...]) -> tuple[int, ...]:
    return shape[0], 2 * shape[1], *shape[2:]


def refuse_other_size(net: nn.Module, description: Mapping) -> None:
    """Before any data is read: a user's own model must be made for images of the config's size and channels, and for
    what it is to predict.

    description: with the sections backbone, denoiser, codec and image. In the latents of a codec, the first call tells.
    """
    section, image = description["backbone"], description["image"]
    if section["name"] != "factory":
        return
    shape, prediction = tuple(net.image_size), description["denoiser"]["prediction"]
    wanted = _doubled(shape) if prediction == "both" else shape
    if net.predicts_both != (prediction == "both"):
        raise UserError(f"denoiser.prediction={prediction!r}: {MODEL}={section['factory']!r} makes "
                        f"{(2 if net.predicts_both else 1) * shape[1]} channels; want {wanted[1]}")
    if description["codec"]["name"] == "pixel":
        shape = 1, image["channels"], image["size"], image["size"]
        if tuple(net.image_size)[1:] != shape[1:]:
            raise UserError(_other_size(section["factory"], net.image_size, shape))


def _other_size(factory: str, shape, wanted) -> str:
    return (f"{MODEL}={factory!r}: the model's image_size is {list(shape)}, but data.channels and data.image_size make "
            f"images of {' x '.join(map(str, wanted[1:]))}")


def _split(field: str, text: str) -> tuple[Path, str]:
    """(file, name of the function)."""
    if not text:
        raise UserError(f"{field} is empty; give --config.{field}=path/to/module.py:function")
    name, _, function = text.rpartition(":")
    if not name or not function:
        raise UserError(f"{field}={text!r}: want path/to/module.py:function")
    path = find_file(name)
    if path is None:
        raise UserError(f"{field}={text!r}: there is no file {name}")
    return path.resolve(), function


@contextlib.contextmanager
def _told(field: str, text: str, path: Path) -> Iterator[None]:
    """Whatever the user's code raises is a mistake in it, told in one line."""
    try:
        yield
    except UserError:
        raise
    except (Exception, SystemExit) as error:
        raise UserError(f"{field}={text!r}: {describe_error(error, path)}") from error


def _run(path: Path) -> types.ModuleType:
    """The module of a file, under a name of its own in sys.modules, where pickle, dataclasses and torch look it up."""
    source = path.read_bytes()
    name = f"{path.stem}_{hashlib.sha256(bytes(path) + source).hexdigest()[:12]}"
    if name not in sys.modules:
        if str(path.parent) not in sys.path:
            sys.path.append(str(path.parent))  # last: a neighbour must not hide a package
        module = types.ModuleType(name)
        module.__file__ = str(path)
        sys.modules[name] = module
        try:
            exec(compile(source, str(path), "exec"), vars(module))
        except BaseException:
            del sys.modules[name]
            raise
    return sys.modules[name]


def _arguments(net: nn.Module) -> set[str]:
    """Which of our conditions the forward of `net` takes."""
    parameters = inspect.signature(net.forward).parameters.values()
    if any(each.kind is inspect.Parameter.VAR_KEYWORD for each in parameters):
        return {"y", "context", "guidance", "concat", "vector"}
    return {each.name for each in parameters}


def _output_shape(net: nn.Module, shape: tuple[int, ...], factory: str) -> tuple[int, ...] | None:
    """Shape of the output for one image; None where it is no tensor."""
    path, _ = _split(MODEL, factory)
    needed = {each.name for each in inspect.signature(net.forward).parameters.values() if each.default is each.empty}
    training = net.training
    try:
        # Tensors without values cost nothing at any size of image; code that looks at values wants real ones.
        for mode in (FakeTensorMode(allow_non_fake_inputs=True), contextlib.nullcontext()):
            try:
                with mode, torch.no_grad():
                    device = next((each.device for each in net.parameters()), None)
                    kwargs = {}
                    if "y" in needed:
                        kwargs["y"] = torch.zeros(1, dtype=torch.long, device=device)
                    if "concat" in needed:
                        channels = getattr(net, "concat_channels", 0)
                        kwargs["concat"] = torch.zeros(1, channels, *shape[2:], device=device)
                    for name, said in (("context", "context_shape"), ("vector", "vector_size")):
                        if name in needed:
                            kwargs[name] = torch.zeros(1, *_size(net, name, said, factory), device=device)
                    out = net.eval()(torch.zeros(shape, device=device), torch.zeros(1, device=device), **kwargs)
                    return tuple(out.shape) if isinstance(out, torch.Tensor) else None
            except Exception:
                if isinstance(mode, contextlib.nullcontext):
                    raise
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{MODEL}={factory!r}: the model fails on an image of its image_size {shape}: "
                        f"{describe_error(error, path)}") from error
    finally:
        net.train(training)


def _size(net: nn.Module, name: str, said: str, factory: str) -> tuple[int, ...]:
    """The shape, but for the rows, of a condition that the network cannot do without."""
    size = getattr(net, said, None)
    size = (size,) if isinstance(size, int) else size
    if not isinstance(size, list | tuple) or not all(type(n) is int and n > 0 for n in size):
        raise UserError(f"{MODEL}={factory!r}: the model's call needs a {name}, so that it must have the attribute "
                        f"{said}; its value is {size!r}")
    return tuple(size)

"""Few-step students as LoRA files of diffusers pipelines: written for everybody's tools, loaded in one call.

    from libs.pipelines import load_student

    student = load_student(pipe, "runs/flash_sd15")  # or "jasperai/flash-sd": weights, scheduler, times, guidance
    image = pipe("a photo of a cat").images[0]  # 4 steps, no guidance
    student.disable()  # the pipeline as it was

`merge_lora(pipe.unet)` (libs/lora.py) then makes it as fast as without a LoRA, for good. After that
`pipe.save_pretrained(folder)` writes a pipeline for diffusers alone, to be called with
`timesteps=[999, 749, 499, 249], guidance_scale=0`; Stable Diffusion 3 with `sigmas=[1.0, 0.9, 0.75, 0.5]`.
"""

import functools
import inspect
import json
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchLCMScheduler, LCMScheduler
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from ..checkpoint import read
from ..errors import UserError
from ..files import atomic_path, reason
from ..hub import find_model
from ..lora import attach_lora, family_of, fingerprint, lora_config, lora_state, remove_lora, same_weights
from ..weights import has_lora, refuse_other_tensors

LORA_FILE = "pytorch_lora_weights.safetensors"  # what diffusers' load_lora_weights reads
ADAPTER_FILE, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"  # what peft's from_pretrained reads
CARD = "student.json"
ADAPTER = "student"  # the LoRA's name in a pipeline, beside others that it may have
IN_WORKDIR = "student"  # the folder of a student in the WORKDIR of distillate.py
NETWORKS = {"UNet2DConditionModel": "unet", "PixArtTransformer2DModel": "transformer",
            "SD3Transformer2DModel": "transformer"}  # served, by class: its name in the pipeline
LORA_LOADERS = ("UNet2DConditionModel", "SD3Transformer2DModel")  # whose pipelines have `load_lora_weights`
MODES = (1.0, 0.75, 0.5, 0.25)  # t at which a student was trained whose files do not say it (2406.02347, section 4.2)
PREFIXES = ("base_model.model.", "unet.", "transformer.")
OLD_NAMES = (("processor.", ""), ("_lora.", ".lora."), (".to_out.lora.", ".to_out.0.lora."),
             (".lora.down.", ".lora_A."), (".lora.up.", ".lora_B."))  # of diffusers before peft


def save_student(folder: str | Path, net: nn.Module, timesteps: Sequence[float], base: str = "", **told: Any) -> None:
    """Write the LoRA of `net` so that `pipe.load_lora_weights(folder)` loads it into a pipeline with a UNet or Stable
    Diffusion 3's, `PeftModel.from_pretrained(network, folder)` into any network but a UNet, and `load_student` into
    all. A pipeline's network without a LoRA is a student as a whole: FOLDER/unet or FOLDER/transformer, as diffusers
    loads it.

    net         what wraps the network of a pipeline, or of our own, leaves no trace
    timesteps   those that the student was trained at, falling, in the unit of diffusers' schedulers (0 to 999; for
                flow matching 1000 t)
    base        hub id or folder of the model that was distilled
    told        further fields of student.json
    """
    folder = Path(folder)
    prefix, network, family = family_of(net)
    card = {"network": type(network).__name__, "base": base, "timesteps": list(timesteps), "guidance_scale": 0.0,
            **told}
    if family in NETWORKS and not has_lora(net):
        _write_network(folder / NETWORKS[family], network)
        _write(folder / CARD, card)
        return
    config = lora_config(net)
    inside = f"{prefix}." if prefix else ""
    held = {name.removeprefix(inside): each.cpu().contiguous() for name, each in lora_state(net).items()}
    targets = sorted(config.target_modules)
    if family in LORA_LOADERS:
        # The file has no place for alpha, and readers take the rank for it.
        strength = config.lora_alpha / config.r
        _write(folder / LORA_FILE, {f"{NETWORKS[family]}.{name}": strength * each if ".lora_B." in name else each
                                    for name, each in held.items()})
    if family != "UNet2DConditionModel":
        _write(folder / ADAPTER_FILE, {f"base_model.model.{name}": each for name, each in held.items()})
        _write(folder / ADAPTER_CONFIG, {
            "peft_type": "LORA", "r": config.r, "lora_alpha": config.lora_alpha, "target_modules": targets,
            "bias": "none", "inference_mode": True, "base_model_name_or_path": base})
    _write(folder / CARD, card | {"base_fingerprint": fingerprint(network), "rank": config.r,
                                  "alpha": config.lora_alpha, "targets": targets})


def _write_network(folder: Path, network: nn.Module) -> None:
    """The folder of a diffusers network, in place of what was there."""
    temporary = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    network.save_pretrained(temporary)
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(temporary, folder)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    with atomic_path(path) as temporary:
        if path.suffix == ".json":
            temporary.write_text(json.dumps(content, indent=2) + "\n")
        else:
            temporary.write_bytes(save(dict(content), {"format": "pt"}))


def pick(trained: Sequence[float], steps: int) -> list[float]:
    """`steps` of the trained timesteps, spread evenly from the first one on."""
    if not 1 <= steps <= len(trained):
        raise UserError(f"num_inference_steps={steps}: this student was trained at the {len(trained)} timesteps "
                        f"{', '.join(f'{each:g}' for each in trained)}; choose from 1 to {len(trained)} steps")
    return [trained[i * len(trained) // steps] for i in range(steps)]


class TrainedTimes:
    """What a student's scheduler knows beyond the one of diffusers that it is made from.

    trained   timesteps of its training, falling. They are in the config, under a name that is private there: diffusers
              hands such fields on, to files and to schedulers of any class.
    """

    @property
    def trained(self) -> Sequence[float]:
        return self.config.get("_trained", ())

    @trained.setter
    def trained(self, timesteps: Sequence[float]) -> None:
        self.register_to_config(_trained=list(timesteps))

    def plain(self) -> Any:
        """That one of diffusers, with the same config."""
        kind = next(each for each in type(self).__mro__ if each.__module__.startswith("diffusers."))
        return kind.from_config(self.config)


class StudentLCMScheduler(TrainedTimes, LCMScheduler):
    """`LCMScheduler` whose n timesteps are `pick(trained, n)`; its own 4 of 1000 are 999, 759, 499, 259."""

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
                      original_inference_steps: int | None = None, timesteps: list[int] | None = None,
                      strength: float = 1.0) -> None:
        # original_inference_steps: only those of a grid of so many steps are taken without a warning.
        timesteps = pick(self.trained, num_inference_steps) if timesteps is None else timesteps
        super().set_timesteps(device=device, original_inference_steps=self.config.num_train_timesteps,
                              timesteps=timesteps, strength=strength)


class StudentFlowMatchLCMScheduler(TrainedTimes, FlowMatchLCMScheduler):
    """`FlowMatchLCMScheduler` whose n timesteps are `pick(trained, n)`, and whose noise comes from `generator`, which
    Stable Diffusion 3's pipelines do not hand on.
    """

    generator: torch.Generator | list[torch.Generator] | None = None

    def set_timesteps(self, num_inference_steps: int | None = None, device: str | torch.device | None = None,
                      sigmas: list[float] | None = None, mu: float | None = None,
                      timesteps: list[float] | None = None) -> None:
        if sigmas is None and timesteps is None:
            sigmas = [each / self.config.num_train_timesteps for each in pick(self.trained, num_inference_steps)]
        super().set_timesteps(num_inference_steps, device, sigmas, mu, timesteps)

    def step(self, model_output: Tensor, timestep: float | Tensor, sample: Tensor,
             generator: torch.Generator | list[torch.Generator] | None = None, return_dict: bool = True):
        return super().step(model_output, timestep, sample, generator or self.generator, return_dict)


class Student:
    """A student at work in a pipeline; leaving a `with` block disables it.

    call        what `pipe(...)` takes now where it is not told: num_inference_steps, guidance_scale
    timesteps   of those steps
    disable()   the pipeline as it was before, bit for bit
    """

    def __init__(self, pipe: Any, network: nn.Module, undo: Callable[[], Any], scheduler: Any,
                 call: Mapping[str, Any]):
        self.pipe, self.network, self.undo, self.call = pipe, network, undo, dict(call)
        self.timesteps = pick(scheduler.trained, call["num_inference_steps"])
        self.before = type(pipe), pipe.scheduler
        pipe.scheduler = scheduler
        pipe.__class__ = _with_defaults(type(pipe), self.call)

    def disable(self) -> None:
        self.undo()
        self.pipe.__class__, self.pipe.scheduler = self.before

    def __enter__(self) -> "Student":
        return self

    def __exit__(self, *error) -> None:
        self.disable()


def _with_defaults(kind: type, defaults: Mapping[str, Any]) -> type:
    """The pipeline class `kind` with other default values of its call, under its own name. What it saves diffusers
    loads without us: with the scheduler that the student's is made from.
    """
    signature = inspect.signature(kind.__call__)

    @functools.wraps(kind.__call__)
    def call(self, *args, **kwargs):
        given = signature.bind_partial(self, *args, **kwargs).arguments
        if isinstance(self.scheduler, StudentFlowMatchLCMScheduler):
            self.scheduler.generator = given.get("generator")
        missing = {name: value for name, value in defaults.items() if name not in given}
        return kind.__call__(self, *args, **missing, **kwargs)

    @functools.wraps(kind.save_pretrained)
    def save_pretrained(self, *args, **kwargs):
        for part, each in self.components.items():
            if isinstance(each, nn.Module) and has_lora(each):
                raise UserError(f"save_pretrained: diffusers cannot load a {kind.__name__} whose {part} has a LoRA in "
                                f"it; merge_lora(pipe.{part}) (libs/lora.py) first, or disable the student")
        scheduler = self.scheduler
        try:
            if isinstance(scheduler, TrainedTimes):
                self.scheduler = scheduler.plain()
            return kind.save_pretrained(self, *args, **kwargs)
        finally:
            self.scheduler = scheduler

    return type(kind.__name__, (kind,), {"__call__": call, "save_pretrained": save_pretrained,
                                         "__module__": kind.__module__, "__doc__": kind.__doc__})


def load_student(pipe: Any, folder: str | Path, steps: int = 0, other_base: bool = False) -> Student:
    """Make `pipe` sample with a student: its LoRA, a consistency sampler at the timesteps it was trained at, as many
    steps, and no guidance. `pipe(prompt)` does it all; steps and guidance may still be given in the call.

    folder: of `save_student`, LoRA or whole network, or the WORKDIR of distillate.py; with the LoRA of another training
        (`load_lora_weights`' file, or peft's two), or a hub id such as jasperai/flash-sd. A student that does not say
        its timesteps was trained at t = 1, 3/4, 1/2 and 1/4.
    steps: 0 is as many as it was trained at.
    other_base: also for weights that the student was not trained on, such as a fine-tuned model of the same family.
    A LoRA of the pipeline stays at work beside the student's; one that is loaded later takes its place until both are
    named: pipe.set_adapters(["student", "style"]). Offloading of the pipeline, if any, is set up after this.
    Raises UserError, with the pipeline as it was, for a pipeline that it cannot serve, a folder without a LoRA, a LoRA
    of another model, and more steps than there are trained timesteps.
    """
    source = f"student={str(folder)!r}"
    network = _network_of(pipe)
    path = student_folder(str(folder), "student")
    card = _read_json(path / CARD, source) if (path / CARD).is_file() else {}
    folder = path / NETWORKS[type(network).__name__]
    whole = bool(card) and folder.is_dir()
    if whole and has_lora(network):
        raise UserError(f"{source} takes the place of the whole {folder.name}, which has a LoRA: unload that first")
    tensors, alpha = ({}, 0.0) if whole else _read_lora(path, source)
    held = card.get("base_fingerprint")
    if held is not None and not other_base and not same_weights(held, fingerprint(network)):
        raise UserError(f"{source} is a LoRA of another base model ({card.get('base') or 'it does not say which'}): "
                        f"this {type(pipe).__name__} has other weights; other_base=True loads it nevertheless")
    scheduler = _scheduler(pipe, network, card.get("timesteps"))
    steps = steps or len(scheduler.trained)
    call = {"num_inference_steps": steps, "guidance_scale": card.get("guidance_scale", 0.0)}
    pick(scheduler.trained, steps)  # refused before the weights change
    if whole:
        return Student(pipe, *_exchange(pipe, network, folder, source), scheduler, call)
    attach_lora(network, tensors, alpha, source, ADAPTER)
    return Student(pipe, network, functools.partial(remove_lora, network, ADAPTER), scheduler, call)


def student_folder(name: str, field: str) -> Path:
    """What distillate.py wrote into the WORKDIR `name`, or else the folder or hub id itself. Raises UserError, naming
    `field`, where there is neither.
    """
    written = Path(name).expanduser() / IN_WORKDIR
    return written if written.is_dir() else find_model(name, field)


def _exchange(pipe: Any, network: nn.Module, folder: Path, source: str) -> tuple[nn.Module, Callable[[], None]]:
    """(the network of `folder`, which has taken the place of the pipeline's own, what takes that back)."""
    try:
        student = type(network).from_pretrained(folder, torch_dtype=network.dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {folder.name} cannot be read ({reason(error)})") from error
    refuse_other_tensors(network.state_dict(), student.state_dict(), f"{source} is a student of another model")
    student.to(network.device)
    setattr(pipe, folder.name, student)
    return student, lambda: setattr(pipe, folder.name, network)


def _network_of(pipe: Any) -> nn.Module:
    for kind, part in NETWORKS.items():
        network = getattr(pipe, part, None)
        if type(network).__name__ == kind:
            if ADAPTER in getattr(network, "peft_config", {}):
                raise UserError(f"the {part} of this {type(pipe).__name__} has a LoRA named {ADAPTER} already: disable "
                                "that student, or unload the LoRA, first")
            return network
    raise UserError(f"a {type(pipe).__name__} is not supported: students are served in pipelines of Stable Diffusion "
                    "1, 2, XL and 3, and of PixArt, whose network is one of "
                    f"{', '.join(f'{part}: {kind}' for kind, part in NETWORKS.items())}")


def _scheduler(pipe: Any, network: nn.Module, trained: Sequence[float] | None):
    """The scheduler of a student in place of the pipeline's own, with its noise."""
    config = pipe.scheduler.config
    count = config.num_train_timesteps
    if type(network).__name__ == "SD3Transformer2DModel":
        scheduler = StudentFlowMatchLCMScheduler(num_train_timesteps=count)
        shift = config.get("shift", 1.0)  # of a student that does not say, on the pipeline's own shifted path
        scheduler.trained = trained or [count * shift * t / (1 + (shift - 1) * t) for t in MODES]
        return scheduler
    trained = [int(each) for each in trained or [count * t - 1 for t in MODES]]
    # In the config for those who make an LCMScheduler of it: it then takes the same timesteps, if they divide 1000.
    scheduler = StudentLCMScheduler.from_config(config, timestep_spacing="trailing",
                                                original_inference_steps=len(trained))
    scheduler.trained = trained
    return scheduler


def _read_lora(folder: Path, source: str) -> tuple[dict[str, Tensor], float]:
    """({name as in `lora_state`: tensor}, alpha or 0 for the rank) of a folder, whoever wrote it."""
    file = next((folder / name for name in (LORA_FILE, ADAPTER_FILE) if (folder / name).is_file()), None)
    if file is None:
        raise UserError(f"{source} holds neither {LORA_FILE} nor {ADAPTER_FILE}")
    tensors = {_plain(name): each for name, each in read(file, "student")[0].items()}
    for name in tensors:
        if not name.endswith((".lora_A.weight", ".lora_B.weight")):
            raise UserError(f"{source}: {name} is no weight of a LoRA that a student can have")
    if file.name == ADAPTER_FILE:
        config = _read_json(folder / ADAPTER_CONFIG, source)
    else:
        with safe_open(file, "pt") as opened:  # diffusers' scripts write peft's config into the header
            held = json.loads((opened.metadata() or {}).get("lora_adapter_metadata", "{}"))
        config = {_plain(name): value for name, value in held.items()}
    for field in ("use_rslora", "alpha_pattern"):
        if config.get(field):
            raise UserError(f"{source}: {field}={config[field]!r} is not supported; a student's LoRA has one strength")
    return tensors, config.get("lora_alpha", 0)


def _plain(name: str) -> str:
    """The name of a LoRA's weight inside the network, from any of the names that it has had in files."""
    for prefix in PREFIXES:
        name = name.removeprefix(prefix)
    for old, new in OLD_NAMES:
        name = name.replace(old, new)
    return name


def _read_json(path: Path, source: str) -> dict[str, Any]:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{source}: {path.name} cannot be read ({reason(error)})") from error

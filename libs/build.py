"""From config names to objects: the only module that knows both."""

from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor, nn

from . import checkpoint as checkpoints
from .backbones.attention import set_attention
from .codecs import make_codec
from .conditioners import (
    OF_IMAGES,
    OF_TEXTS,
    Conditioners,
    make_conditioners,
    names_code,
    names_texts,
    read_given,
    read_images,
)
from .contexts import KINDS, Contexts, make_contexts
from .defaults import base_config
from .denoiser import TARGETS, TIME_INPUTS, Denoiser
from .errors import UserError, choose
from .factory import refuse_other_size
from .generate import Chain
from .policies import make_policy
from .policies.sites import unwrap
from .prompts import read_prompts
from .samplers import evaluation_times, grid_orders, make_sampler
from .schedule import Schedule, make_schedule, time_grid

COMPILE_MODES = ("default", "reduce-overhead", "max-autotune")  # torch.compile's
CUDA_GRAPHS = COMPILE_MODES[1:]
DTYPES = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}
MODEL_SECTIONS = ("backbone", "schedule", "denoiser", "cond", "codec")  # what a checkpoint says of itself


def describe(config: Mapping) -> dict[str, Any]:
    """The sections that a checkpoint keeps in its metadata, as plain JSON-able dicts."""
    plain = {name: config[name].to_dict() if hasattr(config[name], "to_dict") else dict(config[name])
             for name in MODEL_SECTIONS}
    for name in {*OF_IMAGES, *OF_TEXTS} - _fields_of(plain["cond"]):
        plain["cond"].pop(name, None)
    plain["image"] = {"size": config["data"]["image_size"], "channels": config["data"]["channels"]}
    return plain


def as_damped(description: Mapping[str, Any]) -> dict[str, Any]:
    """The description, of a network of eps as one of eps_damped, which it is as it stands; others stay as they are."""
    denoiser = dict(description["denoiser"])
    if denoiser["prediction"] == "eps":
        denoiser["prediction"] = "eps_damped"
    return {**description, "denoiser": denoiser}


def _fields_of(cond: Mapping) -> set[str]:
    """The fields of a `cond` section that some kinds of conditions have, and this one too."""
    if cond["kind"] == "text":
        return {"text_encoder", "tokens"}
    return {*OF_IMAGES, *(OF_TEXTS if names_texts(cond) else ())} if cond["kind"] == "image" else set()


def make_denoiser(net, description: Mapping, precision: str = "fp32", device: torch.device | None = None,
                  cuda_graphs: bool = False) -> Denoiser:
    """The denoiser that a description asks for, around `net` (a backbone or a policy).

    cuda_graphs: whether `net` was compiled into these.
    """
    section, schedule = description["denoiser"], make_schedule(**description["schedule"])
    choose("denoiser.prediction", section["prediction"], TARGETS)
    choose("denoiser.time_input", section["time_input"], TIME_INPUTS)
    if section["time_input"] in ("step", "index") and schedule.steps is None:
        raise UserError(f"denoiser.time_input={section['time_input']!r} needs a discrete schedule, "
                        f"not {description['schedule']['name']}")
    dtype = choose("compute.precision", precision, DTYPES)
    autocast = None
    if dtype is not None:
        autocast = partial(torch.autocast, (device or torch.device("cpu")).type, dtype=dtype)
    return Denoiser(net, schedule, section["prediction"], section["time_input"], autocast,
                    section.get("time_scale", 1.0), cuda_graphs)


def load_model(config: Mapping, name: str | None = None) -> tuple[nn.Module, dict[str, Any]]:
    """(backbone, description) of the checkpoint `name`, or of the config's own.

    A file that describes itself wins over the config's schedule, denoiser, cond and codec sections; its
    architecture must be the config's. It never chooses the code of a user's own conditioners: the config does.
    """
    path = checkpoints.resolve(name or config["checkpoint"])
    own = describe(config)
    net, held = checkpoints.load_described(path, own["backbone"])
    description = {**own, **held}
    if names_code(description["cond"]):
        if not names_code(own["cond"]):
            raise UserError(f"checkpoint {path} holds conditioners of the user's own ({description['cond']['task']}), "
                            "and weights choose no code: name them by --config.cond.kind=image and --config.cond.task")
        description["cond"] = description["cond"] | {"task": own["cond"]["task"]}
    refuse_other_size(net, description)
    net.checkpoint = name or config["checkpoint"]  # for messages
    return net, description


def adopt_sampler(config: ConfigDict, description: Mapping, overrides: Collection[str] = ()) -> None:
    """Let a distilled student's own sampler section fill the config's, but for what the user overrode."""
    for field, value in description.get("sampler", {}).items():
        if f"sampler.{field}" not in overrides:
            with config.unlocked():  # a sampler may have options that the config's own has not
                config.sampler[field] = value


def prepare_backbone(net: nn.Module, compute: Mapping, device: torch.device) -> nn.Module:
    """The network on its device, with the attention and the compilation that `compute` asks for."""
    mode = choose("compute.compile_mode", compute.get("compile_mode", "default"), COMPILE_MODES)
    if compute.get("attention", "sdpa") != "sdpa":  # a pipeline chooses its own
        set_attention(net, compute["attention"])
    net = net.to(device)
    return torch.compile(net, mode=mode) if compute["compile"] else net


def uses_cuda_graphs(compute: Mapping) -> bool:
    """Whether a `compute` section has the network compiled into CUDA graphs for sampling."""
    return compute["compile"] and compute.get("compile_mode") in CUDA_GRAPHS


def make_times(section: Mapping, schedule: Schedule):
    """The grid ts (steps + 1,) of a config's `sampler` section."""
    orders = grid_orders(section["name"], section["steps"], section["order"])
    return time_grid(section["grid"], section["steps"], schedule, section["t_start"], section["t_end"], orders)


def sampled_times(description: Mapping[str, Any], schedule: Schedule) -> Tensor | None:
    """The only times (n,) at which a student of few steps is asked; None for a network that is no student."""
    section = description.get("sampler")
    if section is None:
        return None
    section = {**base_config().sampler, **section}
    return evaluation_times(make_sampler(**section), make_times(section, schedule), schedule)


def guidance_range(cond: Mapping) -> tuple[float, float] | None:
    """(lowest, highest) guidance scale of a network that takes it as an input: a `cond` section's `guidance`."""
    if cond.get("guidance") is None:
        return None
    try:
        low, high = map(float, cond["guidance"])
    except (TypeError, ValueError):
        low = high = float("nan")
    if not low <= high:
        raise UserError(f"cond.guidance={cond['guidance']!r} must be two numbers, the lowest and the highest guidance "
                        "scale")
    return low, high


def adopt_places(config: ConfigDict, description: dict, overrides: Collection[str] = ()) -> None:
    """Let what the user overrode say where an autoencoder and a text encoder lie: a checkpoint remembers where they
    lay on the machine that trained it. And of which masks inpainting samples.
    """
    for name, field in (("codec", "pretrained"), ("cond", "text_encoder"), ("cond", "masks")):
        if f"{name}.{field}" in overrides and field in description[name]:
            description[name] = {**description[name], field: config[name][field]}


def make_chain(config: Mapping, net: nn.Module, description: Mapping, device: torch.device,
               contexts: Contexts | None = None, conditioners: Conditioners | None = None) -> Chain:
    """Every link of the chain around `net`, which `prepare_backbone` has put on the device.

    contexts: what a text model is shown; without, `Chain.show` comes before the first image, as does
        `Chain.show_inputs` for a model with conditioners.
    conditioners: of such a model, where they are made already.
    """
    section, cond = config["sampler"], description["cond"]
    choose("cond.kind", cond["kind"], KINDS)
    sampler = make_sampler(**section)
    graphs = uses_cuda_graphs(config["compute"])
    if graphs and config["policy"].get("mode", "schedule") != "schedule":
        raise UserError(f"compute.compile_mode={config['compute']['compile_mode']}: policy.mode="
                        f"{config['policy']['mode']} holds on to results that the next CUDA graph writes over; choose "
                        "policy.mode=schedule or compute.compile_mode=default")
    policy = make_policy(config["policy"], net)
    denoiser = make_denoiser(policy, description, config["compute"]["precision"], device, graphs)
    codec = make_codec(description["codec"], device)
    null_label = cond["null_label"] if cond["null_label"] >= 0 else None
    scales = guidance_range(cond)
    if scales is not None and getattr(net, "guidance_embedding", None) is None:
        raise UserError(f"cond.guidance={cond['guidance']!r}: the network was built without backbone.guidance_embed")
    if scales is not None and not scales[0] <= section["cfg_scale"] <= scales[1]:
        raise UserError(f"sampler.cfg_scale={section['cfg_scale']}: this network takes the guidance scale as an input, "
                        f"from {scales[0]:g} to {scales[1]:g}")
    image = description["image"]
    shape = codec.latent_shape(image["size"], image["channels"])
    if conditioners is None:
        conditioners = image_conditioners(description, net, shape[1:], device)
    if scales is None and section["cfg_scale"] != 1:
        if description.get("distilled", {}).get("method") == "flash":
            raise UserError(f"sampler.cfg_scale={section['cfg_scale']}: a student of Flash Diffusion takes no "
                            "guidance; use 1.0")
        refuse_unguidable(section["cfg_scale"], cond, conditioners)
    threshold = None
    if choose("sampler.threshold", section["threshold"], ("none", "static", "dynamic")) != "none":
        value = section["threshold_value"]
        if section["threshold"] == "dynamic" and not 0 < value < 1:
            raise UserError(f"sampler.threshold_value={value}: a dynamic threshold is a quantile between 0 and 1")
        threshold = section["threshold"], value
    if config["compute"]["rows"] < 1:
        raise UserError(f"compute.rows={config['compute']['rows']} must be at least 1")
    chain = Chain(policy=policy, denoiser=denoiser, sampler=sampler,
                  ts=make_times(section, denoiser.schedule), codec=codec,
                  shape=shape, device=device, null_label=null_label, num_classes=cond["num_classes"],
                  cfg_scale=section["cfg_scale"], takes_scale=scales is not None, threshold=threshold,
                  rows=config["compute"]["rows"], conditioners=conditioners)
    if contexts is not None:
        chain.show(contexts)
    policy.prepare(chain)
    return chain


def image_conditioners(description: Mapping, net: nn.Module, size: tuple[int, int],
                       device: torch.device) -> Conditioners | None:
    """The conditioners of a model with some, which the network has been seen to take; None for other models.

    size: (h, w) of the network's x.
    """
    kind, channels = description["cond"]["kind"], getattr(unwrap(net), "concat_channels", 0)
    if kind != "image" and channels:
        raise UserError(f"cond.kind={kind!r}: this network takes {channels} channels beside x "
                        "(backbone.concat_channels), so cond.kind must be image")
    if kind != "image":
        return None
    conditioners = make_conditioners(description["cond"], size, device)
    conditioners.check(unwrap(net), description["image"], size, description["cond"]["num_classes"] > 0)
    return conditioners


def refuse_unguidable(cfg_scale: float, cond: Mapping, conditioners: Conditioners | None) -> None:
    """Guidance needs something to guide against."""
    if conditioners is not None:
        if not conditioners.guidable:
            raise UserError(f"sampler.cfg_scale={cfg_scale}: this model was trained with every condition (cond.drop), "
                            "so there is nothing to guide against; use 1.0")
    elif cond["null_label"] < 0 and cond["kind"] != "text":
        raise UserError(f"sampler.cfg_scale={cfg_scale}: this model has no null class to guide against; use 1.0")


def load_chain(config: ConfigDict, name: str | None, device: torch.device, overrides: Collection[str] = (),
               prompts: str | None = None, images: str | None = None,
               fields: str | None = None) -> tuple[Chain, Path]:
    """(chain, file) of the checkpoint `name`, or of the config's own.

    A student's checkpoint brings its sampler along: it is written into `config`, but for `overrides`.
    prompts: what --prompts names, for a text model, see `make_contexts`; other models are given None.
    images: likewise what --images names, a folder, for conditioners that read images; prompts too, for those that read
        texts.
    fields: likewise what --fields names, for those that read fields of samples.
    """
    net, description = load_model(config, name)
    adopt_sampler(config, description, overrides)
    adopt_places(config, description, overrides)
    contexts = make_contexts(prompts, description, device)
    _refuse_images(images, description)
    if fields is not None and description["cond"]["kind"] != "image":
        raise UserError(f"--fields={fields}: this model has no conditioners that could read them")
    chain = make_chain(config, prepare_backbone(net, config["compute"], device), description, device, contexts)
    if chain.conditioners is not None:
        _show_inputs(chain, images, prompts, fields, description)
    _warn_of_other_times(chain, description)
    return chain, checkpoints.resolve(name or config["checkpoint"])


def _warn_of_other_times(chain: Chain, description: Mapping) -> None:
    """A student of few steps that is asked elsewhere than where it was trained: allowed, and seldom what was meant."""
    own = sampled_times(description, chain.denoiser.schedule)
    if own is None or len(own) == chain.denoiser.schedule.steps:  # trained at every time
        return
    name = {**base_config().sampler, **description["sampler"]}["name"]
    jumps = name == "lcm"  # from any of its times onto data; others step to the next one
    known = torch.isclose(chain.times[:, None], own).any(1).all() if chain.times.ndim == 1 else True
    if not known or (not jumps and len(chain.times) != len(own)):
        logging.warning("this checkpoint is a student of %d steps of %s; %d of %s ask it for what it did not learn",
                        len(own), name, len(chain.times), chain.sampler.func.__name__)


def _refuse_images(path: str | None, description: Mapping) -> None:
    """What --images names is of no use to a model without conditioners."""
    kind = description["cond"]["kind"]
    if kind != "image" and path is not None:
        raise UserError(f"--images={path}: this model takes no images (cond.kind={kind!r}); "
                        "configs/cifar10_super_resolution.py and configs/cifar10_inpainting.py do")


def _show_inputs(chain: Chain, images: str | None, prompts: str | None, fields: str | None,
                 description: Mapping) -> None:
    """Let a chain make its conditions of what --images, --prompts and --fields name, of all or some."""
    reads, field = chain.conditioners.reads, chain.conditioners.field
    for flag, text, name, what in (
        ("images", images, "image", "a folder of images"),
        ("prompts", prompts, "text", "a text, a .txt file with one a line, or a .json file of COCO's captions"),
    ):
        if name in reads and text is None:
            raise UserError(f"--{flag} is missing: {what}, of which this model's conditions are made")
        if name not in reads and text is not None:
            raise UserError(f"--{flag}={text}: this model's conditions ({field}) are made of no {name}")
    image = description["image"]
    data = None if images is None else read_images(images, image["size"], image["channels"]).to(chain.device)
    given = read_given(fields, chain.conditioners.fields, image["size"], image["channels"], chain.device)
    chain.show_inputs(data, None if prompts is None else read_prompts(prompts), given)

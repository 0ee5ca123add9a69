"""What a training needs before its first step; mistakes are told here, before anything heavy."""

import copy
import os
from collections.abc import Collection, Mapping
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import nn

from ..backbones.concat import add_concat_channels, without_concat
from ..build import (
    DTYPES,
    MODEL_SECTIONS,
    adopt_places,
    adopt_sampler,
    as_damped,
    describe,
    guidance_range,
    load_model,
    make_denoiser,
    prepare_backbone,
    sampled_times,
)
from ..checkpoint import build_backbone, drop_heads, read, resolve
from ..denoiser import TARGETS
from ..errors import UserError, choose
from ..factory import refuse_other_size
from .early_exit import FromStart, LayerwiseLoss
from .objective import Objective, diffusion_loss

LAUNCHER_PRECISIONS = {"no": "fp32", "bf16": "bf16", "fp16": "fp16"}

AT_LEAST = {  # fields of the train section
    "steps": 1, "batch_size": 1, "accumulate": 1, "warmup": 0, "decay_from": 0, "clip_norm": 0, "weight_decay": 0,
    "ema": 0, "log_every": 1, "save_every": 1, "keep": 1, "preview_every": 0, "preview_images": 1, "eval_every": 0,
    "eval_images": 2, "max_minutes": 0,
}


def validate(config: ConfigDict, processes: int = 1) -> None:
    """Refuse numbers that make no training, and a batch that the processes cannot share."""
    section = config.train
    for field, least in AT_LEAST.items():
        if section[field] < least:
            raise UserError(f"--config.train.{field}={section[field]} must be at least {least}")
    if section.lr <= 0:
        raise UserError(f"--config.train.lr={section.lr} must be positive")
    if section.decay_from > 1 or section.ema >= 1:
        field = "ema" if section.ema >= 1 else "decay_from"
        raise UserError(f"--config.train.{field}={section[field]} is too large; it is a share of 1")
    if len(section.betas) != 2 or not all(0 <= beta < 1 for beta in section.betas):
        raise UserError(f"--config.train.betas={section.betas} must be two numbers from 0 to below 1")
    if not 0 <= config.cond.drop <= 1:
        raise UserError(f"--config.cond.drop={config.cond.drop} must lie between 0 and 1")
    if not (0 <= config.cond.get("text_drop", 0) <= 1 or config.cond.text_drop == -1):
        raise UserError(f"--config.cond.text_drop={config.cond.text_drop} must lie between 0 and 1, or be -1, which "
                        "stands for cond.drop")
    if not 0 <= config.seed < 2**63:
        raise UserError(f"--config.seed={config.seed} must be from 0 to 2^63 - 1")
    if section.eval_every and not config.eval.metrics:
        raise UserError(f"--config.train.eval_every={section.eval_every}: eval.metrics names nothing to measure")
    if section.batch_size % (processes * section.accumulate):
        raise UserError(f"--config.train.batch_size={section.batch_size} cannot be divided among {processes} "
                        f"process{'es' * (processes > 1)} x {section.accumulate} (train.accumulate)")


def choose_precision(config: ConfigDict) -> str:
    """fp32, bf16 or fp16: what `accelerate launch` says, or else the config; a conflict is logged."""
    wanted = config.compute.precision
    choose("compute.precision", wanted, DTYPES)
    launcher = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if launcher is None:
        return wanted
    precision = choose("accelerate launch --mixed_precision", launcher, LAUNCHER_PRECISIONS)
    if precision != wanted:
        logging.info("accelerate launch says --mixed_precision=%s: %s instead of compute.precision=%s",
                     launcher, precision, wanted)
    return precision


def new_network(config: ConfigDict) -> tuple[nn.Module, dict[str, Any]]:
    """(backbone with weights drawn from the config's seed, description)."""
    torch.manual_seed(config.seed)
    net, description = build_backbone(config.backbone), describe(config)
    refuse_other_size(net, description)
    return net, description


def _start_model(config: ConfigDict, start: str) -> tuple[nn.Module, dict[str, Any]]:
    """(backbone, description) of the weights that `start` names.

    Where the config asks for a condition beside x and they take none, they get its channels, as zeros; then the
    conditions are the config's, not theirs.
    """
    channels, path = config.backbone.get("concat_channels", 0), resolve(start)
    held = {} if path.is_dir() or not channels else read(path)[1].get("backbone", {})
    if not channels or held.get("concat_channels"):
        return load_model(config, start)
    net, description = load_model({**config, "backbone": without_concat(config.backbone)}, start)
    if not getattr(net, "concat_channels", 0):  # a diffusers folder may hold them
        add_concat_channels(net, channels)
        logging.info("%s takes no condition beside x: %d channels are added, which start at 0", start, channels)
    wide = {name: config.backbone[name] for name in ("in_channels", "concat_channels") if name in config.backbone}
    return net, {**description, "backbone": {**description["backbone"], **wide}, "cond": describe(config)["cond"]}


def start_network(config: ConfigDict, start: str | None,
                  overrides: Collection[str] = ()) -> tuple[nn.Module, dict[str, Any]]:
    """(backbone, description): the weights that `start` names, or new ones. A condition beside x may be new to the
    weights.

    A student of few steps that goes on learning what it is stays one: its description keeps its sampler, which is
    written into the config, but for `overrides`.
    """
    net, description = _start_model(config, start) if start else new_network(config)
    kept = (*MODEL_SECTIONS, "image")
    lesson = learns_from(config)
    if lesson not in ("", "data"):
        if not start:
            raise UserError(f"--config.early_exit.learn_from={lesson}: there is no --checkpoint from which to start")
        kept += ("sampler", "distilled")
    elif "early_exit" in config and "sampler" in description:
        raise UserError(f"--config.early_exit.learn_from=data: the checkpoint is a student of "
                        f"{description['sampler']['steps']} steps, which would become a model of many again; use start")
    description = {name: description[name] for name in kept if name in description}
    adopt_places(config, description, overrides)
    if description["cond"]["kind"] == "none" and getattr(net, "num_classes", -1) > 0:
        raise UserError("cond.kind='none', but the network has classes (backbone.num_classes="
                        f"{net.num_classes}); choose label")
    if "early_exit" not in config:
        if start:
            _preview_steps(config, description, overrides)
        return without_heads(net, description)
    _add_heads(config, net, description)
    adopt_sampler(config, description, overrides)
    return net, description


def _preview_steps(config: ConfigDict, description: Mapping[str, Any], overrides: Collection[str]) -> None:
    """A schedule of fewer steps than the config's sampler takes (a student in diffusion_distiller's format, which goes
    on learning from data) is sampled in all of its own.
    """
    steps = description["schedule"].get("steps")
    if steps and config.sampler.steps > steps and "sampler.steps" not in overrides:
        logging.info("previews take %d steps, those of the checkpoint's schedule", steps)
        config.sampler.steps = steps


def without_heads(net: nn.Module, description: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any]]:
    """The model for a training that does not teach its uncertainty heads: they go, since they tell how certain the
    weights are with which they were trained.
    """
    if drop_heads(net):
        logging.info("the network's uncertainty heads are left out: this training would make them wrong")
        description = {**description, "backbone": {**description["backbone"], "uem": ""}}
    return net, dict(description)


def _add_heads(config: ConfigDict, net: nn.Module, description: dict[str, Any]) -> None:
    """Fresh uncertainty heads where the network has none of the form asked for, and what else early exit trains."""
    form = config.backbone.uem
    held = net.lte_classifer.form if net.lte_classifer is not None else ""
    if held and held != form:
        raise UserError(f"--config.backbone.uem={form}: the checkpoint's heads are {held!r}")
    if not held:
        torch.manual_seed(config.seed)
        net.add_uem_heads(form)
    description["backbone"] = {**description["backbone"], "uem": form}
    if config.early_exit.freeze_backbone:
        if config.early_exit.lambda_u == 0:
            raise UserError("--config.early_exit.lambda_u=0: with early_exit.freeze_backbone nothing is left to learn")
        net.requires_grad_(False)
        net.lte_classifer.requires_grad_(True)


def describe_trained(config: ConfigDict, description: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoints of a training will say, by what `start_network` says of its start: early exit may teach the
    network to predict something else.
    """
    wanted = config.get("early_exit", {}).get("prediction", "")
    if not wanted:
        return dict(description)
    choose("early_exit.prediction", wanted, sorted(set(TARGETS) - {"both"}))
    if config.early_exit.freeze_backbone and wanted != description["denoiser"]["prediction"]:
        raise UserError(f"--config.early_exit.prediction={wanted}: the checkpoint predicts "
                        f"{description['denoiser']['prediction']}, and with early_exit.freeze_backbone it stays so")
    if description["denoiser"]["prediction"] == "both":
        raise UserError(f"--config.early_exit.prediction={wanted}: the checkpoint predicts both, in twice the channels")
    return {**description, "denoiser": {**description["denoiser"], "prediction": wanted}}


def learns_from(config: ConfigDict) -> str:
    """`early_exit.learn_from`: data, start, or a checkpoint; "" where early exit is not trained."""
    return config.early_exit.get("learn_from", "data") if "early_exit" in config else ""


def _teacher_of_exits(config: ConfigDict, net: nn.Module,
                      description: Mapping[str, Any]) -> tuple[nn.Module, Mapping[str, Any]]:
    """(network, description) of what early exit learns from: the start, or another model of the same kind."""
    name = learns_from(config)
    if name == "start":
        return copy.deepcopy(net), description
    resolve(name, "--config.early_exit.learn_from (data, start, or a checkpoint)")
    teacher, held = load_model(config, name)
    kinds = [{**each, "cond": {**each["cond"], "drop": 0.0}} for each in (held, description)]
    for section in ("schedule", "codec", "image", "cond", "sampler"):
        own, other = (each.get(section) for each in kinds)
        if own != other:
            raise UserError(f"--config.early_exit.learn_from={name}: its {section} is {own}, and the checkpoint's "
                            f"{other}; learn from a model of the same kind")
    return teacher, held


def make_objective(config: ConfigDict, net: nn.Module | None = None, description: Mapping[str, Any] | None = None,
                   precision: str = "fp32", device: torch.device | None = None) -> Objective:
    """What `train.py` minimizes: AdaDiff's loss under the method early_exit, else the diffusion loss.

    net, description: what `start_network` gave, still untrained, of which early exit may learn.
    """
    if "early_exit" not in config:
        return diffusion_loss
    options = {name: value for name, value in config.early_exit.items()
               if name not in ("freeze_backbone", "learn_from", "prediction", "angle_power")}
    power = config.early_exit.angle_power
    if learns_from(config) != "data":
        frozen, held = _teacher_of_exits(config, net, description)
        frozen = frozen.requires_grad_(False).eval()
        frozen = prepare_backbone(frozen, {**config.compute, "compile_mode": "default"}, device)
        if describe_trained(config, description)["denoiser"]["prediction"] != held["denoiser"]["prediction"]:
            held = as_damped(held)  # in other terms, an error of eps at high noise would be multiplied
        teacher = make_denoiser(frozen, held, precision, device)
        options["lesson"] = FromStart(teacher, sampled_times(description, teacher.schedule),
                                      guidance_range(description["cond"]), power)
    elif power:
        raise UserError(f"--config.early_exit.angle_power={power}: for a student of few steps, which learns from what "
                        "it said (--config.early_exit.learn_from=start)")
    return LayerwiseLoss(**options)


def with_precision(config: Mapping, precision: str) -> dict[str, Any]:
    """The config as `make_chain` reads it, in the precision that the training runs in."""
    return {**config, "compute": {**config["compute"], "precision": precision}}

"""A halving's two networks: what the student's checkpoints will say of it, and how its teacher is held."""

import copy
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from ml_collections import ConfigDict
from torch import nn

from ..backbones.guidance import add_guidance_input
from ..build import DTYPES, MODEL_SECTIONS, adopt_sampler, as_damped, make_denoiser, prepare_backbone
from ..denoiser import Denoiser
from ..errors import UserError, choose
from ..schedule import make_schedule, schedule_options
from ..training.objective import Objective, diffusion_loss
from .progressive import Guidance, Halving, check_halving, student_sampler


def student_prediction(section: Mapping, teacher: Mapping[str, Any]) -> str:
    """What the students predict: `distill.prediction`, or where it is empty, as the teacher, but v for one of eps."""
    held = teacher["denoiser"]["prediction"]
    wanted = section["prediction"] or ("v" if held == "eps" else held)
    choose("distill.prediction", wanted, ("v", "x_0", "eps", "eps_damped", "both"))
    if "both" in (held, wanted) and held != wanted:
        raise UserError(f"--config.distill.prediction={section['prediction']}: the teacher predicts {held}; a network "
                        "for both has twice as many output channels as others")
    return wanted


def describe_first_teacher(section: Mapping, held: Mapping[str, Any]) -> dict[str, Any]:
    """What the first stage takes the model to be: a network of eps is one of eps_damped as it is, without a stage 0."""
    return as_damped(held) if student_prediction(section, held) == "eps_damped" else dict(held)


def refuse_other_schedule(config: ConfigDict, teacher: Mapping[str, Any], overrides: Collection[str] = ()) -> None:
    """A teacher's schedule is its student's: refused are another name, and another value of a field that the user set.
    """
    wanted, held = config.schedule.to_dict(), teacher["schedule"]
    if wanted["name"] != held["name"]:
        raise UserError(f"--config.schedule.name={wanted['name']}: the teacher was trained on {held['name']}, and its "
                        "students are distilled on that")
    own = {"name": held["name"]} | schedule_options(**held)
    for field, value in wanted.items():
        if f"schedule.{field}" in overrides and value != own.get(field):
            raise UserError(f"--config.schedule.{field}={value}: the teacher was trained with {own.get(field)}, and "
                            "its students are distilled with that")


def make_guidance(config: ConfigDict, teacher: Mapping[str, Any]) -> Guidance | None:
    """The guidance of a halving's teacher by the distill section's `cfg_scale` or `cfg_range`; None without.

    Only the first teacher of a run is guided: its student needs no guidance, or takes w as an input, from then on.
    """
    section, cond = config.distill, teacher["cond"]
    scale, ends = section["cfg_scale"], tuple(section["cfg_range"])
    if ends and (len(ends) != 2 or not ends[0] < ends[1]):
        raise UserError(f"--config.distill.cfg_range={ends}: want two scales, such as 1,4, the lower one first")
    if ends and scale != 1:
        raise UserError(f"--config.distill.cfg_range={ends}, --config.distill.cfg_scale={scale}: a scale is an input "
                        "of the student or fixed; give one of them")
    if "guidance" in cond:
        low, high = cond["guidance"]
        if scale != 1 or ends not in ((), (low, high)):
            raise UserError(f"--config.distill.{'cfg_range' if ends else 'cfg_scale'}={ends or scale}: the teacher "
                            f"takes scales from {low:g} to {high:g} as an input, and so will its students")
        return Guidance(low, high, None, as_input=True)
    already = teacher.get("distilled", {}).get("cfg_scale")
    if already is not None and (ends or scale not in (1, already)):
        raise UserError(f"--config.distill.{'cfg_range' if ends else 'cfg_scale'}={ends or scale}: the teacher was "
                        f"distilled from one that was guided with {already:g}")
    if already is not None or (scale == 1 and not ends):
        return None
    if cond["kind"] != "label" or cond["null_label"] < 0:
        flag, advice = ("cfg_range", "leave it out") if ends else ("cfg_scale", "use 1.0")
        why = "this teacher has no null class to be guided against"
        if cond["kind"] not in ("none", "label"):
            why = f"guidance by class labels can be distilled, and this teacher has cond.kind={cond['kind']}"
        raise UserError(f"--config.distill.{flag}={ends or scale}: {why}; {advice}")
    low, high = ends or (scale, scale)
    return Guidance(low, high, cond["null_label"], as_input=bool(ends))


def legacy_labels(teacher: dict[str, Any], steps: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(teacher's description, student's) by the time labels of diffusion_distiller: a model of N steps has the cosine
    schedule of N steps, and its step k the label k * time_scale, which falls short of the teacher's label of the same
    noise more and more with every halving.
    """
    schedule, denoiser = teacher["schedule"], teacher["denoiser"]
    if schedule["name"] != "squared_cosine" or denoiser["time_input"] != "index":
        raise UserError("--config.distill.time_label=legacy: made for schedule squared_cosine and time_input index, "
                        f"not {schedule['name']} and {denoiser['time_input']}")
    skip, rest = divmod(schedule["steps"], 2 * steps)  # above 1 where a base model starts with fewer steps than it has
    if rest:
        raise UserError(f"--config.distill.time_label=legacy: {2 * steps} steps do not divide the schedule's "
                        f"{schedule['steps']}")
    student = copy.deepcopy(teacher)
    for description, count, factor in ((teacher, 2 * steps, skip), (student, steps, 2 * skip)):
        description["schedule"]["steps"] = count
        description["denoiser"]["time_scale"] = denoiser_scale(description) * factor
    return teacher, student


def denoiser_scale(description: Mapping[str, Any]) -> float:
    return description["denoiser"].get("time_scale", 1)


def hold(net: nn.Module, precision: str) -> nn.Module:
    """The network with the weights of its matrix products in the precision in which autocast would compute with them:
    the same numbers in half the memory, and no conversion in every call.
    """
    dtype = DTYPES[precision]
    if dtype is not None:
        layers = [module for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        for layer in layers[1:]:  # diffusers takes a network's precision to be that of its first layer
            layer.to(dtype)
    return net


def describe_converted(config: ConfigDict, held: Mapping[str, Any]) -> dict[str, Any]:
    """What the checkpoints of stage 0 will say, by the description of the model that is converted."""
    description = copy.deepcopy(dict(held))
    description["denoiser"]["prediction"] = student_prediction(config.distill, held)
    return description


def describe_halving(config: ConfigDict,
                     held: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any], Guidance | None]:
    """(description of the teacher as it teaches, of its student, the teacher's guidance). Of a halving all mistakes are
    told here, without a network.

    config: of the stage. held: the teacher's description, which stays as it is.
    """
    section = config.distill
    taught = {name: copy.deepcopy(held[name]) for name in (*MODEL_SECTIONS, "image")}
    check_halving(section.weighting, section.target, make_schedule(**taught["schedule"]), section.steps)
    if not math.isfinite(section.gamma) or section.gamma and section.weighting != "gamma":
        raise UserError(f"--config.distill.gamma={section.gamma}: want a number, which is read by distill.weighting="
                        f"gamma alone, and that is {section.weighting!r}")
    description = copy.deepcopy(taught)
    if choose("distill.time_label", section.time_label, ("exact", "legacy")) == "legacy":
        taught, description = legacy_labels(taught, section.steps)
    guidance = make_guidance(config, held)
    scale = held.get("distilled", {})  # what guidance an earlier halving took up
    if guidance is not None:
        description["cond"].update(drop=0.0, null_label=-1)
        scale = {"cfg_scale": guidance.low}
        if guidance.as_input:
            description["cond"]["guidance"] = [guidance.low, guidance.high]
            if guidance.null_label is not None:
                description["backbone"] = dict(description["backbone"]) | {"guidance_embed": True}
            scale = {"cfg_scale": min(max(config.sampler.cfg_scale, guidance.low), guidance.high)}
    description["sampler"] = student_sampler(section.steps, make_schedule(**description["schedule"]), section.sampler)
    if scale:  # an unguided student samples at scale 1
        as_input = "guidance" in description["cond"]
        description["sampler"]["cfg_scale"] = scale["cfg_scale"] if as_input else 1.0
        description["distilled"] = scale
    return taught, description, guidance


def prepare_conversion(config: ConfigDict, model: nn.Module,
                       held: Mapping[str, Any]) -> tuple[nn.Module, dict[str, Any], Objective]:
    """Of stage 0, likewise: (the network at its start, what its checkpoints will say, what it learns: from data)."""
    return copy.deepcopy(model).requires_grad_(True), describe_converted(config, held), diffusion_loss


def frozen_denoiser(config: ConfigDict, model: nn.Module, description: Mapping[str, Any], precision: str,
                    device: torch.device) -> Denoiser:
    """A copy of the model that only teaches."""
    frozen = hold(copy.deepcopy(model).requires_grad_(False).eval(), precision)
    frozen = prepare_backbone(frozen, {**config.compute, "compile_mode": "default"}, device)
    return make_denoiser(frozen, description, precision, device)


def prepare_halving(config: ConfigDict, teacher: nn.Module, held: Mapping[str, Any], precision: str,
                    device: torch.device) -> tuple[nn.Module, dict[str, Any], Halving]:
    """(student at its start, what its checkpoints will say, what it learns).

    config: of the stage; its sampler section becomes the student's. teacher, held: network and description, which stay
    as they are.
    """
    section = config.distill
    taught, description, guidance = describe_halving(config, held)
    student = copy.deepcopy(teacher).requires_grad_(True)
    if guidance is not None and guidance.as_input and guidance.null_label is not None:
        student = add_guidance_input(student)
    halving = Halving(frozen_denoiser(config, teacher, taught, precision, device), section.steps, section.weighting,
                      section.gamma, section.target, section.clip_teacher, guidance)
    adopt_sampler(config, description)
    return student, description, halving

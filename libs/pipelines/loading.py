"""Published diffusers pipelines, loaded from a folder or the hub as a config's `pipeline` section says."""

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from transformers.utils import logging as transformers_logging

from ..errors import UserError, choose
from ..files import reason
from ..hub import find_model, quiet

FAMILIES = {
    "sd15": diffusers.StableDiffusionPipeline,
    "sdxl": diffusers.StableDiffusionXLPipeline,
    "controlnet": diffusers.StableDiffusionControlNetPipeline,
    "sdxl_adapter": diffusers.StableDiffusionXLAdapterPipeline,
    "pixart": diffusers.PixArtAlphaPipeline,
    "sd3": diffusers.StableDiffusion3Pipeline,
}
CHECKED = ("sd15", "controlnet")  # families that come with a safety checker, which is left out
CONTROLS = {  # field of the section that names a network steered by images -> (its class, the call's factor)
    "controlnet": (diffusers.ControlNetModel, "controlnet_conditioning_scale"),
    "adapter": (diffusers.T2IAdapter, "adapter_conditioning_scale"),
}


class SeededFlowLCM(diffusers.FlowMatchLCMScheduler):
    """Draws its noise from `generators`, one a row: Stable Diffusion 3's pipeline hands its scheduler none."""

    generators: list[torch.Generator] | None = None

    def step(self, *args, generator: None = None, **kwargs):
        return super().step(*args, generator=self.generators, **kwargs)


SCHEDULERS = {  # name -> (class, its options); None leaves the pipeline's own
    "own": None,
    "ddim": (diffusers.DDIMScheduler, {}),
    "ddpm": (diffusers.DDPMScheduler, {}),
    "dpm_solver": (diffusers.DPMSolverMultistepScheduler,
                   {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpm_solver_pp": (diffusers.DPMSolverMultistepScheduler, {"algorithm_type": "dpmsolver++"}),
    "euler": (diffusers.EulerDiscreteScheduler, {}),
    "euler_ancestral": (diffusers.EulerAncestralDiscreteScheduler, {}),
    "heun": (diffusers.HeunDiscreteScheduler, {}),
    "lcm": (diffusers.LCMScheduler, {}),
    "flow_lcm": (SeededFlowLCM, {}),
    "pndm": (diffusers.PNDMScheduler, {}),
    "unipc": (diffusers.UniPCMultistepScheduler, {}),
}


def load_pipeline(section: Mapping):
    """(pipeline, {role: folder of its model}) of a config's `pipeline` section, on the host and silent."""
    family = choose("pipeline.name", section["name"], FAMILIES)
    scheduler = choose("pipeline.scheduler", section["scheduler"], SCHEDULERS)
    held: dict[str, Any] = {"use_safetensors": True, "variant": section["variant"] or None}
    parts = {"safety_checker": None, "requires_safety_checker": False} if section["name"] in CHECKED else {}
    with quiet(diffusers_logging, transformers_logging):
        folders = {"pipeline": find_model(section["path"], "pipeline.path",
                                          lambda name: family.download(name, **held, **parts))}
        _refuse_class(family, folders["pipeline"], section["path"])
        for field in CONTROLS:
            if field in section:
                folders[field] = find_model(section[field], f"pipeline.{field}")
                parts[field] = _load(CONTROLS[field][0], folders[field], section[field], f"pipeline.{field}",
                                     use_safetensors=True)
        pipe = _load(family, folders["pipeline"], section["path"], "pipeline.path", **held, **parts)
        if scheduler is not None:
            kind, options = scheduler
            _refuse_scheduler(section["scheduler"], pipe.scheduler)
            pipe.scheduler = kind.from_config(pipe.scheduler.config, **options)
    pipe.set_progress_bar_config(disable=True)
    return pipe, folders


def _refuse_class(family: type, folder: Path, name: str) -> None:
    """Name the classes that there are, where the folder holds a pipeline with parts that `family` does not know."""
    try:
        index = json.loads((folder / "model_index.json").read_text())
        held, parts = index["_class_name"], {key for key, each in index.items() if isinstance(each, list) and any(each)}
    except (OSError, ValueError, KeyError, AttributeError):
        return  # no pipeline at all, which loading tells
    if not parts <= inspect.signature(family).parameters.keys():
        raise UserError(f"pipeline.path={name!r} holds a {held}, not a {family.__name__}; the field pipeline.name "
                        f"chooses from {', '.join(f'{key} ({each.__name__})' for key, each in FAMILIES.items())}")


def _refuse_scheduler(name: str, own: Any) -> None:
    """A scheduler of betas would silently take its own for a model that matches flows, and the other way round."""
    flow = "shift" in own.config
    if (name == "flow_lcm") != flow:
        fitting = [key for key, each in SCHEDULERS.items() if each is None or (key == "flow_lcm") == flow]
        raise UserError(f"pipeline.scheduler={name!r} does not fit the model's {type(own).__name__}; choose from "
                        f"{', '.join(fitting)}")


def _load(kind, folder: Path, name: str, field: str, **options):
    try:
        return kind.from_pretrained(folder, **options)
    # What diffusers raises for files that are missing, damaged, or of another kind of model.
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{field}={name!r} holds no {kind.__name__} ({reason(error)})") from error

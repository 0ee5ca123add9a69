"""A diffusers pipeline as links of the chain, so that one trainer, one denoiser and one set of samplers serve all.

    model = PipelineModel(pipe, device)
    denoiser = make_denoiser(model.net, model.description)
    cond = model.encode(["a cat"])
    prediction = guided(denoiser, 7.5, model.null(cond))(x_t, t, cond)
    images = model.codec.decode(prediction.x_0)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from transformers.utils import logging as transformers_logging

from ..codecs import KLCodec
from ..errors import UserError, choose
from ..hub import quiet
from .loading import load_pipeline
from .networks import PipelineNet, PixArtNet, StableDiffusion3Net, StableDiffusionNet

CHUNK = 4  # texts in one call of the text encoders, always: the last bits depend on their number
BETAS = {"scaled_linear": "scaled_linear", "linear": "ddpm_linear", "squaredcos_cap_v2": "squared_cosine"}
PREDICTIONS = {"epsilon": "eps", "v_prediction": "v", "sample": "x_0"}


class PipelineModel:
    """The links that a loaded pipeline brings along. It takes the pipeline over: moves it, and freezes all but `net`.

    pipe             of a class in FAMILIES
    negative_prompt  the text of `null`; "" is what the model was trained with: for SDXL zeros, else the empty text
    image_size       height and width in pixels; 0 is what the model was made for
    adapter_scale    factor of a T2I-Adapter's features
    path             folder or hub id that the pipeline came from

    net          a `PipelineNet`
    description  its sections schedule, denoiser, cond, codec and image, as a checkpoint holds them
    codec        the pipeline's autoencoder
    Raises UserError for a pipeline of another class, and for a scheduler whose noise no schedule of ours has.
    """

    def __init__(self, pipe: Any, device: torch.device | str = "cpu", negative_prompt: str = "", image_size: int = 0,
                 adapter_scale: float = 1.0, path: str = ""):
        name = type(pipe).__name__
        self.family = choose("pipeline class", name, FAMILIES)
        self.pipe, self.device = pipe, torch.device(device)
        self.negative_prompt, self.adapter_scale = negative_prompt, adapter_scale
        for part in pipe.components.values():
            if isinstance(part, nn.Module):
                part.to(self.device).eval().requires_grad_(False)
        self.net: PipelineNet = self.family.net(getattr(pipe, self.family.net.part)).requires_grad_(True)
        self.codec = PipelineCodec(pipe.vae, self.device)
        self.image_size = image_size or self.net.inner.config.sample_size * pipe.vae_scale_factor
        schedule, denoiser = describe_scheduler(pipe.scheduler)
        self.description = {
            "backbone": {"name": "pipeline", "class": name, "path": path},
            "schedule": schedule,
            "denoiser": denoiser,
            "cond": {"kind": "text", "num_classes": 0, "null_label": -1, "drop": 0.0},
            "codec": {"name": "pipeline"},
            "image": {"size": self.image_size, "channels": 3},
        }
        self.text_device = self.device
        self._negative: dict[str, Tensor] | None = None
        self.zeros = not negative_prompt and bool(pipe.config.get("force_zeros_for_empty_prompt", False))

    def refuse_other_size(self, field: str) -> None:
        """Raise UserError, naming `field`, for an `image_size` that the autoencoder, network or adapter cannot take."""
        config, adapter = self.net.inner.config, getattr(self.pipe, "adapter", None)
        patch = self.pipe.vae_scale_factor * config.get("patch_size", 1)
        unit = math.lcm(patch, adapter.downscale_factor if adapter is not None else 1)
        largest = patch * config.get("pos_embed_max_size", math.inf)
        if self.image_size % unit or self.image_size > largest:
            bound = "" if largest == math.inf else f" of at most {largest}"
            raise UserError(f"--config.{field}={self.image_size}: this {type(self.pipe).__name__} makes images whose "
                            f"sides are multiples of {unit}{bound}")

    def encoders_to(self, device: torch.device | str) -> None:
        """Move the text encoders, such as to the CPU once the texts are encoded; `encode` goes on to work there."""
        self.text_device = torch.device(device)
        for part in self.text_encoders():
            part.to(self.text_device)

    def text_encoders(self) -> list[nn.Module]:
        """Those that the pipeline has, in its order."""
        return [part for name, part in self.pipe.components.items()
                if name.startswith("text_encoder") and part is not None]

    @torch.no_grad()
    def encode(self, texts: Sequence[str], **sizes: Tensor) -> dict[str, Tensor]:
        """The conditions of texts, as the pipeline itself makes them: see the networks. Each is (len(texts), ...).

        sizes: (b, ...) in place of those of a square image of `image_size` pixels, uncropped: SDXL's time_ids are the
        height and width of the original, top and left of the crop, height and width aimed at.
        """
        parts = []
        for start in range(0, len(texts), CHUNK):
            part = list(texts[start:start + CHUNK])
            with quiet(diffusers_logging, transformers_logging):  # of every text that is cut off
                cond = self.family.encode(self.pipe, part + [""] * (CHUNK - len(part)), self.text_device)
            parts.append({name: value[:len(part)] for name, value in cond.items()})
        cond = {name: torch.cat([part[name] for part in parts]).to(self.device) for name in parts[0]}
        return cond | self.sizes(len(texts)) | sizes

    def sizes(self, count: int) -> dict[str, Tensor]:
        """The conditions, (count, ...) each, of square images of `image_size` pixels, uncropped."""
        return {name: torch.tensor(numbers, dtype=torch.float32, device=self.device).repeat(count, 1)
                for name, numbers in self.family.sizes(self.net.inner, self.image_size).items()}

    def encode_stored(self, texts: Sequence[str]) -> tuple[Tensor, ...]:
        """Those conditions of texts alone, the context first: what is stored of them; see `stored`."""
        cond = self.encode(texts)
        return tuple(cond[name] for name in ("context", self.family.beside) if name)

    def stored(self, context: Tensor, beside: Tensor | None) -> dict[str, Tensor]:
        """The conditions again, (b, ...) each, of what `encode_stored` gave."""
        held = {"context": context, **({} if beside is None else {self.family.beside: beside})}
        return {name: each.to(self.device) for name, each in held.items()} | self.sizes(len(context))

    def null(self, cond: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The unconditional counterpart of `cond`: another text, or zeros, with the same sizes and adapter features."""
        if self.zeros:
            return {**cond, **{name: torch.zeros_like(cond[name]) for name in ("context", "pooled")}}
        if self._negative is None:
            self._negative = self.encode([self.negative_prompt])
        texts = self._negative.keys() - self.family.sizes(self.net.inner, self.image_size)
        return {**cond, **{name: self._negative[name].to(cond[name]).expand_as(cond[name]) for name in texts}}

    @torch.no_grad()
    def adapt(self, images: Tensor) -> dict[str, Tensor]:
        """The features that a T2I-Adapter adds to the conditions: uint8 (b, h, w, 1 or 3) -> adapter_0, adapter_1, ...

        images: what the adapter was trained on, such as white Canny edges on black.
        """
        adapter = self.pipe.adapter
        x = images.to(self.device).permute(0, 3, 1, 2).to(adapter.dtype) / 255
        x = x.expand(-1, 3, -1, -1)[:, :adapter.config.in_channels]
        return {f"adapter_{i}": self.adapter_scale * each for i, each in enumerate(adapter(x))}


class PipelineCodec(KLCodec):
    """A pipeline's own autoencoder: z = scale_factor * (mean + std * noise - shift). It works in float32, since SDXL's
    overflows in half precision.
    """

    def __init__(self, vae: nn.Module, device: torch.device | str = "cpu", chunk: int = 16):
        self.vae = nn.Module.to(vae, device, torch.float32)
        self.device, self.chunk = torch.device(device), chunk
        mean, std = (vae.config.get(f"latents_{name}") for name in ("mean", "std"))
        if mean is None or std is None:
            self.scale_factor, self.shift = vae.config.scaling_factor, vae.config.get("shift_factor") or 0.0
        else:  # of each channel, in finetunes of SDXL
            self.shift, std = (torch.tensor(each, device=self.device).view(1, -1, 1, 1) for each in (mean, std))
            self.scale_factor = vae.config.scaling_factor / std

    def encode_moments(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        return super().encode_moments(moments, noise) - self.scale_factor * self.shift

    def pixels(self, x: Tensor) -> Tensor:
        return super().pixels(x.to(self.device).float() + self.scale_factor * self.shift)


@dataclass(frozen=True)
class Family:
    """What differs among pipelines.

    net     the adapter of its network
    encode  (pipe, texts, device) -> the conditions of texts, by the pipeline's own `encode_prompt`
    sizes   (network, pixels) -> the conditions, as numbers, of a square image of that size
    beside  the condition, (b, d), that `encode` gives beside the context, if any
    """

    net: type[PipelineNet]
    encode: Callable[[Any, list[str], torch.device], dict[str, Tensor]]
    beside: str = ""
    sizes: Callable[[nn.Module, int], dict[str, list[float]]] = lambda net, size: {}


def _encode_sd(pipe: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    context, _ = pipe.encode_prompt(texts, device, 1, False)
    return {"context": context}


def _encode_sdxl(pipe: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    context, _, pooled, _ = pipe.encode_prompt(texts, device=device, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def _encode_pixart(pipe: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    context, mask, _, _ = pipe.encode_prompt(texts, False, device=device)
    return {"context": context, "mask": mask}


def _encode_sd3(pipe: Any, texts: list[str], device: torch.device) -> dict[str, Tensor]:
    context, _, pooled, _ = pipe.encode_prompt(texts, None, None, device=device, do_classifier_free_guidance=False)
    return {"context": context, "pooled": pooled}


def _sdxl_sizes(net: nn.Module, size: int) -> dict[str, list[float]]:
    return {"time_ids": [size, size, 0, 0, size, size]}  # 2307.01952, section 2.2


def _pixart_sizes(net: nn.Module, size: int) -> dict[str, list[float]]:
    return {"resolution": [size, size], "aspect_ratio": [1]} if net.use_additional_conditions else {}


_SD = Family(StableDiffusionNet, _encode_sd)
_SDXL = Family(StableDiffusionNet, _encode_sdxl, "pooled", _sdxl_sizes)
FAMILIES = {
    "StableDiffusionPipeline": _SD,
    "StableDiffusionAdapterPipeline": _SD,
    "StableDiffusionXLPipeline": _SDXL,
    "StableDiffusionXLAdapterPipeline": _SDXL,
    "PixArtAlphaPipeline": Family(PixArtNet, _encode_pixart, "mask", _pixart_sizes),
    "StableDiffusion3Pipeline": Family(StableDiffusion3Net, _encode_sd3, "pooled"),
}


def describe_scheduler(scheduler: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """(schedule, denoiser) sections of a diffusers scheduler: what it was trained on, whatever it samples by.

    Raises UserError for betas or predictions of another kind.
    """
    config, name = scheduler.config, type(scheduler).__name__
    if "shift" in config:  # it matches flows
        if config.use_dynamic_shifting:
            raise UserError(f"{name}: use_dynamic_shifting=True is not supported; only a fixed shift is")
        denoiser = {"prediction": "flow", "time_input": "1000sigma", "time_scale": config.num_train_timesteps / 1000}
        return {"name": "flow_matching", "shift": config.shift}, denoiser
    for field in ("trained_betas", "rescale_betas_zero_snr"):
        if config.get(field):
            raise UserError(f"{name}: {field}={config[field]!r} is not supported; only betas of a formula are")
    schedule = {"name": choose(f"{name}: beta_schedule", config.get("beta_schedule"), BETAS),
                "steps": config.num_train_timesteps}
    if schedule["name"] != "squared_cosine":
        schedule |= {"beta_start": config.beta_start, "beta_end": config.beta_end}
    prediction = choose(f"{name}: prediction_type", config.get("prediction_type", "epsilon"), PREDICTIONS)
    return schedule, {"prediction": prediction, "time_input": "index"}


def load_pipeline_model(section: Mapping, device: torch.device | str = "cpu",
                        dtype: torch.dtype = torch.float32) -> PipelineModel:
    """The model of a config's `pipeline` section, all but its autoencoder in `dtype`."""
    pipe, _ = load_pipeline({**section, "scheduler": "own"})
    for name, part in pipe.components.items():
        if isinstance(part, nn.Module) and name != "vae":
            nn.Module.to(part, dtype)  # diffusers' own warns of a cast
    size = section["height"]
    if size != section["width"]:
        raise UserError(f"pipeline.height={size}, pipeline.width={section['width']}: a chain's images are square")
    return PipelineModel(pipe, device, section["negative_prompt"], size, section.get("control_scale", 1.0),
                         section["path"])

"""Images from seeds and prompts by a diffusers pipeline or its student, with a caching policy or plain.

Image i depends on seed i and its prompt alone: every image has a generator of its own, on the host, so that a CPU
and a GPU start from the same noise. Kernels give a row the same bits only at an equal number of rows, so a call
always makes `rows` images, the last group padded.
"""

import contextlib
import json
import math
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import PartialState
from diffusers.utils import logging as diffusers_logging
from ml_collections import ConfigDict
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm
from transformers.utils import logging as transformers_logging

from ..benchmark import synchronize
from ..cost import MacCounter, countable
from ..data.folder import list_images
from ..data.images import image_grid
from ..errors import UserError, choose
from ..files import reason
from ..hub import model_id, quiet
from ..image_folder import ImageFolder, policy_files
from ..policies import make_spec
from ..prompts import prompts_id, prompts_of, read_prompts
from ..provenance import file_sha256, machine
from .apply import Handle, apply_policy
from .loading import CONTROLS, load_pipeline

PAIRS = 8  # seeds in the picture of a comparison at most
ORIGINS = ("path", "student", "other_base")  # fields of the section for which the files themselves stand
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class PipelineSampler:
    """A diffusers pipeline as a source of images, made from the sections `pipeline`, `policy` and `compute`.

    control: an image, or a folder of images, for a ControlNet or a T2I-Adapter: seed i is steered by image i modulo
        their number.
    chosen: fields of the config that the user set, which a student does not.
    Raises UserError, naming the field, for a model that is not there and for settings that do not exist.

    rows         images in one call of the pipeline (twice as many in its network under guidance)
    network      its UNet or transformer
    nfe          steps of the scheduler's loop, each one call of the network
    fingerprint  what decides the image of a seed, to its last bit on one machine; plain_fingerprint: without the policy
    """

    num_classes = 0  # prompts take the place of labels
    shown = None  # of a chain: images and texts of which its conditioners make conditions

    def __init__(self, config: ConfigDict, prompts: Sequence[str], device: torch.device,
                 control: str | None = None, chosen: Collection[str] = ()):
        section, compute = config.pipeline, config.compute
        _check(section, compute)
        self.section, self.policy, self.compute = section, config.policy, compute
        self.prompts, self.device, self.rows = prompts, device, compute.rows
        self.steered_by = next((field for field in CONTROLS if field in section), None)
        self.control = _control_files(control, self.steered_by is not None)
        self.spec = make_spec(config.policy)
        dtype = choose("compute.precision", compute.precision, DTYPES)
        self.pipe, models = load_pipeline(section) if not section.student else load_with_student(section, chosen)
        self.cfg_scale = section.guidance
        with quiet(diffusers_logging, transformers_logging):
            self.pipe.to(device, dtype)
        self.network: nn.Module = getattr(self.pipe, "unet", None) or self.pipe.transformer
        if compute.compile:
            self.network.compile()
        self.pipe.scheduler.set_timesteps(section.steps)
        self.nfe = len(self.pipe.scheduler.timesteps)
        if self.spec is not None:
            self.spec.is_full(0, self.nfe)  # refuses key steps that this loop does not have, before anything is written
        self.handle = self._apply()
        held = {"pipeline": {name: value for name, value in section.items() if name not in (*ORIGINS, *CONTROLS)},
                "models": {name: model_id(folder) for name, folder in models.items()},
                "prompts_sha256": prompts_id(prompts), "control_sha256": file_sha256(control) if control else None,
                "compute": {name: compute[name] for name in ("precision", "compile", "rows")}}
        held = json.loads(json.dumps(held))
        self.plain_fingerprint: dict[str, Any] = held | {"policy": {"name": "full"}}
        self.fingerprint: dict[str, Any] = held | {"policy": config.policy.to_dict()} | policy_files(config.policy)

    def _apply(self) -> Handle | None:
        """The handle of the policy, now at work in the pipeline; None for a plain one."""
        return None if self.spec is None else apply_policy(self.pipe, self.spec)

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Without the policy."""
        if self.handle is not None:
            self.handle.disable()
        try:
            yield
        finally:
            self.handle = self._apply()

    def stats(self) -> dict[str, int]:
        """What the policy ran since it was applied; {} for a plain pipeline."""
        return {} if self.handle is None else self.handle.stats()

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(h, w, c) of an image that no other image steers."""
        default = self.network.config.sample_size * self.pipe.vae_scale_factor
        return self.section.height or default, self.section.width or default, 3

    def texts(self, seeds: Sequence[int]) -> list[str]:
        """The prompts that the seeds' images are made from."""
        return prompts_of(seeds, self.prompts)

    def gmacs_per_image(self, seeds: Sequence[int]) -> dict[str, float]:
        """Giga multiply-adds of all network calls for one image, as `cost.gmacs_per_image` counts them, over one call
        of the pipeline for the first `rows` seeds: its policies do the same for every image. Text encoders and
        autoencoder do not count.
        """
        forward, own = self.network.forward, "forward" in vars(self.network)  # that of a policy, if any
        counters = []

        def counted(*args, **kwargs):
            counters.append(MacCounter())
            with counters[-1]:
                return forward(*args, **kwargs)

        self.network.forward = counted
        try:
            with countable(self.network):
                self.sample(seeds[:self.rows])
        finally:
            del self.network.forward
            if own:
                self.network.forward = forward
        unit = 1e9 * self.rows
        total, attention = (sum(getattr(each, name) for each in counters) for name in ("total", "attention"))
        return {"with_attention_products": total / unit, "without_attention_products": (total - attention) / unit,
                "counted_images": self.rows}

    def sample(self, seeds: Sequence[int]) -> Tensor:
        """The images of up to `rows` seeds: uint8 (b, h, w, 3) on the host."""
        count = len(seeds)
        assert 0 < count <= self.rows, f"{count} seeds in a group of {self.rows} rows"
        padded = [*seeds, *[seeds[-1]] * (self.rows - count)]
        section = self.section
        options = {"prompt": self.texts(padded), "num_inference_steps": section.steps,
                   "guidance_scale": section.guidance, "height": section.height or None,
                   "width": section.width or None}
        if section.negative_prompt:  # SDXL's own default for none is not the empty prompt
            options["negative_prompt"] = [section.negative_prompt] * self.rows
        if section.name == "pixart":
            options["clean_caption"] = False  # else what is drawn would depend on which packages are installed
        if self.control:
            files = [self.control[seed % len(self.control)] for seed in padded]
            options |= {"image": [_read_image(file) for file in files],
                        CONTROLS[self.steered_by][1]: section.control_scale}
        generators = [torch.Generator().manual_seed(seed) for seed in padded]
        if section.scheduler == "flow_lcm":
            self.pipe.scheduler.generators = generators
        images = self.pipe(**options, generator=generators, output_type="pt").images[:count]  # b 3 h w in 0 ... 1
        levels = (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
        return levels.permute(0, 2, 3, 1).contiguous().cpu()  # b h w c

    def images(self, seeds: Sequence[int], labels: None = None,
               batch_size: int | None = None) -> Iterator[tuple[list[int], Tensor]]:
        """Batches (seeds, uint8 images b h w c) of `batch_size` (default: `rows`) in the seeds' order."""
        batch_size = batch_size or self.rows
        for start in range(0, len(seeds), batch_size):
            batch = list(seeds[start:start + batch_size])
            yield batch, torch.cat([self.sample(batch[i:i + self.rows]) for i in range(0, len(batch), self.rows)])


def open_sampler(config: ConfigDict, prompts: str | None, student: str | None, device: torch.device,
                 control: str | None = None, chosen: Collection[str] = ()) -> PipelineSampler:
    """The `PipelineSampler` of what --prompts, --checkpoint (a student) and --control_image name."""
    if student:
        if config.pipeline.student:
            raise UserError(f"--checkpoint={student}, pipeline.student={config.pipeline.student!r}: of a pipeline both "
                            "name the student; give one of them")
        config.pipeline.student = student
    if prompts is None:
        raise UserError("--prompts is missing: a text, a .txt file with one a line, or a .json file of COCO's captions")
    return PipelineSampler(config, read_prompts(prompts), device, control, chosen)


def load_with_student(section: ConfigDict, chosen: Collection[str]) -> tuple[Any, dict[str, Path]]:
    """`load_pipeline`, the section's student merged into the network.

    The section takes over the student's scheduler, steps and guidance, but for what is in `chosen`.
    """
    from ..lora import merge_lora
    from .student import load_student, student_folder  # peft takes seconds to import

    if "pipeline.scheduler" in chosen and section.scheduler != "own":
        raise UserError(f"pipeline.scheduler={section.scheduler!r}: a student samples by its own at the times that it "
                        "was trained at; leave the field out")
    section.scheduler = "own"
    folder = student_folder(section.student, "pipeline.student")
    pipe, models = load_pipeline(section)
    student = load_student(pipe, folder, steps=1, other_base=section.other_base)  # each call says its steps
    if "pipeline.steps" not in chosen:
        section.steps = len(pipe.scheduler.trained)
    if "pipeline.guidance" not in chosen:
        section.guidance = student.call["guidance_scale"]
    merge_lora(student.network)
    return pipe, {**models, "student": folder}


def compare(sampler: PipelineSampler, seeds: Sequence[int], folder: ImageFolder,
            repeats: int) -> tuple[dict[str, Any], Tensor]:
    """(result, picture) of the plain pipeline beside the accelerated one, whose images are in `folder`.

    Times are of one call for the first `rows` seeds (text, denoising, decoding): one untimed call of each, then
    `repeats` of each in turn, their median, the device synchronised before and after. The plain pipeline's images
    of all seeds go into the folder plain/. The picture has two columns, plain and accelerated: uint8 (H, W, 3).
    """
    plain_folder = ImageFolder(folder.path / "plain", sampler.plain_fingerprint)
    missing = plain_folder.missing(seeds)
    with sampler.plain(), tqdm(total=len(missing), desc="plain", unit="image") as progress:
        for batch, images in sampler.images(missing):
            plain_folder.save(batch, images)
            progress.update(len(batch))

    first = seeds[:sampler.rows]
    seconds: dict[str, list[float]] = {"plain": [], "accelerated": []}
    for _ in tqdm(range(repeats + 1), desc="timing"):
        with sampler.plain():
            seconds["plain"].append(_timed(sampler, first))
        seconds["accelerated"].append(_timed(sampler, first))
    plain, accelerated = (median(each[1:]) for each in seconds.values())
    one, other = plain_folder.load(seeds), folder.load(seeds)
    result = {"plain_seconds": plain, "accelerated_seconds": accelerated, "ratio": plain / accelerated,
              "images_in_a_call": len(first), "repeats": repeats,
              "seconds": {name: each[1:] for name, each in seconds.items()},
              "psnr_db": psnr(one, other), "images": len(seeds), "machine": machine(sampler.device),
              "method": sampler.policy.to_dict(), "compute": sampler.compute.to_dict(),
              "pipeline": sampler.section.to_dict(), "nfe": sampler.nfe, "stats_of_a_call": sampler.stats()}
    pairs = torch.stack([one[:PAIRS], other[:PAIRS]], dim=1).flatten(0, 1)
    return result, image_grid(pairs, columns=2)


def check_compare(policy: Mapping, out: str, repeats: int) -> None:
    """Refuse a comparison that makes no sense, before hours of sampling."""
    if policy["name"] == "full":
        raise UserError("--compare: without a policy this is the plain pipeline; name one after the colon of --config")
    if out.endswith(".npz"):
        raise UserError(f"--compare writes into a folder, not into --out={out}")
    if repeats < 1:
        raise UserError(f"--repeats={repeats} must be at least 1")
    if PartialState().num_processes > 1:
        raise UserError("--compare times one process; leave accelerate launch out")


def _timed(sampler: PipelineSampler, seeds: Sequence[int]) -> float:
    """Seconds of one call."""
    synchronize(sampler.device)
    began = time.perf_counter()
    sampler.sample(seeds)
    synchronize(sampler.device)
    return time.perf_counter() - began


def psnr(one: Tensor, other: Tensor) -> float | None:
    """Peak signal-to-noise ratio in dB of uint8 images (b, h, w, c), over all of them; None where they are equal."""
    error = (one.double() - other.double()).square().mean().item()
    return 10 * math.log10(255**2 / error) if error else None


def _check(section: Mapping, compute: Mapping) -> None:
    if section["steps"] < 1:
        raise UserError(f"pipeline.steps={section['steps']} must be at least 1")
    if compute["rows"] < 1:
        raise UserError(f"compute.rows={compute['rows']} must be at least 1")
    if compute["compile_mode"] != "default":
        raise UserError(f"compute.compile_mode={compute['compile_mode']}: a pipeline's network is compiled by default; "
                        "its scheduler holds on to what a CUDA graph would write over")
    factor = 16 if section["name"] == "sd3" else 8  # pixels a latent, or a patch of them
    for side in ("height", "width"):
        if section[side] < 0 or section[side] % factor:
            raise UserError(f"pipeline.{side}={section[side]} must be a multiple of {factor}, or 0 for the model's own")
    if bool(section["height"]) != bool(section["width"]):  # diffusers would take its own for both
        raise UserError(f"pipeline.height={section['height']}, pipeline.width={section['width']}: give both or none")


def _control_files(path: str | None, wanted: bool) -> list[Path]:
    """The image file `path`, or those of a folder in the order of their names."""
    if (path is not None) != wanted:
        raise UserError(f"--control_image={path}: a ControlNet needs an image or a folder of them, and so does a "
                        "T2I-Adapter; other pipelines take none")
    if path is None:
        return []
    if Path(path).is_file():
        return [Path(path)]
    return [Path(path, name) for name in list_images(path, "--control_image")]


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"--control_image: {path} cannot be read as an image ({reason(error)})") from error

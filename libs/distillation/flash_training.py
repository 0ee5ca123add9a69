"""Training of Flash Diffusion's students (2406.02347) in the shared loop, with the objective of `flash`.

A LoRA student needs one network: with its LoRA off it is the teacher, the real score and the discriminator's trunk,
with it on the student and the fake score. A student that is trained whole has a frozen copy as its teacher.
"""

import copy
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor, nn

from ..build import (
    MODEL_SECTIONS,
    adopt_places,
    adopt_sampler,
    image_conditioners,
    load_model,
    make_chain,
    make_denoiser,
    prepare_backbone,
)
from ..codecs import Codec, make_codec
from ..conditioners import Conditioners
from ..config import override
from ..data.images import save_png
from ..errors import UserError, choose
from ..generate import Chain
from ..heads.discriminator import make_discriminator
from ..methods import clockwork, encoder_propagation
from ..montage import montage
from ..samplers import make_sampler
from ..schedule import make_schedule, time_grid
from ..seeds import parse_labels
from ..training import Run, Trainer, choose_precision, load_training_data, validate
from ..training.setup import without_heads
from ..training.state import Saved
from ..weights import weights_digest
from .flash import Flash, student_sampler
from .flash_rollout import cached
from .flash_stages import Stage, read_stages
from .progressive import grid_of
from .student import hold, refuse_other_schedule
from .teacher_features import TeacherFeatures, feature_shape

SHOWN_STEPS = (1, 2, 4)  # of the student, in its pictures
AT_LEAST = {"lora_rank": 0, "lora_alpha": 0, "student_steps": 1, "discriminator_width": 1}  # of its section


def check(config: ConfigDict, processes: int) -> list[Stage]:
    """The stages; settings that make no training are refused before anything is loaded."""
    section = config.distill
    for field, least in AT_LEAST.items():
        if section[field] < least:
            raise UserError(f"--config.distill.{field}={section[field]} must be at least {least}")
    if not section.discriminator_lr > 0:
        raise UserError(f"--config.distill.discriminator_lr={section.discriminator_lr} must be positive")
    if config.policy.name != "full":
        raise UserError(f"policy.name={config.policy.name!r}: a student learns from the whole network; leave the "
                        "policy out, and use it when the student samples")
    modes = len(str(section.mode_weights).split(";")[0].split(","))
    if section.start == "modes" and modes % section.student_steps:
        raise UserError(f"--config.distill.student_steps={section.student_steps}: a student is trained at {modes} "
                        "times (mode_weights), of which so many are not evenly spread")
    numbers = {"train": config.train, "eval": config.eval, "seed": config.seed, "cond": {"drop": 0.0}}
    validate(ConfigDict(numbers), processes)
    return read_stages(section)


def null_condition(cond: Mapping[str, Any], empty: Tensor | None,
                   conditioners: Conditioners | None = None) -> Callable[[dict], dict] | None:
    """What a network is guided against, as `null(cond) -> cond` of the same shapes; None where there is nothing.

    cond: of the network's description. empty: (tokens, width) of the empty text, for a network of texts. conditioners:
        of a network with some, called before.
    """
    if cond["kind"] == "label" and cond["null_label"] >= 0:
        return lambda held: {"y": torch.full_like(held["y"], cond["null_label"])}
    if cond["kind"] == "text" and empty is not None:
        return lambda held: {"context": empty.expand_as(held["context"])}
    if conditioners is not None and conditioners.guidable:
        return conditioners.unconditional
    return None


def student_description(config: ConfigDict, teacher: Mapping[str, Any]) -> dict[str, Any]:
    """What the student's checkpoints say: the teacher's sections, no guidance, and the sampler of a few steps."""
    description = {name: copy.deepcopy(teacher[name]) for name in (*MODEL_SECTIONS, "image")}
    description["cond"].update(drop=0.0)
    if "text_drop" in description["cond"]:
        description["cond"]["text_drop"] = 0.0
    if description["cond"]["kind"] == "label":  # conditioners say by their rates whether they can be guided
        description["cond"]["null_label"] = -1
    sampler = student_sampler(config.distill.student_steps, make_schedule(**description["schedule"]))
    kept = {name: config.sampler[name] for name in ("threshold", "threshold_value")}
    description["sampler"] = {**sampler, **kept, "cfg_scale": 1.0}
    description["distilled"] = {"method": "flash"}
    return description


def rollout_policy(text: str) -> dict[str, Any] | None:
    """The `policy` section by which the teacher's roll-outs run; None for the whole network.

    >>> rollout_policy("clockwork:3")["clock"]
    3
    """
    name, _, value = text.partition(":")
    method = choose("distill.teacher_policy", name, {"full": None, "clockwork": clockwork,
                                                     "encoder_propagation": encoder_propagation})
    if method is None:
        return None
    config = ConfigDict()
    method(config)
    if value:
        override(config, "policy.clock" if name == "clockwork" else "policy.key_steps", value)
    return config.policy.to_dict()


def refuse_other_weights(run: Run, saved: Saved | None, net: nn.Module) -> None:
    """Raise UserError where the run learned from other weights than those of `net`, which its student starts from, and
    with a LoRA goes on with.
    """
    if not run.config.distill.lora_rank:
        run.start_from(weights_digest(net))
    elif saved is not None:
        from ..lora import fingerprint, same_weights

        if not same_weights(saved.description["lora"]["base_fingerprint"], fingerprint(net)):
            raise run.other_weights()


class FlashSetup:
    """Student, teacher and objective of a run, around the network `net` that they start from.

    net, held   the teacher's network on the CPU, and its description; `net` itself becomes the student
    start       what --checkpoint named, for a LoRA's description
    codec       of the images, null: what the teacher is guided against, see `null_condition`
    """

    def __init__(self, config: ConfigDict, stages: list[Stage], net: nn.Module, held: Mapping[str, Any], start: str,
                 codec: Codec, null: Callable[[dict], dict] | None, precision: str, device: torch.device):
        section = config.distill
        if "guidance" in held["cond"]:
            raise UserError("--checkpoint: the teacher takes the guidance scale as an input, which a student of Flash "
                            "Diffusion does not; name a model that takes none")
        torch.manual_seed(config.seed)  # of what is new: LoRA and discriminator
        self.stages, self.solver, self.null_label = stages, section.teacher_solver, held["cond"]["null_label"]
        self.description = student_description(config, held)
        self.student = net.requires_grad_(True)
        if section.lora_rank:
            called, frozen = self._add_lora(section, start, precision)
        else:
            called = frozen = hold(copy.deepcopy(net).requires_grad_(False).eval(), precision)
            prepare_backbone(frozen, {**config.compute, "compile": False}, device)
        self.teacher = make_denoiser(called, held, precision, device)
        image, features, discriminator = held["image"], None, None
        if any(stage.adversarial for stage in stages):
            features = TeacherFeatures(self.teacher, frozen, section.discriminator_features)
            shape = codec.latent_shape(image["size"], image["channels"])
            discriminator = make_discriminator(section, *feature_shape(frozen, shape, section.discriminator_features))
        policy = rollout_policy(section.teacher_policy)
        self.objective = Flash(stages, self.teacher, null, features, discriminator, section, codec.pixels,
                               policy and partial(cached, frozen, policy))
        learned = sum(each.numel() for each in net.parameters() if each.requires_grad)
        beside = sum(each.numel() for each in discriminator.parameters()) if discriminator else 0
        logging.info("%s parameters learn in the %s, %s in the discriminator", f"{learned:,}",
                     "student's LoRA" if section.lora_rank else "student", f"{beside:,}")
        self.objective.lr_factor = section.discriminator_lr / config.train.lr
        adopt_sampler(config, self.description)

    def _add_lora(self, section: Mapping, start: str, precision: str) -> tuple[Callable, nn.Module]:
        from ..lora import AdaptersOff, add_lora, fingerprint

        targets = [name.strip() for name in section.lora_targets.split(",") if name.strip()]
        alpha = section.lora_alpha or section.lora_rank
        base = fingerprint(self.student)
        hold(self.student, precision)
        used = add_lora(self.student, section.lora_rank, alpha, targets)
        self.description["lora"] = {"base": start, "base_fingerprint": base, "rank": section.lora_rank, "alpha": alpha,
                                    "targets": used}
        return AdaptersOff(self.student), self.student


class FlashTrainer(Trainer):
    """The shared loop; its pictures show the student at 1, 2 and 4 steps below its teacher.

    conditioners   of the teacher, where it has some; the student always sees what they give
    """

    def __init__(self, config: ConfigDict, run: Run, setup: FlashSetup, precision: str,
                 conditioners: Conditioners | None = None):
        self.conditioners = conditioners
        super().__init__(config, run, setup.student, setup.description, setup.objective, precision)
        self.setup = setup
        if config.distill.lora_rank:  # the network is its own teacher
            setup.objective.alone = self.alone
        self.taught: Tensor | None = None  # the teacher's images, which stay the same

    def _make_chain(self, config: Mapping[str, Any]) -> Chain:
        conditioners = None if self.conditioners is None else self.conditioners.always()
        return make_chain(config, self.ema.net, self.description, self.device, conditioners=conditioners)

    def _preview(self) -> None:
        with self._sampling(), self.setup.objective.alone():
            if not self.processes.is_main:
                return
            count = min(self.section.preview_images, self.chain.rows)
            seeds = list(range(count))
            labels = parse_labels(None, seeds, self.chain.num_classes)
            if self.taught is None:
                self.taught = images_of(self._teacher_chain(), seeds, labels)
            rows = [(f"teacher, {self.setup.stages[-1].steps} steps", self.taught)]
            for steps in SHOWN_STEPS:
                rows.append((f"student, {steps} step{'s' * (steps > 1)}", images_of(few_steps(self.chain, steps),
                                                                                    seeds, labels)))
            picture = montage(rows)
            save_png(self.run.workdir / "previews" / f"{self.step:08d}.png", picture)
            self.report.board.add_image("preview", picture, self.step, dataformats="HWC")

    def _teacher_chain(self) -> Chain:
        """What the student learns to make of noise: the last stage's roll-out, guided by its range's mean."""
        stage = self.setup.stages[-1]
        chain = few_steps(self.chain, stage.steps)
        return replace(chain, denoiser=self.setup.teacher, sampler=make_sampler(self.setup.solver, order=2),
                       cfg_scale=sum(stage.guidance) / 2, null_label=self.setup.null_label,
                       conditioners=self.conditioners)


def few_steps(chain: Chain, steps: int) -> Chain:
    """The chain of a student at another number of steps."""
    schedule = chain.denoiser.schedule
    return replace(chain, ts=time_grid(grid_of(schedule), steps, schedule))


def images_of(chain: Chain, seeds: list[int], labels: list[int] | None) -> Tensor:
    """uint8 (n, h, w, c) in host memory."""
    return torch.cat([images.cpu() for _, images in chain.images(seeds, labels)])


def distil_chain(config: ConfigDict, stages: list[Stage], run: Run, began: float,
                 overrides: Collection[str] = ()) -> int:
    """Train the student of `config.distill` in `run`, or go on there. Returns the exit status, as `Trainer.train`.

    stages: of `check`. began: `time.monotonic()` from which `train.max_minutes` counts. overrides: see `adopt_places`.
    """
    processes, precision = run.processes, choose_precision(config)
    saved = run.resume()
    if saved is not None and saved.step >= config.train.steps:
        logging.info("%s is finished: %d steps; a larger --config.train.steps goes on", run.workdir, saved.step)
        return 0
    net, held = without_heads(*load_model(config, run.start))
    refuse_other_weights(run, saved, net)
    adopt_places(config, held, overrides)
    refuse_other_schedule(config, held, overrides)
    data = load_training_data(config.data, held, processes.device)
    codec = make_codec(held["codec"], processes.device)
    size = codec.latent_shape(held["image"]["size"], held["image"]["channels"])[1:]
    conditioners = image_conditioners(held, net, size, processes.device)
    null = null_condition(held["cond"], getattr(data, "empty_context", None), conditioners)
    setup = FlashSetup(config, stages, net, held, run.start, codec, null, precision, processes.device)
    trainer = FlashTrainer(config, run, setup, precision, conditioners)
    trainer.restore(saved)
    return trainer.train(data, began)

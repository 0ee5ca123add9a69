"""Flash Diffusion on a diffusers pipeline (2406.02347): images with captions teach a LoRA, or the whole network.

Images and captions come from webdataset shards or a folder; the pipeline's own text encoders and autoencoder turn them
into what its network sees, in training or beforehand (prepare_data.py latents and text). WORKDIR/student is what
pipelines load; beside it are the checkpoints of the training.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from absl import logging
from ml_collections import ConfigDict
from torch import Tensor

from ..build import DTYPES, make_denoiser, make_times
from ..contexts import FIRST
from ..data import load_learned
from ..data.canny import canny
from ..data.feature_data import FeatureData
from ..data.shards import ShardData
from ..errors import UserError, choose
from ..generate import Chain
from ..pipelines.model import PipelineModel, load_pipeline_model
from ..pipelines.student import IN_WORKDIR, save_student
from ..policies import Full
from ..processes import Processes
from ..random import Stream
from ..samplers import make_sampler
from ..training import Batch, Batches, Run, choose_precision
from .flash_stages import Stage
from .flash_training import FlashSetup, FlashTrainer, refuse_other_weights

CAPTIONED = ("webdataset", "captioned_folder", "features")  # data sets that can teach a pipeline
ALIKE = 0.05  # relative distance of one text's hidden states in two precisions, at most


class Captions:
    """What a pipeline's network is shown of images with captions.

    conditions(seeds), unconditional(cond)   for a chain: seed i shows image i modulo their number
    """

    def __init__(self, model: PipelineModel, data: ShardData):
        self.model, self.data = model, data
        self.steered = getattr(model.pipe, "adapter", None) is not None

    def __call__(self, texts: Sequence[str], images: Tensor) -> dict[str, Tensor]:
        """Conditions of texts, and of uint8 images (b, h, w, c) where their edges steer a T2I-Adapter."""
        cond = self.model.encode(texts)
        return cond | self.model.adapt(edges_of(images)) if self.steered else cond

    def of_data(self, indices: Tensor, draws: Tensor, images: Tensor) -> dict[str, Tensor]:
        """Conditions of samples, of whose captions `draws` (b,) chooses; `images` are as they are shown."""
        with torch.inference_mode(False):  # the mode is one thread's, and threads read the files
            texts = self.data.texts(indices, draws)
        return self(texts, images)

    def conditions(self, seeds: Sequence[int]) -> dict[str, Tensor]:
        indices = torch.tensor([seed % len(self.data) for seed in seeds])
        with torch.inference_mode(False):
            images = self.data.batch(indices)[0]
        return self.of_data(indices, torch.full((len(seeds),), FIRST, dtype=torch.float64), images)

    def unconditional(self, cond: dict[str, Tensor]) -> dict[str, Tensor]:
        return self.model.null(cond)


class StoredCaptions(Captions):
    """The same of features that prepare_data.py has written of images with captions. No text is encoded but the
    unconditional one, once.
    """

    def __init__(self, model: PipelineModel, data: FeatureData):
        super().__init__(model, data)
        where = f"data.path={data.path!r}"
        if self.steered:
            raise UserError(f"{where} holds latents, and a T2I-Adapter is steered by edges of images; choose "
                            "data.name=webdataset")
        context, beside = (*model.encode_stored([""]), None)[:2]
        data.check(model.codec.latent_shape(model.image_size, 3), context.shape[1:],
                   None if beside is None else beside.shape[1:])
        apart = (data.empty_context - context[0].to(data.empty_context)).norm() / data.empty_context.norm()
        if apart > ALIKE:
            raise UserError(f"{where}: its empty text is that of another text encoder than the pipeline's")
        model.null(model.stored(context, beside))  # encodes the unconditional text

    def of_data(self, indices: Tensor, draws: Tensor, images: Tensor) -> dict[str, Tensor]:
        with torch.inference_mode(False):
            held = self.data.text_conditions(indices, draws)
        return self.model.stored(*held)


def edges_of(images: Tensor) -> Tensor:
    """Canny's edges of uint8 images (b, h, w, c): uint8 (b, h, w, 1)."""
    edges = np.stack([canny(image) for image in images.cpu().numpy()])
    return torch.from_numpy(edges).to(images.device)


class CaptionBatches(Batches):
    """Batches whose conditions `captions` makes of the texts; where an image has several, one is drawn."""

    def __init__(self, captions: Captions, data: ShardData, *options):
        super().__init__(data, *options)
        self.captions = captions

    def _cond(self, draws: Batch, images: Tensor, indices: Tensor, labels: None) -> dict[str, Tensor]:
        return self.captions.of_data(indices, draws.uniform(Stream.TRAIN_CAPTION), images)


class PipelineTrainer(FlashTrainer):
    """The training of a pipeline's student.

    captions   of the data that `train` is given
    """

    def __init__(self, config: ConfigDict, run: Run, setup: FlashSetup, precision: str, captions: Captions):
        self.captions = captions
        super().__init__(config, run, setup, precision)

    def _make_chain(self, config: Mapping[str, Any]) -> Chain:
        section, description, codec = config["sampler"], self.description, self.captions.model.codec
        denoiser = make_denoiser(self.ema.net, description, config["compute"]["precision"], self.device)
        image = description["image"]
        return Chain(policy=Full(self.ema.net), denoiser=denoiser, sampler=make_sampler(**section),
                     ts=make_times(section, denoiser.schedule), codec=codec,
                     shape=codec.latent_shape(image["size"], image["channels"]), device=self.device,
                     rows=config["compute"]["rows"], contexts=self.captions)

    def _show(self, data: ShardData) -> None:
        """The chain has its captions already."""

    def _make_batches(self, data: ShardData, *_) -> Batches:
        return super()._make_batches(data, CaptionBatches, self.captions)

    def _save(self) -> None:
        """The folder, then the checkpoint: whoever goes on from this has made that."""
        self._refuse_failure()
        with self._sampling():
            if self.processes.is_main:
                self._write_student()
        super()._save()

    def _write_student(self) -> None:
        folder, denoiser, net = self.run.workdir / IN_WORKDIR, self.chain.denoiser, self.ema.net
        times = denoiser.time_input(self.chain.ts[:-1]).tolist()
        save_student(folder, net, times, base=self.config.pipeline.path, steps=self.config.distill.student_steps,
                     trained={"steps": self.step})


def distil_pipeline(config: ConfigDict, stages: list[Stage], run: Run, began: float) -> int:
    """Train the student of a pipeline in `run`, or go on there. Returns the exit status, as `Trainer.train`.

    began: `time.monotonic()` from which `train.max_minutes` counts.
    """
    processes: Processes = run.processes
    section, precision = config.pipeline, choose_precision(config)
    if config.data.name not in CAPTIONED:
        raise UserError(f"--config.data.name={config.data.name}: a pipeline learns from images with captions, or "
                        f"features of them; choose from {', '.join(CAPTIONED)}")
    encoders = choose("--config.distill.text_encoder_device", config.distill.text_encoder_device, ("auto", "cpu"))
    saved = run.resume()
    if saved is not None and saved.step >= config.train.steps:
        logging.info("%s is finished: %d steps; a larger --config.train.steps goes on", run.workdir, saved.step)
        return 0
    dtype = DTYPES[precision] if config.distill.lora_rank else None  # a LoRA's base is never updated
    size = config.data.image_size or section.height
    negative = config.distill.negative_prompt or section.negative_prompt
    model = load_pipeline_model({**section, "height": size, "width": size, "negative_prompt": negative},
                                processes.device, dtype or torch.float32)
    model.refuse_other_size("data.image_size" if config.data.image_size else "pipeline.height")
    refuse_other_weights(run, saved, model.net)
    config = config.copy_and_resolve_references()  # the run knows what the command said, and goes on with that
    config.data.image_size = model.image_size
    data = load_learned(config.data).to(processes.device)
    captions = (StoredCaptions if isinstance(data, FeatureData) else Captions)(model, data)
    if encoders != "auto" or isinstance(data, FeatureData):  # that leaves them nothing more to do
        model.encoders_to("cpu")
    setup = FlashSetup(config, stages, model.net, model.description, section.path, model.codec, model.null, precision,
                       processes.device)
    trainer = PipelineTrainer(config, run, setup, precision, captions)
    trainer.restore(saved)
    return trainer.train(data, began)



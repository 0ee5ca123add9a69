"""Metrics by name, measured on a stream of images that several processes may share.

The sample count stands beside every number, since distances of features fall with it.
"""

import hashlib
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from .benchmark import synchronize
from .data import ImageData, load_section
from .data.folder import folder_batches, list_images
from .errors import UserError, choose
from .generate import Chain
from .image_folder import ImageFolder
from .metrics import EXTRACTORS, make_extractor
from .metrics.clip_score import CLIPSCORE_WEIGHT, CLIPFeatures
from .metrics.features import CLASSES
from .metrics.frechet import FeatureSums, Statistics, frechet_distance
from .metrics.precision_recall import precision_recall
from .metrics.psnr import PSNR, Truth
from .metrics.statistics import SHIPPED, Extractor, reference_statistics
from .processes import Processes

NEIGHBOURS = 3  # k of precision and recall, as in the paper
BATCH = 256  # images from files in one call of an extractor


@dataclass(frozen=True)
class Request:
    """What a run's metrics are made from.

    section             the config's `eval` section
    samples             images that will be scored, over all processes
    image_shape         (h, w, c) of one of them
    device              where features are computed
    data                the config's `data` section, None without a config
    classes             number of classes that `update` gets labels of, 0 for none
    inception_weights   file of the Inception network, None to fetch it
    prompts             whether `update` gets the images' prompts
    shown               whether `update` gets the images of which a condition was made
    with_reference      False in processes that only add up: the main one compares
    """

    section: Mapping
    samples: int
    image_shape: tuple[int, int, int]
    device: torch.device
    data: Mapping | None = None
    classes: int = 0
    inception_weights: str | None = None
    with_reference: bool = True
    prompts: bool = False
    shown: bool = False


class Metric(Protocol):
    """One entry of `METRICS`, called with (extractors, request). It refuses a request that it cannot serve."""

    extractor: Extractor

    def update(self, features: Tensor, labels: Tensor | None, prompts: list[str] | None,
               truth: Truth | None) -> None:
        """Add the features (b, d) of a batch, the labels (b,) or the prompts that its images were made from, and what
        they should be.
        """

    def compute(self, processes: Processes) -> dict[str, dict[str, Any]]:
        """{name: {"value", "samples", ...}} of all processes' images, on the main process ({} on others)."""


class Extractors(dict):
    """The feature networks of a run, each made once: `extractors["inception"]`."""

    def __init__(self, request: Request):
        super().__init__()
        self.request = request

    def __missing__(self, name: str) -> Extractor:
        request = self.request
        options = {"device": request.device}
        if choose("eval.features", name, EXTRACTORS) is EXTRACTORS["inception"]:
            options |= {"mode": request.section["fid_mode"], "weights": request.inception_weights}
        self[name] = extractor = make_extractor(name, **options)
        extractor(torch.zeros(1, *request.image_shape, dtype=torch.uint8))  # refuses a size that it does not take
        return extractor


class Frechet:
    """Frechet distance of the features of `name` to the reference's."""

    def __init__(self, name: str, extractors: Extractors, request: Request):
        if request.samples < 2:
            raise UserError(f"eval.metrics: a Frechet distance needs at least 2 images, not {request.samples}")
        self.extractor = extractors[name]
        self.sums = FeatureSums(self.extractor.dim, self.extractor.name, request.device)
        if request.with_reference:
            source, self.source = reference(request, self.extractor.name)
            size = request.image_shape[0]
            self.statistics = reference_statistics(source, self.extractor, BATCH, size, "eval.reference")

    def update(self, features: Tensor, labels: Tensor | None, prompts: list[str] | None,
               truth: Truth | None) -> None:
        self.sums.update(features)

    def compute(self, processes: Processes) -> dict[str, dict[str, Any]]:
        self.sums.state = processes.sum(self.sums.state)
        if not processes.is_main:
            return {}
        sampled = self.sums.statistics()
        source = {"source": self.source, "images": self.statistics.n, "sha256": _hash(self.statistics)}
        return {self.extractor.distance_name: {"value": frechet_distance(sampled, self.statistics),
                                               "samples": sampled.n, "reference": source}}


class PrecisionRecall:
    """Improved precision and recall against as many reference images as there are samples."""

    def __init__(self, extractors: Extractors, request: Request):
        if request.samples <= NEIGHBOURS:
            raise UserError(f"eval.metrics: precision_recall needs more than {NEIGHBOURS} images, "
                            f"not {request.samples}")
        self.extractor = extractors[request.section["features"]]
        self.features: list[Tensor] = []
        if request.with_reference:
            source, self.source = reference(request, images=True)
            batches = _spread(source, request.samples, request.image_shape[0])
            self.real = torch.cat([self.extractor(images).cpu() for images in batches])
            if len(self.real) <= NEIGHBOURS:
                raise UserError(f"eval.reference: precision_recall needs more than {NEIGHBOURS} images, "
                                f"{self.source} has {len(self.real)}")

    def update(self, features: Tensor, labels: Tensor | None, prompts: list[str] | None,
               truth: Truth | None) -> None:
        self.features.append(features.cpu())

    def compute(self, processes: Processes) -> dict[str, dict[str, Any]]:
        parts = processes.gather(torch.cat(self.features) if self.features else None)
        if not processes.is_main:
            return {}
        fake = torch.cat([part for part in parts if part is not None])
        device = self.extractor.device
        values = precision_recall(self.real.to(device), fake.to(device), NEIGHBOURS)
        shared = {"samples": len(fake), "features": self.extractor.name, "neighbours": NEIGHBOURS,
                  "reference": {"source": self.source, "images": len(self.real)}}
        return {"precision": {"value": values[0], **shared}, "recall": {"value": values[1], **shared}}


class ClassAccuracy:
    """Share of class-conditional CIFAR-10 samples that the shipped classifier puts into their own class."""

    def __init__(self, extractors: Extractors, request: Request):
        if request.classes != CLASSES or (request.data or {}).get("name") != "cifar10":
            raise UserError("eval.metrics: class_accuracy needs the seeds of a class-conditional CIFAR-10 model; "
                            "leave it out")
        self.extractor = extractors["cifar10_resnet"]
        self.counts = torch.zeros(2, device=request.device)  # right, all

    def update(self, features: Tensor, labels: Tensor | None, prompts: list[str] | None,
               truth: Truth | None) -> None:
        guessed = self.extractor.class_probabilities(features).argmax(dim=1)
        self.counts[0] += (guessed == labels.to(guessed.device)).sum()
        self.counts[1] += len(labels)

    def compute(self, processes: Processes) -> dict[str, dict[str, Any]]:
        right, count = processes.sum(self.counts).tolist()
        return {"class_accuracy": {"value": right / count, "samples": int(count)}} if processes.is_main else {}


class ClipScore:
    """How well images fit their prompts: 100 times the cosine of CLIP's embeddings, the mean over the images.

    Beside it stand the cosine itself and CLIPScore = 2.5 max(cosine, 0), the two other scales in use.
    """

    def __init__(self, extractors: Extractors, request: Request):
        if not request.prompts:
            raise UserError("eval.metrics: clip_score needs the prompts of the images; give --prompts, or leave it out")
        self.model = request.section["clip_model"]
        self.extractor = CLIPFeatures(self.model, request.device)
        self.sums = torch.zeros(3, dtype=torch.float64)  # of the cosines, of their positive parts, of 1

    def update(self, features: Tensor, labels: Tensor | None, prompts: list[str] | None,
               truth: Truth | None) -> None:
        cosines = (features * self.extractor.texts(prompts)).sum(dim=1).double().cpu()
        self.sums += torch.stack([cosines.sum(), cosines.clamp(min=0).sum(), torch.tensor(len(cosines))])

    def compute(self, processes: Processes) -> dict[str, dict[str, Any]]:
        total, positive, count = sum(processes.gather(self.sums)).tolist()
        if not processes.is_main:
            return {}
        return {"clip_score": {"value": 100 * total / count, "samples": int(count), "scale": "100 cos",
                               "cosine": total / count, "clipscore": CLIPSCORE_WEIGHT * positive / count,
                               "model": self.model}}


METRICS = {
    "frechet_cifar10": partial(Frechet, "cifar10_resnet"),  # of the shipped features: it is not FID
    "fid": partial(Frechet, "inception"),
    "precision_recall": PrecisionRecall,
    "class_accuracy": ClassAccuracy,
    "clip_score": ClipScore,
    "psnr": PSNR,
}


class Metrics:
    """The metrics that a config asks for: `update` with every batch, then `compute` once.

    Everything that can be missing (a name, a reference, the Inception weights) is refused when it is made.
    """

    def __init__(self, request: Request):
        factories = [choose("eval.metrics", name, METRICS) for name in request.section["metrics"]]
        extractors = Extractors(request)
        self.metrics: list[Metric] = [factory(extractors, request) for factory in factories]

    def update(self, images: Tensor, labels: list[int] | None = None, prompts: list[str] | None = None,
               truth: Truth | None = None) -> None:
        """Add uint8 images (b, h, w, c), with the labels or the prompts that they were made from, and what they should
        be.
        """
        labels = None if labels is None else torch.tensor(labels)
        features = {each.extractor.name: None for each in self.metrics}
        for each in self.metrics:
            name = each.extractor.name
            if features[name] is None:
                features[name] = each.extractor(images)
            each.update(features[name], labels, prompts, truth)

    def compute(self, processes: Processes) -> dict[str, dict[str, Any]]:
        """{name: {"value", "samples", ...}} over all processes' images, on the main process."""
        return {name: value for each in self.metrics for name, value in each.compute(processes).items()}


def score_seeds(metrics: Metrics, chain: Chain, seeds: list[int], label_of: Mapping[int, int] | None = None,
                folder: ImageFolder | None = None, bar: bool = True) -> tuple[int, float]:
    """Show every seed's image to the metrics once: from `folder` where it is there already, else generated (and
    kept in `folder`). Prompts and originals are the chain's, which may be a `PipelineSampler`. Returns the number of
    images generated and the seconds that took.
    """
    def labels(batch: list[int]) -> list[int] | None:
        return None if label_of is None else [label_of[seed] for seed in batch]

    def update(batch: list[int], images: Tensor) -> None:
        shown, truth = chain.shown, None
        if shown is not None and shown.of_images:
            truth = Truth(shown.originals(batch), shown.hole(batch), shown.answer(batch))
        metrics.update(images, labels(batch), chain.texts(batch), truth)

    missing = seeds if folder is None else folder.missing(seeds)
    ready = sorted({*seeds} - {*missing})
    for start in range(0, len(ready), BATCH):
        batch = ready[start:start + BATCH]
        update(batch, folder.load(batch))
    seconds, began = 0.0, time.perf_counter()
    with tqdm(total=len(missing), desc="sampling", unit="image", disable=not bar) as progress:
        for batch, images in chain.images(missing, labels(missing)):
            synchronize(chain.device)
            seconds += time.perf_counter() - began
            if folder is not None:
                folder.save(batch, images)
            update(batch, images)
            progress.update(len(batch))
            began = time.perf_counter()
    return len(missing), seconds


def score_files(metrics: Metrics, path: str, names: list[str], bar: bool = True, image_size: int | None = None,
                prompts: list[str] | None = None) -> None:
    """Show the image files `path/name` to the metrics.

    image_size: they are cropped and resized to it, None takes them as they are. prompts: one a file.
    """
    done = 0
    with tqdm(total=len(names), desc="scoring", unit="image", disable=not bar) as progress:
        for images in folder_batches(path, BATCH, 3, image_size, "--images", names) if names else ():
            metrics.update(images, prompts=None if prompts is None else prompts[done:done + len(images)])
            done += len(images)
            progress.update(len(images))


def reference(request: Request, features: str | None = None, images: bool = False) -> tuple[ImageData | str, str]:
    """(what to compare with, its name): eval.reference, what ships for `features`, or the config's data set.

    images: it must hold images, so an npz of statistics is passed over for the data set.
    """
    named = request.section["reference"]
    if named and not (images and Path(named).is_file()):
        return named, named
    if request.data is None:
        if (features, "cifar10") in SHIPPED:
            return "cifar10", "cifar10, shipped"
        raise UserError("eval.reference: there is nothing to compare with; give --config, whose eval.reference or "
                        "data set is used (a pipeline's config has no data set)")
    data = dict(request.data)
    if (features, data["name"]) in SHIPPED:
        return data["name"], f"{data['name']}, shipped"
    if data["name"] == "features":
        raise UserError(f"eval.reference={named!r} gives no {'images' if images else 'statistics'}, and data.name="
                        "'features' holds latents; name an npz of statistics or an image folder")
    try:
        return load_section(data), data["name"]
    except UserError as error:
        wanted = "images" if images else "statistics"
        raise UserError(f"eval.reference={named!r} gives no {wanted}, and the data set cannot be read "
                        f"({error})") from error


def _spread(source: ImageData | str, count: int, size: int) -> Iterator[Tensor]:
    """Batches of up to `count` images, evenly spread over the source (data sets may be sorted by class)."""
    names = None if isinstance(source, ImageData) else list_images(source, "eval.reference")
    total = len(source) if names is None else len(names)
    indices = torch.linspace(0, total - 1, min(count, total), dtype=torch.float64).round().long()
    if names is None:
        batches = (source.batch(part)[0] for part in indices.split(BATCH))
    else:
        batches = folder_batches(source, BATCH, 3, size, "eval.reference", [names[i] for i in indices])
    with tqdm(total=len(indices), desc="reference features", unit="image", delay=1) as bar:
        for images in batches:
            yield images
            bar.update(len(images))


def _hash(statistics: Statistics) -> str:
    return hashlib.sha256(statistics.mu.tobytes() + statistics.sigma.tobytes()).hexdigest()

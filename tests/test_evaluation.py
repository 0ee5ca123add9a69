"""Metrics by name: what they compute, where their reference comes from, and what they refuse at once."""

import numpy as np
import pytest
import torch

from libs.data import ImageData
from libs.data.images import save_png
from libs.defaults import base_config
from libs.errors import UserError
from libs.evaluation import Metrics, Request, reference
from libs.metrics import make_extractor
from libs.metrics.features import ASSETS
from libs.metrics.frechet import Statistics, frechet_distance
from libs.metrics.precision_recall import precision_recall
from libs.metrics.statistics import feature_statistics
from libs.processes import Processes

CPU = torch.device("cpu")


def noise(count, seed=0, low=0, high=256):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(low, high, (count, 32, 32, 3), dtype=torch.uint8, generator=generator)


def request(*metrics, samples=20, shape=(32, 32, 3), data=None, classes=0, **section):
    settings = base_config()
    settings.eval.update(metrics=metrics, **section)
    held = settings.data
    held.update(data or {})
    return Request(settings.eval, samples, shape, CPU, held, classes)


def measure(asked, images, labels=None):
    """The metrics of images that come in batches of 7."""
    metrics = Metrics(asked)
    for start in range(0, len(images), 7):
        metrics.update(images[start:start + 7], None if labels is None else labels[start:start + 7])
    return metrics.compute(Processes(CPU))


def folder(path, images):
    for i, image in enumerate(images):
        save_png(path / f"{i:03d}.png", image)
    return str(path)


def test_frechet_distance_to_what_ships():
    images = noise(20)
    result = measure(request("frechet_cifar10"), images)["frechet_cifar10"]
    shipped = Statistics.load(ASSETS / "cifar10_train_stats.npz")
    sampled = feature_statistics([images], make_extractor("cifar10_resnet"))
    assert result["value"] == pytest.approx(frechet_distance(sampled, shipped), rel=1e-6)
    assert (result["samples"], result["reference"]["images"]) == (20, 50_000)
    assert result["reference"]["source"] == "cifar10, shipped"


def test_references_of_all_kinds_agree(tmp_path):
    real, images = noise(6, seed=1, high=128), noise(6)
    path = folder(tmp_path / "real", real)
    feature_statistics([real], make_extractor("cifar10_resnet")).save(tmp_path / "real.npz")
    asked = [request("frechet_cifar10", reference=path), request("frechet_cifar10", reference=f"{tmp_path}/real.npz"),
             request("frechet_cifar10", data={"name": "folder", "path": path})]
    results = [measure(each, images)["frechet_cifar10"] for each in asked]
    assert [each["reference"]["images"] for each in results] == [6, 6, 6]
    assert [each["reference"]["source"] for each in results] == [path, f"{tmp_path}/real.npz", "folder"]
    assert results[0]["value"] > 0.1
    assert results[0]["value"] == pytest.approx(results[1]["value"], rel=1e-6)
    assert results[0]["value"] == pytest.approx(results[2]["value"], rel=1e-6)
    # another reference leaves another hash
    other = measure(request("frechet_cifar10"), images)["frechet_cifar10"]
    assert other["reference"]["sha256"] != results[1]["reference"]["sha256"]


def test_precision_and_recall(tmp_path):
    real, images = noise(16, seed=1, high=200), noise(8)
    path = folder(tmp_path / "real", real)
    npz = tmp_path / "stats.npz"
    feature_statistics([real], make_extractor("cifar10_resnet")).save(npz)
    chosen = real[np.linspace(0, 15, 8).round().astype(int)]  # as many as there are samples, from end to end
    extractor = make_extractor("cifar10_resnet")
    expected = precision_recall(extractor(chosen), extractor(images))
    data = {"name": "folder", "path": path}
    for asked in (request("precision_recall", samples=8, reference=path),
                  request("precision_recall", samples=8, data=data),
                  request("precision_recall", samples=8, data=data, reference=str(npz))):  # holds no images
        result = measure(asked, images)
        assert (result["precision"]["value"], result["recall"]["value"]) == expected
        assert result["recall"]["samples"] == result["recall"]["reference"]["images"] == 8
    assert len(set(expected)) == 2  # neither is 0 and 0 nor 1 and 1 by accident


def test_class_accuracy():
    images = noise(20, low=0, high=90)
    images[::2] = 255 - images[::2]
    extractor = make_extractor("cifar10_resnet")
    guessed = extractor.class_probabilities(extractor(images)).argmax(1).tolist()
    asked = request("class_accuracy", classes=10)
    assert measure(asked, images, guessed)["class_accuracy"] == {"value": 1.0, "samples": 20}
    labels = [(guess + (i < 5)) % 10 for i, guess in enumerate(guessed)]  # five wrong
    assert measure(asked, images, labels)["class_accuracy"] == {"value": 0.75, "samples": 20}


def test_features_are_computed_once_for_all_metrics(monkeypatch):
    metrics = Metrics(request("frechet_cifar10", "class_accuracy", classes=10))
    [extractor] = {each.extractor for each in metrics.metrics}
    calls = []
    monkeypatch.setattr(type(extractor.net), "forward", lambda net, x: calls.append(len(x)) or torch.zeros(len(x), 512))
    metrics.update(noise(6), [0] * 6)
    assert calls == [6]


class TwoProcesses:
    """What `Processes` does in the first of two processes, given the only metric of the second."""

    is_main = True

    def __init__(self, other):
        self.other = other

    def sum(self, tensor):
        return tensor + (self.other.sums.state if hasattr(self.other, "sums") else self.other.counts)

    def gather(self, value):
        return [value, torch.cat(self.other.features)]


@pytest.mark.parametrize("name", ["frechet_cifar10", "class_accuracy", "precision_recall"])
def test_parts_add_up(name, tmp_path):
    images, labels = noise(10), list(range(10))
    asked = request(name, samples=10, classes=10, reference=folder(tmp_path, noise(10, seed=1, high=200)))
    whole = measure(asked, images, labels)
    first, second = Metrics(asked), Metrics(asked)
    first.update(images[:7], labels[:7])
    second.update(images[7:], labels[7:])
    result = first.compute(TwoProcesses(*second.metrics))
    assert {key: value["samples"] for key, value in result.items()} == dict.fromkeys(result, 10)
    for key, value in whole.items():
        assert result[key]["value"] == pytest.approx(value["value"], rel=1e-6)


REFUSED = [
    (request("fdi"), "eval.metrics='fdi' is unknown; choose from frechet_cifar10, fid, precision_recall, class"),
    (request("frechet_cifar10", samples=1), "a Frechet distance needs at least 2 images, not 1"),
    (request("frechet_cifar10", shape=(8, 8, 1)), "needs images of 32x32x3, not 8x8x1"),
    (request("frechet_cifar10", reference="nowhere.npz"), "eval.reference='nowhere.npz' is neither a folder"),
    (request("frechet_cifar10", data={"name": "folder", "path": "nowhere"}),
     "eval.reference='' gives no statistics, and the data set cannot be read (data.path='nowhere' is not a folder)"),
    (request("precision_recall", samples=3), "precision_recall needs more than 3 images, not 3"),
    (request("precision_recall", data={"path": "nowhere"}), "eval.reference='' gives no images, and the data set"),
    (request("precision_recall", features="vgg"), "eval.features='vgg' is unknown; choose from cifar10_resnet"),
    (request("class_accuracy"), "class_accuracy needs the seeds of a class-conditional CIFAR-10 model"),
    (request("class_accuracy", classes=10, data={"name": "digits"}), "class_accuracy needs the seeds of"),
    (request("fid", fid_mode="torch"), "fid_mode='torch' is unknown; choose from legacy_pytorch, clean"),
]


@pytest.mark.parametrize(("asked", "line"), REFUSED, ids=[line[:40] for _, line in REFUSED])
def test_refused_when_made(asked, line):
    with pytest.raises(UserError) as caught:
        Metrics(asked)
    assert line in str(caught.value)
    assert "\n" not in str(caught.value)


def test_names_are_checked_before_any_reference_is_read(tmp_path):
    (tmp_path / "broken.png").write_bytes(b"")
    with pytest.raises(UserError, match="eval.metrics='fdi' is unknown"):
        Metrics(request("frechet_cifar10", "fdi", reference=str(tmp_path)))


def test_without_config_only_what_ships_is_a_reference():
    bare = request("frechet_cifar10")
    bare = Request(bare.section, 20, bare.image_shape, CPU)
    assert reference(bare, "cifar10_resnet")[0] == "cifar10"
    for arguments in (("inception_legacy_pytorch",), (None, True)):
        with pytest.raises(UserError, match="eval.reference: there is nothing to compare with; give --config"):
            reference(bare, *arguments)


def test_other_processes_read_no_reference():
    asked = request("frechet_cifar10", "precision_recall", reference="nowhere")
    Metrics(Request(asked.section, 20, asked.image_shape, CPU, asked.data, with_reference=False))


def test_data_sets_in_memory_are_spread_over(monkeypatch):
    real = noise(40, seed=3)
    monkeypatch.setattr("libs.evaluation.load_section", lambda section: ImageData(real))
    metrics = Metrics(request("precision_recall", samples=10))
    chosen = real[[round(i * 39 / 9) for i in range(10)]]
    torch.testing.assert_close(metrics.metrics[0].real, make_extractor("cifar10_resnet")(chosen))

"""The released digits are legible: a classifier of the real scans recognises them."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from sklearn.neural_network import MLPClassifier

from libs import config as config_files
from libs import release
from libs.build import load_chain
from libs.checkpoint import read


@pytest.fixture(scope="module")
def classifier():
    """Trained on three quarters of the real scans; good on the rest, or its word would count for nothing."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))
    train, test = order[:1347], order[1347:]
    network = MLPClassifier((128,), max_iter=100, random_state=0).fit(images[train] / 16, labels[train])
    assert network.score(images[test] / 16, labels[test]) > 0.95
    return network


def test_a_classifier_recognises_the_digits(classifier):
    config = config_files.load("configs/digits_uvit.py")
    chain, _ = load_chain(config, None, torch.device("cpu"))
    seeds = list(range(500))
    labels = np.array(seeds) % 10
    images = torch.cat([images for _, images in chain.images(seeds, labels.tolist())])
    assert images.shape == (500, 8, 8, 1)
    probabilities = classifier.predict_proba(images.reshape(500, -1).numpy() / 255)
    guess = probabilities.argmax(axis=1)
    sure = (guess == labels) & (probabilities.max(axis=1) >= 0.8)
    assert sure.mean() >= 0.8, sure.mean()
    assert all((guess[labels == digit] == digit).mean() > 0.5 for digit in range(10))
    assert len({image.numpy().tobytes() for image in images}) == 500


def test_release_halves_a_run(tmp_path, capsys):
    source = config_files.ROOT / "assets/checkpoints/digits_uvit.safetensors"
    out = tmp_path / "again.safetensors"
    assert release.main([str(source), str(out)]) == 0
    tensors, description = read(out)
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float16}
    assert description == read(source)[1]
    assert release.main(["nowhere", str(out)]) == 2
    assert release.main([str(source)]) == 2
    assert capsys.readouterr().err.count("\n") == 2

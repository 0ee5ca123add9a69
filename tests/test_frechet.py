"""Frechet distances against closed forms, and statistics of features."""


import numpy as np
import pytest
import torch
from metric_samples import gaussian, noise

from libs.data import ImageData
from libs.data.images import save_png
from libs.errors import UserError
from libs.metrics.features import CIFAR10Features
from libs.metrics.frechet import FeatureSums, Statistics, frechet_distance
from libs.metrics.statistics import reference_statistics


def fitted(samples):
    return Statistics(samples.mean(0), np.cov(samples, rowvar=False), len(samples))


# ---- Frechet distance


def test_distance_of_diagonal_gaussians():
    rng = np.random.default_rng(0)
    mu_a, mu_b = rng.normal(size=(2, 9))
    var_a, var_b = rng.uniform(0, 5, size=(2, 9))
    var_a[:3] = 0  # a direction may be missing in one, or in both
    var_b[2:4] = 0
    expected = ((mu_a - mu_b) ** 2).sum() + ((var_a**0.5 - var_b**0.5) ** 2).sum()
    a, b = Statistics(mu_a, np.diag(var_a)), Statistics(mu_b, np.diag(var_b))
    assert frechet_distance(a, b) == pytest.approx(expected, rel=1e-12)
    assert frechet_distance(b, a) == pytest.approx(expected, rel=1e-12)


def test_distance_equals_scipys_matrix_root():
    from scipy.linalg import sqrtm

    a, b = fitted(gaussian(300, 40, seed=1)), fitted(gaussian(200, 40, seed=2))
    root = np.trace(sqrtm(a.sigma @ b.sigma)).real
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(("n_a", "n_b"), [(5, 7), (5, 200), (200, 5)])
def test_distance_with_fewer_samples_than_features(n_a, n_b):
    # tr (S_a S_b)^(1/2) is the sum of the singular values of X_a X_b^T for centred, scaled samples X.
    x_a, x_b = gaussian(n_a, 30, seed=3), gaussian(n_b, 30, seed=4)
    a, b = fitted(x_a), fitted(x_b)
    centred = [(x - x.mean(0)) / (len(x) - 1) ** 0.5 for x in (x_a, x_b)]
    root = np.linalg.svd(centred[0] @ centred[1].T, compute_uv=False).sum()
    expected = ((a.mu - b.mu) ** 2).sum() + np.trace(a.sigma) + np.trace(b.sigma) - 2 * root
    assert frechet_distance(a, b) == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("n", [5, 200])
def test_distance_to_itself_and_to_a_shifted_copy(n):
    a = fitted(gaussian(n, 30))
    assert 0 <= frechet_distance(a, a) < 1e-10
    shifted = Statistics(a.mu + 2, a.sigma, a.n)
    assert frechet_distance(a, shifted) == pytest.approx(30 * 4, rel=1e-10)


# ---- statistics


def test_sums_give_numpys_mean_and_covariance():
    x = gaussian(50, 6)
    sums = FeatureSums(6, "some")
    for part in np.split(x, [1, 20]):
        sums.update(torch.from_numpy(part))
    result = sums.statistics()
    assert (result.n, result.features, result.dim) == (50, "some", 6)
    np.testing.assert_allclose(result.mu, x.mean(0), rtol=1e-12)
    np.testing.assert_allclose(result.sigma, np.cov(x, rowvar=False), rtol=1e-10)


def test_sums_of_two_processes_add_up():
    x = torch.from_numpy(gaussian(50, 6)).float()
    whole, one, two = FeatureSums(6), FeatureSums(6), FeatureSums(6)
    whole.update(x)
    one.update(x[:17])
    two.update(x[17:])
    one.state = one.state + two.state  # what an all-reduce does
    torch.testing.assert_close(one.state, whole.state, rtol=1e-14, atol=1e-12)
    assert one.statistics().n == 50


def test_sums_keep_small_variances_beside_large_means():
    x = 1000 + 1e-3 * gaussian(400, 4)
    sums = FeatureSums(4)
    sums.update(torch.from_numpy(x))
    np.testing.assert_allclose(sums.statistics().sigma, np.cov(x, rowvar=False), rtol=1e-2)


def test_statistics_need_two_images():
    sums = FeatureSums(6)
    sums.update(torch.ones(1, 6))
    with pytest.raises(UserError, match="at least 2 images, got 1"):
        sums.statistics()


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_statistics_survive_a_file(tmp_path, dtype):
    a = Statistics(gaussian(2, 6)[0], np.cov(gaussian(50, 6), rowvar=False), 50, "some")
    a.save(tmp_path / "new" / "a.npz", dtype)
    b = Statistics.load(tmp_path / "new" / "a.npz")
    assert (b.n, b.features, b.mu.dtype, b.sigma.dtype) == (50, "some", np.float64, np.float64)
    np.testing.assert_array_equal(b.mu, a.mu.astype(dtype))
    np.testing.assert_array_equal(b.sigma, a.sigma.astype(dtype))
    with np.load(tmp_path / "new" / "a.npz") as file:
        assert {"mu", "sigma"} <= set(file.files)


def test_statistics_of_other_projects_are_read(tmp_path):
    np.savez(tmp_path / "uvit.npz", mu=np.zeros(3), sigma=np.eye(3))
    a = Statistics.load(tmp_path / "uvit.npz")
    assert (a.n, a.features, a.dim) == (None, None, 3)


@pytest.mark.parametrize(
    "arrays",
    [
        {"mu": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.eye(4)},
        {"mu": np.zeros(3), "sigma": np.full((3, 3), np.nan)},
        {"mu": np.array([None] * 3), "sigma": np.eye(3)},  # pickled
        None,
        "text",
    ],
)
def test_bad_statistics_files_are_refused_in_one_line(tmp_path, arrays):
    path = tmp_path / "a.npz"
    if isinstance(arrays, dict):
        np.savez(path, **arrays)
    elif arrays:
        path.write_text(arrays)
    with pytest.raises(UserError, match=r"^feature statistics .*a\.npz.*$") as caught:
        Statistics.load(path)
    assert "\n" not in str(caught.value)


class Brightness:
    """Two features that can be computed by hand: mean red and mean green."""

    name, dim, distance_name, device = "brightness", 2, "frechet_brightness", torch.device("cpu")

    def __call__(self, images):
        return images[..., :2].float().mean((1, 2))


def test_reference_from_data_folder_and_file_agree(tmp_path):
    images = noise(7, 4, 6, 3)
    features = images[..., :2].double().mean((1, 2)).numpy()
    for i, image in enumerate(images):
        save_png(tmp_path / "images" / f"{i}.png", image)
    fitted(features).save(tmp_path / "stats.npz")
    for source in ImageData(images), tmp_path / "images", str(tmp_path / "stats.npz"):
        result = reference_statistics(source, Brightness(), batch_size=3)
        assert result.n == 7
        np.testing.assert_allclose(result.mu, features.mean(0), rtol=1e-6)
        np.testing.assert_allclose(result.sigma, np.cov(features, rowvar=False), rtol=1e-4)


def test_reference_refusals(tmp_path):
    def refused(source, *fragments, extractor=None):
        with pytest.raises(UserError) as caught:
            reference_statistics(source, extractor or Brightness(), field="--reference")
        assert "\n" not in str(caught.value)
        for fragment in ("--reference", *fragments):
            assert fragment in str(caught.value), str(caught.value)

    refused(tmp_path / "missing.npz", "missing.npz", "neither")
    refused(tmp_path, "no images")
    refused(ImageData(noise(1, 4, 4, 3)), "1 images")
    Statistics(np.zeros(3), np.eye(3)).save(tmp_path / "three.npz")
    refused(tmp_path / "three.npz", "3 unnamed features", "2 of brightness")
    Statistics(np.zeros(2), np.eye(2), 10, "darkness").save(tmp_path / "other.npz")
    refused(tmp_path / "other.npz", "darkness", "brightness")
    refused("celeba", "shipped statistics (cifar10)", extractor=CIFAR10Features())

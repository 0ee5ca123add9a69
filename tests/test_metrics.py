"""Features against torchvision's network, FID against clean-fid, precision and recall, and what can be missing."""

import subprocess
import sys
from unittest import mock
from urllib.error import URLError

import numpy as np
import pytest
import torch
from metric_samples import gaussian, noise
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import nn

from libs.errors import UserError
from libs.metrics import make_extractor
from libs.metrics.features import ASSETS, CIFAR10Features
from libs.metrics.fid import InceptionFeatures
from libs.metrics.frechet import frechet_distance
from libs.metrics.precision_recall import precision_recall
from libs.metrics.statistics import feature_statistics, reference_statistics

# ---- the shipped features


def test_feature_network_is_torchvisions():
    resnet = pytest.importorskip("torchvision.models.resnet")
    theirs = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=14)
    theirs.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    theirs.maxpool = nn.Identity()
    theirs.load_state_dict(load_file(ASSETS / "cifar10_features.safetensors"))
    images = noise(3, 32, 32, 3)
    mean, std = torch.tensor([0.4914, 0.4822, 0.4465]), torch.tensor([0.2470, 0.2435, 0.2616])
    x = ((images / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = theirs.eval()(x)
    ours = make_extractor("cifar10_resnet")
    features = ours(images)
    assert features.shape == (3, 512)
    assert features.dtype == torch.float32
    torch.testing.assert_close(ours.logits(features), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(
        ours.class_probabilities(features), expected[:, :10].softmax(1), rtol=1e-4, atol=1e-5
    )


def test_features_are_float32_inside_autocast_too():
    extractor, images = CIFAR10Features(), noise(2, 32, 32, 3)
    before = torch.backends.cudnn.conv.fp32_precision
    with torch.autocast("cpu", torch.bfloat16):
        inside = extractor(images)
    assert torch.equal(inside, extractor(images))
    assert not inside.requires_grad
    assert torch.backends.cudnn.conv.fp32_precision == before


def test_shipped_statistics_are_those_of_the_shipped_features():
    extractor = CIFAR10Features()
    reference = reference_statistics("cifar10", extractor)
    assert (reference.n, reference.features, reference.dim) == (50_000, extractor.name, 512)
    assert np.array_equal(reference.sigma, reference.sigma.T)
    assert np.linalg.eigvalsh(reference.sigma).min() > 0
    assert frechet_distance(reference, reference) < 1e-6
    # Noise is far from photographs: real test images score below 0.1, released models between 2 and 5.
    noisy = feature_statistics(noise(64, 32, 32, 3).split(32), extractor)
    assert frechet_distance(noisy, reference) > 20


def test_feature_refusals(tmp_path):
    with pytest.raises(UserError, match="32x32x3, not 8x8x1"):
        CIFAR10Features()(noise(2, 8, 8, 1))
    with pytest.raises(UserError, match=r"none\.safetensors cannot be read"):
        CIFAR10Features(tmp_path / "none.safetensors")
    save_file({"fc.bias": torch.zeros(14)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not those of the CIFAR-10 feature network"):
        CIFAR10Features(tmp_path / "other.safetensors")
    with pytest.raises(
        UserError, match="metrics.features='vgg' is unknown; choose from cifar10_resnet, inception"
    ):
        make_extractor("vgg")


# ---- FID


def test_fid_with_random_weights(inception_file):
    extractor = make_extractor("inception", weights=inception_file)
    assert (extractor.name, extractor.distance_name) == ("inception_legacy_pytorch", "fid")
    bright, gray = noise(3, 16, 16, 3), noise(3, 16, 16, 1, seed=1)
    a = feature_statistics(bright.split(2), extractor)
    b = feature_statistics([gray], extractor)
    assert a.dim == b.dim == 2048
    assert frechet_distance(a, a) < 1e-6 * np.trace(a.sigma)
    assert frechet_distance(a, b) > 1e-2 * np.trace(a.sigma)
    same = extractor(gray.expand(3, 16, 16, 3))
    np.testing.assert_allclose(b.mu, same.mean(0).numpy(), rtol=1e-3)


def test_fid_resizes_like_clean_fid(inception_file):
    from cleanfid.inception_pytorch import InceptionV3
    from cleanfid.resize import build_resizer

    images = noise(1, 20, 16, 3)
    resized = build_resizer("legacy_pytorch")(images[0].numpy())
    seen = []
    with mock.patch.object(InceptionV3, "forward", lambda net, x: seen.append(x) or [x]):
        make_extractor("inception", weights=inception_file)(images)
    np.testing.assert_allclose(seen[0][0].permute(1, 2, 0).numpy() * 255, resized, atol=1e-3)


class PooledPixels(nn.Module):
    """Stands in for the TorchScript Inception: 2,048 features that are means of the normalized pixels."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.AvgPool3d((3, 1, 1)), nn.AdaptiveAvgPool2d((32, 64)))

    def forward(self, x: torch.Tensor, return_features: bool = False) -> torch.Tensor:
        assert return_features
        return self.layers(x)


@pytest.fixture
def torchscript_file(tmp_path):
    path = tmp_path / "some_name.pt"
    torch.jit.script(PooledPixels()).save(path)
    return path


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fid_torchscript_modes(torchscript_file):
    images = noise(2, 20, 16, 3)
    clean = make_extractor("inception", mode="clean", weights=torchscript_file)
    assert (clean.name, clean.distance_name) == ("inception_clean", "fid_clean")
    expected = []
    for image in images.numpy():
        channels = [Image.fromarray(image[..., i].astype(np.float32)) for i in range(3)]
        resized = [np.asarray(c.resize((299, 299), Image.Resampling.BICUBIC)).clip(0, 255) for c in channels]
        expected.append((np.mean(resized, axis=0) - 128) / 128)
    pooled = nn.AdaptiveAvgPool2d((32, 64))(torch.from_numpy(np.stack(expected))).flatten(1)
    torch.testing.assert_close(clean(images), pooled, rtol=1e-4, atol=1e-5)

    # This mode hands over the pixels as they are; the network itself resizes and normalizes.
    tensorflow = make_extractor("inception", mode="legacy_tensorflow", weights=torchscript_file)
    pooled = nn.AdaptiveAvgPool2d((32, 64))(images.float().mean(3)).flatten(1)
    torch.testing.assert_close(tensorflow(images), pooled)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_fid_refuses_wrong_files_in_one_line(tmp_path):
    pytest.importorskip("cleanfid")
    (tmp_path / "text.pt").write_text("no weights")
    save_file({"fc.bias": torch.zeros(14)}, tmp_path / "other.safetensors")
    for mode in "legacy_pytorch", "clean", "legacy_tensorflow":
        for name in "missing.pt", "text.pt", "other.safetensors":
            with pytest.raises(UserError, match=rf"^--inception_weights=.*{name} .*$") as caught:
                InceptionFeatures(mode, tmp_path / name)
            assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="legacy_pytorch, clean, legacy_tensorflow"):
        InceptionFeatures("legacy")


@pytest.mark.parametrize("mode", ["legacy_pytorch", "clean"])
def test_fid_without_weights_and_without_network(tmp_path, monkeypatch, mode):
    pytest.importorskip("cleanfid")

    def no_network(url, path, *args):
        raise URLError("Name or service not known")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(UserError, match=r"^--inception_weights is not given and https.*service not known.*$"):
        InceptionFeatures(mode)


def test_fid_takes_fetched_weights_from_the_hub_folder(tmp_path, monkeypatch, inception_file):
    from cleanfid.inception_pytorch import FID_WEIGHTS_URL

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    stored = tmp_path / "checkpoints" / FID_WEIGHTS_URL.rsplit("/", 1)[-1]
    stored.parent.mkdir()
    stored.symlink_to(inception_file)
    monkeypatch.setattr(torch.hub, "download_url_to_file", None)  # calling it would fail
    assert InceptionFeatures().name == "inception_legacy_pytorch"


def test_fid_without_torchvision_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "cleanfid", None)
    with pytest.raises(UserError, match="need clean-fid and a torchvision that fits torch"):
        InceptionFeatures()


def test_the_shipped_score_needs_no_torchvision_and_no_clean_fid():
    program = (
        "import sys; sys.modules.update(torchvision=None, cleanfid=None)\n"
        "from libs.metrics import make_extractor\n"
        "import libs.data, torch\n"
        "print(make_extractor('cifar10_resnet')(torch.zeros(1, 32, 32, 3, dtype=torch.uint8)).shape)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ASSETS.parents[1], capture_output=True, text=True
    )
    assert result.stdout.strip() == "torch.Size([1, 512])", result.stderr


# ---- precision and recall


def test_precision_and_recall_by_hand():
    # On a line, k = 1: radii of the real points 0 1 3 10 are 1 1 2 7, so they cover [-1, 5] and [3, 17];
    # radii of the generated points 2 4 30 are 2 2 26, so they cover [0, 6] and [4, 56].
    real = torch.tensor([[0.0], [1], [3], [10]], dtype=torch.float64)
    fake = torch.tensor([[2.0], [4], [30]], dtype=torch.float64)
    precision, recall = precision_recall(real, fake, k=1)
    assert precision == pytest.approx(2 / 3)  # 30 is outside
    assert recall == 1
    # k = 2: the real radii 3 2 3 9 still reach only to 19. A far-away real set has neither.
    assert precision_recall(real, fake, k=2)[0] == pytest.approx(2 / 3)
    assert precision_recall(real, fake + 1000, k=2) == (0, 0)
    assert precision_recall(real, real, k=1) == (1, 1)


def test_precision_and_recall_tell_missing_modes_from_bad_images():
    generator = torch.Generator().manual_seed(0)
    left, right = (torch.randn(40, 2, generator=generator) + 100 * i for i in range(2))
    one_mode = precision_recall(torch.cat([left, right]), left + 0.01)
    assert one_mode == (1.0, 0.5)
    assert precision_recall(left, torch.cat([left + 0.01, right])) == (0.5, 1.0)


def test_precision_and_recall_do_not_depend_on_the_block(monkeypatch):
    real, fake = (torch.from_numpy(gaussian(n, 5, seed=n)) for n in (60, 50))
    whole = precision_recall(real, fake)
    monkeypatch.setattr("libs.metrics.precision_recall.BLOCK", 7 * 60)
    assert precision_recall(real, fake) == whole
    assert 0 < whole[0] < 1


def test_precision_and_recall_need_more_than_k_images():
    with pytest.raises(UserError, match="more than k=3 images, got 3 real and 50 generated"):
        precision_recall(torch.zeros(3, 2), torch.zeros(50, 2))

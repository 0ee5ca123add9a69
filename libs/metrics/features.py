"""The small classifier of CIFAR-10 images whose features ship with the project.

A Frechet distance of these features ranks samples of 32 x 32 models without any download. It is not FID, and
its values do not compare with FID's.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError

ASSETS = Path(__file__).resolve().parents[2] / "assets" / "features"
CIFAR10_MEAN = (0.4914, 0.4822, 0.4465)
CIFAR10_STD = (0.2470, 0.2435, 0.2616)
CLASSES = 10  # logits 0 to 9 are CIFAR-10's classes; 10 to 13 a rotation by 0, 90, 180, 270 degrees


@contextlib.contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """No autocast, no TF32 convolutions and no gradients: a score must not depend on the kind of GPU."""
    convolutions = torch.backends.cudnn.conv
    before = convolutions.fp32_precision
    convolutions.fp32_precision = "ieee"
    try:
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        convolutions.fp32_precision = before


class BasicBlock(nn.Module):
    """Two 3 x 3 convolutions and a shortcut (He et al. 2016, Fig. 2), with torchvision's parameter names."""

    def __init__(self, in_channels: int, channels: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(channels)
        self.downsample = None
        if stride != 1 or in_channels != channels:
            self.downsample = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride, bias=False), nn.BatchNorm2d(channels)
            )

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.downsample is None else self.downsample(x)
        x = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(x)) + shortcut)


class SmallResNet(nn.Module):
    """ResNet-10 for 32 x 32 images: a 3 x 3 stem without pooling, one basic block per stage.

    Parameter names are those of torchvision's ResNet(BasicBlock, [1, 1, 1, 1]) with such a stem; written here
    because the project's own score must not depend on an installed torchvision.
    """

    def __init__(self, outputs: int = CLASSES + 4):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        self.layer1 = nn.Sequential(BasicBlock(64, 64, stride=1))
        self.layer2 = nn.Sequential(BasicBlock(64, 128, stride=2))
        self.layer3 = nn.Sequential(BasicBlock(128, 256, stride=2))
        self.layer4 = nn.Sequential(BasicBlock(256, 512, stride=2))
        self.fc = nn.Linear(512, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Normalized images (b, 3, h, w) -> features (b, 512), the inputs of `fc`."""
        x = F.relu(self.bn1(self.conv1(x)))  # b 64 h w
        x = self.layer4(self.layer3(self.layer2(self.layer1(x))))  # b 512 h/8 w/8
        return x.mean(dim=(2, 3))


class CIFAR10Features:
    """Features and class probabilities of CIFAR-10-like images.

    name, dim: what the statistics files say about these features. distance_name: what a Frechet distance of
        them is called.

    weights: safetensors file; None takes the shipped one (93.8 % test accuracy).
    """

    name = "cifar10_resnet"
    dim = 512
    distance_name = "frechet_cifar10"

    def __init__(self, weights: str | Path | None = None, device: torch.device | str = "cpu"):
        self.device = torch.device(device)
        self.net = SmallResNet()
        self.net.load_state_dict(_load(Path(weights or ASSETS / "cifar10_features.safetensors")))
        self.net.to(self.device).eval().requires_grad_(False)
        self.mean = 255 * torch.tensor(CIFAR10_MEAN, device=self.device)
        self.std = 255 * torch.tensor(CIFAR10_STD, device=self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (b, 32, 32, 3) -> float32 (b, 512). Raises UserError for another shape."""
        if images.shape[1:] != (32, 32, 3):
            h, w, c = images.shape[1:]
            raise UserError(
                f"metrics.features={self.name!r} needs images of 32x32x3, not {h}x{w}x{c}; choose inception"
            )
        x = (images.to(self.device).float() - self.mean) / self.std
        with full_precision(self.device):
            return self.net(x.permute(0, 3, 1, 2).contiguous())

    def logits(self, features: Tensor) -> Tensor:
        """Features (b, 512) of a call -> logits (b, 14): ten classes, then four rotations."""
        with full_precision(self.device):
            return self.net.fc(features)

    def class_probabilities(self, features: Tensor) -> Tensor:
        """Features (b, 512) of a call -> probabilities (b, 10) of CIFAR-10's classes."""
        return self.logits(features)[:, :CLASSES].softmax(dim=1)


def _load(path: Path) -> dict[str, Tensor]:
    """The weights in float32, checked to be those of this network."""
    try:
        state = load_file(path)
    except (OSError, SafetensorError) as error:
        raise UserError(f"feature weights {path} cannot be read: {error}") from error
    state = {name: tensor.float() if tensor.is_floating_point() else tensor for name, tensor in state.items()}
    expected = {name: tensor.shape for name, tensor in SmallResNet().state_dict().items()}
    if {name: tensor.shape for name, tensor in state.items()} != expected:
        raise UserError(f"feature weights {path} are not those of the CIFAR-10 feature network")
    return state

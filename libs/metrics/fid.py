"""Inception features for FID, through clean-fid (Parmar et al. 2022), with weights from a file or fetched
once.

The three modes are clean-fid's: `legacy_pytorch` is pytorch-fid's convention, which U-ViT's published numbers
use; `legacy_tensorflow` is the original one (Heusel et al. 2017); `clean` resizes with antialiasing.
"""

import os
import pickle
import tempfile
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from http.client import HTTPException
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from ..errors import UserError, choose
from ..files import reason
from .features import full_precision

INPUT_SIZE = 299
TORCHSCRIPT_NAME = "inception-2015-12-05.pt"  # under this name clean-fid looks for it
STATE_DICT_HASH = "6726825d"  # first digits of the file's SHA-256, part of its name


class InceptionFeatures:
    """2,048 Inception features of images of any size; gray images count as RGB with equal channels.

    name, dim: what the statistics files say about these features. distance_name: "fid" in U-ViT's convention,
        else with the mode.

    mode: one of MODES.
    weights: file of the network, a state dict (.pth or .safetensors) for `legacy_pytorch` and a TorchScript
        file for the other modes; None fetches clean-fid's file into torch's hub folder unless it is there.
    Raises UserError at once, before anything is sampled, when the weights cannot be had.
    """

    dim = 2048

    def __init__(
        self,
        mode: str = "legacy_pytorch",
        weights: str | Path | None = None,
        device: torch.device | str = "cpu",
    ):
        build = choose("metrics.fid_mode", mode, MODES)
        self.name = f"inception_{mode}"
        self.distance_name = "fid" if mode == "legacy_pytorch" else f"fid_{mode}"
        self.device = torch.device(device)
        _check_installed()
        self.extract = build(weights, self.device)

    def __call__(self, images: Tensor) -> Tensor:
        """uint8 (b, h, w, c) with c 1 or 3 -> float32 (b, 2048)."""
        assert images.dtype == torch.uint8, images.dtype
        if images.shape[3] == 1:
            images = images.expand(*images.shape[:3], 3)
        with full_precision(self.device):
            return self.extract(images)


def _check_installed() -> None:
    try:
        import cleanfid.inception_pytorch
        import cleanfid.inception_torchscript  # noqa: F401
    # A torchvision that was built for another torch fails in any of these ways.
    except (ImportError, RuntimeError, OSError, AttributeError) as error:
        raise UserError(
            f"the inception features need clean-fid and a torchvision that fits torch ({reason(error)})"
        ) from error


def _legacy_pytorch(weights: str | Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    from cleanfid import inception_pytorch

    path = _weights_file(weights, inception_pytorch.FID_WEIGHTS_URL, STATE_DICT_HASH)
    state = _read_state_dict(path)
    # clean-fid fetches the weights inside its constructor and would unpickle them; it gets the ones read
    # above instead.
    with (
        mock.patch.object(inception_pytorch, "load_state_dict_from_url", return_value=state),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter("ignore")  # it still builds torchvision's network by a deprecated argument
        try:
            net = inception_pytorch.InceptionV3(output_blocks=[3], resize_input=False)
        except RuntimeError as error:  # load_state_dict: missing, unexpected or misshapen tensors
            raise UserError(f"--inception_weights={path} is not pytorch-fid's Inception network") from error
    net = net.to(device).eval()

    def extract(images: Tensor) -> Tensor:
        x = images.to(device).permute(0, 3, 1, 2).float()  # b 3 h w
        # clean-fid resizes one image at a time on the CPU; this is the same function, for the batch and on
        # the device.
        x = F.interpolate(x, (INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False).clamp(0, 255)
        return net(x / 255)[0].flatten(1)

    return extract


def _clean(weights: str | Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    from cleanfid.resize import build_resizer

    net = _torchscript_inception(weights, device, resize_inside=False)
    resize = build_resizer("clean")

    def extract(images: Tensor) -> Tensor:
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow resizes outside Python's lock
            resized = list(pool.map(lambda image: torch.from_numpy(resize(image)), images.cpu().numpy()))
        return net(torch.stack(resized).to(device).permute(0, 3, 1, 2))

    return extract


def _legacy_tensorflow(weights: str | Path | None, device: torch.device) -> Callable[[Tensor], Tensor]:
    net = _torchscript_inception(weights, device, resize_inside=True)
    return lambda images: net(images.to(device).permute(0, 3, 1, 2).float())


MODES = {"legacy_pytorch": _legacy_pytorch, "clean": _clean, "legacy_tensorflow": _legacy_tensorflow}


def _torchscript_inception(
    weights: str | Path | None, device: torch.device, resize_inside: bool
) -> nn.Module:
    from cleanfid.downloads_helper import inception_url
    from cleanfid.inception_torchscript import InceptionV3W

    path = _weights_file(weights, inception_url)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, TORCHSCRIPT_NAME).symlink_to(path.resolve())
        try:
            net = InceptionV3W(folder, download=False, resize_inside=resize_inside)
        except (RuntimeError, AttributeError) as error:
            raise UserError(
                f"--inception_weights={path} is not the TorchScript Inception network of clean-fid"
            ) from error
    return net.to(device).eval()


def _weights_file(weights: str | Path | None, url: str, hash_prefix: str | None = None) -> Path:
    """The given file, or `url`'s in torch's hub folder, fetched if it is not there."""
    if weights:
        path = Path(weights).expanduser()
        if not path.is_file():
            raise UserError(f"--inception_weights={path} does not exist; download it from {url}")
        return path
    path = Path(torch.hub.get_dir(), "checkpoints", url.rsplit("/", 1)[-1])
    if not path.is_file():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(url, str(path), hash_prefix)
        except (
            OSError,
            RuntimeError,
            HTTPException,
        ) as error:  # no network or disk; wrong checksum; broken transfer
            raise UserError(
                f"--inception_weights is not given and {url} cannot be fetched to {path} ({reason(error)}); "
                "download it elsewhere and give its path with --inception_weights"
            ) from error
    return path


def _read_state_dict(path: Path) -> dict[str, Tensor]:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError, SafetensorError) as error:
        raise UserError(f"--inception_weights={path} cannot be read as a state dict") from error

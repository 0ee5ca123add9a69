"""The three losses of Flash Diffusion (2406.02347) as plain functions; each gives one value a row, (b,)."""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from ..errors import UserError, choose
from ..files import reason

Distance = Callable[[Tensor, Tensor], Tensor]  # (f, y), both (b, c, h, w) -> (b,)
LPIPS_SIDE = 64  # of the square in the middle of the model space that LPIPS sees decoded


def mean_of_rows(x: Tensor) -> Tensor:
    """(b, ...) -> (b,)."""
    return x.flatten(1).mean(dim=1)


def l2(f: Tensor, y: Tensor) -> Tensor:
    return mean_of_rows((f - y).square())


def l1(f: Tensor, y: Tensor) -> Tensor:
    return mean_of_rows((f - y).abs())


def lpips_distance(pixels: Callable[[Tensor], Tensor]) -> Distance:
    """LPIPS (1801.03924) by VGG between the images of f and y, of their middle where they are large.

    pixels: the model space (b, c, h, w) -> images (b, 3, h', w') of -1 ... 1, differentiable.
    Raises UserError where the package lpips or its weights are missing.
    """
    field = "--config.distill.distance='lpips'"
    try:
        from lpips import LPIPS
    except ImportError as error:
        raise UserError(f"{field} needs the package lpips (pip install -r requirements-lpips.txt); or choose from l2, "
                        "l1") from error
    try:
        net = LPIPS(net="vgg", verbose=False)
    except (OSError, RuntimeError) as error:
        raise UserError(f"{field}: VGG's weights are not in torch's cache, and there is no way to them "
                        f"({reason(error)}); or choose from l2, l1") from error
    net = net.eval().requires_grad_(False)

    def distance(f: Tensor, y: Tensor) -> Tensor:
        return net.to(f.device)(pixels(middle(f)), pixels(middle(y))).flatten()

    return distance


def middle(x: Tensor) -> Tensor:
    """The square of `LPIPS_SIDE` in the middle of x (b, c, h, w); all of an x that is not larger."""
    top, left = (max(0, side - LPIPS_SIDE) // 2 for side in x.shape[-2:])
    return x[..., top:top + LPIPS_SIDE, left:left + LPIPS_SIDE]


DISTANCES = {"l2": l2, "l1": l1, "lpips": None}  # None: made by `make_distance`


def make_distance(name: str, pixels: Callable[[Tensor], Tensor] | None) -> Distance:
    """The distillation loss L_distil(f, y) called `name`; pixels: see `lpips_distance`."""
    distance = choose("--config.distill.distance", name, DISTANCES)
    if distance is not None:
        return distance
    if pixels is None:
        raise UserError("--config.distill.distance='lpips' needs images, and this codec decodes none that a gradient "
                        "could pass; choose from l2, l1")
    return lpips_distance(pixels)


def dmd_loss(f: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> Tensor:
    """Distribution matching (2311.18828, equations 7 and 8): ||f - stopgrad(f - weight (x_0_fake - x_0_real))||^2 / N.

    x_0_fake, x_0_real: what the student's distribution and the data's, as their networks know them, expect of f after
    it was noised. With weight = 1 / (mean |f - x_0_real| + 1e-5) the gradient of a row of N numbers is
    2 weight (x_0_fake - x_0_real) / N.
    """
    f_held = f.detach()
    weight = 1 / (mean_of_rows((f_held - x_0_real).abs()) + 1e-5)
    step = weight.view(-1, *[1] * (f.dim() - 1)) * (x_0_fake - x_0_real)
    return mean_of_rows((f - (f_held - step).detach()).square())


# name -> (the discriminator's loss of logits (b, n) of real and of fake, the generator's of those of fake)
GAN = {
    "hinge": (lambda real, fake: mean_of_rows(F.relu(1 - real) + F.relu(1 + fake)),  # 1705.02894
              lambda fake: mean_of_rows(-fake)),
    "vanilla": (lambda real, fake: mean_of_rows(F.softplus(-real) + F.softplus(fake)),  # 1406.2661, equation 1
                lambda fake: mean_of_rows(-F.softplus(fake))),  # log(1 - sigmoid)
    "non_saturating": (lambda real, fake: mean_of_rows(F.softplus(-real) + F.softplus(fake)),
                       lambda fake: mean_of_rows(F.softplus(-fake))),  # 1406.2661, section 3: -log sigmoid
    "wgan": (lambda real, fake: mean_of_rows(fake - real),  # 1701.07875, its critic without a bound
             lambda fake: mean_of_rows(-fake)),
    "lsgan": (lambda real, fake: mean_of_rows((real.sigmoid() - 1).square() + fake.sigmoid().square()) / 2,
              lambda fake: mean_of_rows((fake.sigmoid() - 1).square()) / 2),  # 1611.04076, equation 9, of sigmoids
}

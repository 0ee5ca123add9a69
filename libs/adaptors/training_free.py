"""Adaptors without gradient descent: one has nothing to fit, the other is fitted in closed form."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from ..errors import UserError
from .features import DeepFeatures


class Extrapolation(nn.Module):
    """The line through the deep features of the last two full steps: r_hat = r_key + ratio (r_key - r_key_before).

    Exact where the features are linear in the step. Until there were two full steps, ratio is 0: the identity.
    c_in, c_out and temb_dim are those of every adaptor and change nothing here.
    strength: factor on the slope; 0 is the identity adaptor, values below 1 damp the noise of the difference.
    """

    uses = frozenset({"r_key", "r_key_before", "ratio"})
    cut = "any"

    def __init__(self, c_in: int = 0, c_out: int = 0, temb_dim: int = 0, strength: float = 1.0):
        super().__init__()
        if not math.isfinite(strength):
            raise UserError(f"adaptor strength={strength}: want a finite number")
        self.strength = strength

    def forward(self, deep: DeepFeatures) -> Tensor:
        step = self.strength * deep.ratio * (deep.r_key - deep.r_key_before)  # in float32 at least, as ratio is
        return (deep.r_key + step).to(deep.r_key.dtype)


class RidgeAdaptor(nn.Module):
    """What the change of r_in says about the change of r_out: r_hat = r_key + W (r_in - r_in_key) + b.

    W (c_out, c_in) and b are one linear map for all pixels and steps, zero until `fit`: then it is the identity
    adaptor. Since r_in and r_out must be of one size, r_out is the one before the upsampler.
    temb_dim is that of every adaptor and changes nothing here.
    """

    uses = frozenset({"r_in", "r_in_key", "r_key"})
    cut = "before"

    def __init__(self, c_in: int, c_out: int, temb_dim: int = 0):
        super().__init__()
        for name, value in {"c_in": c_in, "c_out": c_out}.items():
            if value < 1:
                raise UserError(f"adaptor {name}={value}: want at least 1")
        self.sizes = {"c_in": c_in, "c_out": c_out}
        self.map = nn.Conv2d(c_in, c_out, 1)
        nn.init.zeros_(self.map.weight)
        nn.init.zeros_(self.map.bias)

    def forward(self, deep: DeepFeatures) -> Tensor:
        change = self.map((deep.r_in - deep.r_in_key).to(self.map.weight.dtype))
        return deep.r_key + change.to(deep.r_key.dtype)

    @torch.no_grad()
    def fit(self, samples: Iterable[tuple[Tensor, Tensor, Tensor, Tensor]], ridge: float = 1e-3) -> None:
        """Least squares over all pixels of all samples, with a penalty on W: its minimum, from moments in float64.

        samples: (r_in, r_in_key, r_key, r_out) of steps that reuse, r_out the true one; (b, c_in, h, w) twice and
            (b, c_out, h, w) twice. Read once, one at a time.
        ridge: the penalty on |W|^2, in units of the number of pixels times the mean variance of r_in - r_in_key;
            0 or more. b is free. Since W = 0, b = 0 was open to it, the fit is no worse than the identity on its
            samples.
        Raises UserError if there are no samples, or they have other sizes or values that are not finite.
        """
        if not 0 <= ridge < math.inf:
            raise UserError(f"ridge={ridge}: want 0 or more")
        c_out, c_in = self.map.weight.shape[:2]
        gram = torch.zeros(c_in + 1, c_in + 1, dtype=torch.float64)  # the last row and column: sums, and the count
        cross = torch.zeros(c_in + 1, c_out, dtype=torch.float64)
        for r_in, r_in_key, r_key, r_out in samples:
            x = (r_in.double() - r_in_key.double()).movedim(1, -1)  # b h w c_in
            y = (r_out.double() - r_key.double()).movedim(1, -1)  # b h w c_out
            if x.shape[:-1] != y.shape[:-1] or (x.shape[-1], y.shape[-1]) != (c_in, c_out):
                raise UserError(f"ridge adaptor: r_in is {tuple(r_in.shape)} and r_out {tuple(r_out.shape)}; want "
                                f"(b, {c_in}, h, w) and (b, {c_out}, h, w)")
            x, y = x.flatten(0, -2), y.flatten(0, -2)
            x = torch.cat([x, x.new_ones(len(x), 1)], dim=1)
            gram += (x.T @ x).cpu()
            cross += (x.T @ y).cpu()
        pixels = gram[-1, -1]
        if not pixels:
            raise UserError("ridge adaptor: no samples to fit")
        if not (gram.isfinite().all() and cross.isfinite().all()):
            raise UserError("ridge adaptor: the samples hold values that are not finite")
        mean_x, mean_y = gram[-1, :-1] / pixels, cross[-1] / pixels
        variance = gram[:-1, :-1] - pixels * mean_x.outer(mean_x)
        covariance = cross[:-1] - pixels * mean_x.outer(mean_y)
        variance += ridge * variance.diagonal().mean() * torch.eye(c_in, dtype=torch.float64)
        # by singular values, so that channels that never change get weight 0 even without a penalty
        weight = torch.linalg.lstsq(variance, covariance, driver="gelsd").solution  # c_in c_out
        self.map.weight.copy_(weight.T[:, :, None, None])
        self.map.bias.copy_(mean_y - mean_x @ weight)

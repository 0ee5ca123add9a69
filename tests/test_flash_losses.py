"""Flash Diffusion's losses against numbers worked out by hand."""

import math
import sys
import types
import urllib.error
from functools import partial

import pytest
import torch

from libs.distillation.flash import boundary_scalings
from libs.distillation.flash_losses import GAN, dmd_loss, make_distance
from libs.errors import UserError


def test_boundary_scalings():
    t = torch.arange(1, 1001, dtype=torch.float64) / 1000
    c_skip, c_out = boundary_scalings(t)
    assert c_skip[249:].max() <= 4e-8  # the steps 249 to 999 of 1,000
    assert (1 - c_out[249:]).max() <= 4e-8
    assert c_skip[248] > 4e-8
    assert float(c_skip[0]) == pytest.approx(0.25 / 100.25)  # u = 10
    assert float(c_out[0]) == pytest.approx(10 / math.sqrt(100.25))
    at_data = boundary_scalings(torch.tensor(0.0))
    assert [float(each) for each in at_data] == [1, 0]


def test_distances():
    f, y = torch.tensor([[[[1.0, -1.0]]], [[[0.0, 3.0]]]]), torch.zeros(2, 1, 1, 2)
    assert make_distance("l2", None)(f, y).tolist() == [1, 4.5]
    assert make_distance("l1", None)(f, y).tolist() == [1, 1.5]
    with pytest.raises(UserError, match="--config.distill.distance='l3' is unknown; choose from l2, l1, lpips"):
        make_distance("l3", None)


def fake_lpips(monkeypatch, cls):
    monkeypatch.setitem(sys.modules, "lpips", types.SimpleNamespace(LPIPS=cls))


class MeanDifference(torch.nn.Module):
    """In LPIPS's place, with its arguments and the shape of its answer."""

    def __init__(self, net, verbose):
        assert (net, verbose) == ("vgg", False)
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(()))
        self.shapes = []

    def forward(self, a, b):
        assert not self.training
        assert not self.weight.requires_grad
        self.shapes.append(tuple(a.shape))
        return (a - b).abs().mean(dim=(1, 2, 3), keepdim=True)


def test_lpips_sees_the_middle_decoded(monkeypatch):
    fake_lpips(monkeypatch, MeanDifference)
    seen = []

    def pixels(x):
        seen.append(x)
        return x.repeat_interleave(2, -1).repeat_interleave(2, -2)

    distance = make_distance("lpips", pixels)
    f = torch.randn(2, 3, 80, 66, requires_grad=True)
    y = torch.randn(2, 3, 80, 66)
    loss = distance(f, y)
    assert loss.shape == (2,)
    loss.sum().backward()
    inside = torch.zeros(80, 66, dtype=torch.bool)
    inside[8:72, 1:65] = True
    assert torch.equal((f.grad != 0).all(dim=1), inside.expand(2, 80, 66))
    assert [tuple(x.shape) for x in seen] == [(2, 3, 64, 64)] * 2
    small = torch.randn(2, 3, 16, 16)
    torch.testing.assert_close(distance(small, 0 * small), small.abs().mean(dim=(1, 2, 3)))


def test_the_package_lpips_itself_with_vgg_of_random_weights(monkeypatch):
    """Its arguments, the shape of what it gives, and its gradient; where it is installed."""
    LPIPS = pytest.importorskip("lpips").LPIPS
    monkeypatch.setattr("lpips.LPIPS", partial(LPIPS, pnet_rand=True))  # its own file has the linear layers alone
    torch.manual_seed(0)
    distance = make_distance("lpips", torch.nn.Identity())
    f, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    f.requires_grad_(True)
    both = distance(f, y)
    assert both.shape == (2,)
    assert bool((both > 0).all())
    torch.testing.assert_close(distance(f[1:], y[1:])[0], both[1], rtol=1e-4, atol=1e-6)
    assert distance(y, y).tolist() == [0, 0]
    both[0].backward()
    assert bool(f.grad[0].any())
    assert not f.grad[1].any(), "a row's distance is its own"


def test_lpips_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(UserError, match="distance='lpips' needs the package lpips .*; or choose from l2, l1"):
        make_distance("lpips", torch.nn.Identity())

    def no_weights(**options):
        raise urllib.error.URLError("no route to host")

    fake_lpips(monkeypatch, no_weights)
    with pytest.raises(UserError, match="distance='lpips': VGG's weights are not in torch's cache.*no route to host"):
        make_distance("lpips", torch.nn.Identity())
    with pytest.raises(UserError, match="distance='lpips' needs images, and this codec decodes none"):
        make_distance("lpips", None)


def test_dmd_gradient_is_its_closed_form():
    f, fake, real = torch.randn(3, 5, 2, 4, 4, dtype=torch.float64)
    f.requires_grad_()
    loss = dmd_loss(f, fake, real)
    assert loss.shape == (5,)
    loss.sum().backward()
    weight = 1 / ((f - real).abs().mean(dim=(1, 2, 3), keepdim=True) + 1e-5)
    torch.testing.assert_close(f.grad, 2 * weight * (fake - real) / 32, atol=1e-12, rtol=0)
    torch.testing.assert_close(loss, (weight * (fake - real)).square().mean(dim=(1, 2, 3)))
    assert weight.flatten().std() > 0.01  # each row has its own


SIGMOID = 1 / (1 + math.exp(-2))  # of 2
REAL, FAKE = torch.tensor([[2.0, 0.0], [-2.0, -2.0]]), torch.tensor([[0.0, 2.0], [-2.0, 0.5]])
SOFTPLUS = {x: math.log1p(math.exp(x)) for x in (-2.0, -0.5, 0.0, 0.5, 2.0)}
EXPECTED = {  # of each row: the discriminator's loss, the generator's
    "hinge": ([((0 + 1) + (1 + 3)) / 2, ((3 + 0) + (3 + 1.5)) / 2], [-1, 0.75]),
    "vanilla": ([(SOFTPLUS[-2.0] + SOFTPLUS[0.0] + SOFTPLUS[0.0] + SOFTPLUS[2.0]) / 2,
                 (SOFTPLUS[2.0] + SOFTPLUS[-2.0] + SOFTPLUS[2.0] + SOFTPLUS[0.5]) / 2],
                [-(SOFTPLUS[0.0] + SOFTPLUS[2.0]) / 2, -(SOFTPLUS[-2.0] + SOFTPLUS[0.5]) / 2]),
    "wgan": ([0, 1.25], [-1, 0.75]),
    "lsgan": ([((SIGMOID - 1) ** 2 + 0.5**2 + 0.5**2 + SIGMOID**2) / 4,
               (2 * SIGMOID**2 + (1 - SIGMOID) ** 2 + 0.6224593312**2) / 4],
              [(0.5**2 + (SIGMOID - 1) ** 2) / 4, (SIGMOID**2 + 0.3775406688**2) / 4]),
}
EXPECTED["non_saturating"] = (EXPECTED["vanilla"][0], [(SOFTPLUS[0.0] + SOFTPLUS[-2.0]) / 2,
                                                       (SOFTPLUS[2.0] + SOFTPLUS[-0.5]) / 2])


@pytest.mark.parametrize("name", GAN)
def test_gan_losses(name):
    discriminator, generator = GAN[name]
    for loss, expected in zip((discriminator(REAL, FAKE), generator(FAKE)), EXPECTED[name], strict=True):
        assert loss.tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("name", GAN)
def test_who_wants_what(name):
    """The discriminator wants high logits of real and low ones of fake rows, the generator high ones of its own."""
    discriminator, generator = GAN[name]
    real, fake = torch.tensor([[0.3]], requires_grad=True), torch.tensor([[-0.2]], requires_grad=True)
    for_real, for_fake = torch.autograd.grad(discriminator(real, fake).sum(), (real, fake))
    (for_generator,) = torch.autograd.grad(generator(fake).sum(), fake)
    assert for_real < 0 < for_fake
    assert for_generator < 0

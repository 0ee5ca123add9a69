"""The discriminator: its published sizes, maps of any size, and what its gradients reach."""

import itertools

import pytest
import torch
from torch.func import functional_call

from libs.errors import UserError
from libs.heads.discriminator import Discriminator, default_layers, make_discriminator

# features, width, layers (0 is the default): parameters in millions
PUBLISHED = {
    "SD 1.5": ((1280, 8, 8), 64, 0, 0.87),
    "SDXL": ((1280, 32, 32), 256, 0, 15.75),
    "T2I adapter on SDXL": ((1280, 32, 32), 64, 0, 1.97),
    "PixArt": ((4, 128, 128), 64, 0, 11.17),
    "SD3": ((16, 128, 128), 64, 4, 2.78),  # five layers would have four times as many
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    shape, width, layers, millions = PUBLISHED[name]
    with torch.device("meta"):
        net = make_discriminator({"discriminator_width": width, "discriminator_layers": layers}, *shape)
        logits = net(torch.zeros(2, *shape))
    assert round(sum(each.numel() for each in net.parameters()) / 1e6, 2) == millions
    assert logits.shape == (2, 25 if name == "SD3" else 1)


def test_parameters_by_hand():
    net = Discriminator(10, 32, 16, first=8)  # 16 x 8, 8 x 4, 4 x 2
    convolutions = 16 * (10 * 8 + 8 * 16 + 16 * 32) + (4 * 2 * 32 + 1)
    norms = 2 * (8 + 16 + 32)
    assert sum(each.numel() for each in net.parameters()) == convolutions + norms


@pytest.mark.parametrize(("size", "layers"), [((1, 1), 1), ((2, 2), 1), ((4, 4), 1), ((5, 5), 2), ((8, 8), 2),
                                              ((8, 4), 2), ((9, 9), 2), ((16, 16), 2), ((17, 12), 2), ((64, 48), 4)])
def test_any_size(size, layers):
    assert default_layers(*size) == layers
    net = Discriminator(6, *size, first=8)
    logits = net(torch.randn(3, 6, *size))
    assert len(net.blocks) == layers
    assert logits.shape == (3, 1)
    assert logits.std() > 0  # images differ


@pytest.mark.parametrize("size", [*itertools.product((1, 3, 7, 15, 16, 33), repeat=2)])
def test_no_size_fails(size):
    assert Discriminator(2, *size, first=4)(torch.randn(2, 2, *size)).shape[0] == 2


def test_fewer_layers_give_a_logit_a_place():
    features = torch.randn(2, 6, 32, 32)
    assert [Discriminator(6, 32, 32, 4, layers)(features).shape[1] for layers in (1, 2, 3, 4)] == [13**2, 5**2, 1, 1]


def test_images_are_judged_alone():
    net, features = Discriminator(6, 8, 8, 8), torch.randn(4, 6, 8, 8)
    together = net(features)
    alone = torch.cat([net(each[None]) for each in features])
    assert torch.allclose(together, alone, atol=1e-6)


def test_scale_of_the_features_does_not_matter():
    """Middle blocks of large networks give values in the tens, those of small ones in the tenths."""
    net, features = Discriminator(6, 8, 8, 8), torch.randn(4, 6, 8, 8)
    assert torch.allclose(net(features), net(30 * features), atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_features_of_any_precision(dtype):
    net, features = Discriminator(6, 4, 4, 8), torch.randn(2, 6, 4, 4).to(dtype)
    logits = net(features)
    assert logits.dtype == torch.float32
    assert torch.equal(logits, net(features.float()))
    with torch.autocast("cpu", torch.bfloat16):
        assert net(features).dtype == torch.float32


def test_generator_term_reaches_the_features_alone():
    net, features = Discriminator(6, 8, 8, 8), torch.randn(2, 6, 8, 8, requires_grad=True)
    detached = {name: each.detach() for name, each in net.named_parameters()}
    functional_call(net, detached, features).sum().backward()
    assert features.grad.abs().sum() > 0
    assert all(each.grad is None for each in net.parameters())
    net(features.detach()).sum().backward()
    assert all(each.grad.abs().sum() > 0 for each in net.parameters() if each is not net.last.bias)


def test_learns_to_tell_apart():
    """Features of the CIFAR-10 UNet's size that differ in the pattern of a few channels, not in mean or scale."""
    net = Discriminator(192, 4, 4, 16)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    pattern = torch.randn(192, 4, 4)

    def batch(rows):
        real, fake = torch.randn(2, rows, 192, 4, 4).unbind(0)
        return torch.cat([real + 0.3 * pattern, fake]), torch.arange(2 * rows) < rows

    for _ in range(30):
        features, real = batch(16)
        loss = torch.nn.functional.softplus(torch.where(real, -1, 1) * net(features)[:, 0]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    features, real = batch(64)
    assert ((net(features)[:, 0] > 0) == real).float().mean() > 0.95


@pytest.mark.parametrize(("width", "layers", "fragments"), [
    (0, 0, ("--config.distill.discriminator_width=0", "multiple of 4")),
    (30, 0, ("--config.distill.discriminator_width=30", "multiple of 4")),
    (64, -1, ("--config.distill.discriminator_layers=-1",)),
    (64, 6, ("--config.distill.discriminator_layers=6", "8 x 8", "0 is 2")),
])
def test_refusals(width, layers, fragments):
    with pytest.raises(UserError) as caught:
        Discriminator(4, 8, 8, width, layers)
    assert "\n" not in str(caught.value)
    assert all(fragment in str(caught.value) for fragment in fragments)

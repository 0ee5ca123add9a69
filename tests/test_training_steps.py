"""What a training step is made from: batches, loss, learning rate, average."""


import pytest
import torch
from tiny_training import CPU, tiny_config
from torch import nn

from libs.codecs import KLCodec, PixelCodec
from libs.data import ImageData
from libs.training import Batches, diffusion_loss, new_network
from libs.training.batches import Batch, DataOrder
from libs.training.ema import EMA
from libs.training.optimizer import learning_rate, make_optimizer, parameter_groups

LABELLED = {"kind": "label", "num_classes": 10, "null_label": 10, "drop": 0.3}


def test_order_is_a_permutation_in_every_epoch():
    order = DataOrder(7, seed=3)
    sequence = order(torch.arange(21))
    epochs = sequence.view(3, 7)
    assert all(epoch.sort().values.tolist() == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch.tolist()) for epoch in epochs}) == 3
    shuffled = torch.tensor([20, 3, 8, 0])
    assert torch.equal(DataOrder(7, seed=3)(shuffled), sequence[shuffled])  # no state
    assert not torch.equal(DataOrder(7, seed=4)(torch.arange(21)), sequence)


def digits_like(n=20, labels=True):
    images = torch.randint(0, 256, (n, 8, 8, 1), dtype=torch.uint8)
    return ImageData(images, torch.arange(n) % 10 if labels else None)


def joined(parts):
    return [torch.cat(each) for each in zip(*((part.x_0, part.cond["y"], part.noise(), part.uniform())
                                              for part in parts), strict=True)]


def test_batch_does_not_depend_on_how_it_is_cut():
    data = digits_like()
    whole = joined(Batches(data, PixelCodec(), LABELLED, True, 5, 12).parts(4))
    for count, accumulate in ((1, 3), (2, 1), (2, 3)):
        parts = [part for rank in range(count)
                 for part in Batches(data, PixelCodec(), LABELLED, True, 5, 12, accumulate, rank, count).parts(4)]
        assert len(parts) == count * accumulate
        assert all(torch.equal(one, other) for one, other in zip(joined(parts), whole, strict=True))
    for seed, step in ((6, 4), (5, 5)):
        other = joined(Batches(data, PixelCodec(), LABELLED, True, seed, 12).parts(step))
        assert not any(torch.equal(one, another) for one, another in zip(other, whole, strict=True))


def test_flips_and_dropped_labels_have_their_rates():
    images = torch.zeros(4, 8, 8, 1, dtype=torch.uint8)
    images[:, :, 0] = 255  # bright on the left
    data = ImageData(images, torch.arange(4))
    [batch] = Batches(data, PixelCodec(), LABELLED, True, 0, 2000).parts(0)
    mirrored = batch.x_0[:, 0, 0, 7] == 1
    assert torch.equal(batch.x_0[:, 0, 0, 0] == 1, ~mirrored)
    assert abs(mirrored.float().mean() - 0.5) < 0.04
    assert abs((batch.cond["y"] == 10).float().mean() - 0.3) < 0.04
    kept = batch.cond["y"] != 10
    assert torch.equal(batch.cond["y"][kept], DataOrder(4, 0)(batch.positions)[kept])

    [plain] = Batches(data, PixelCodec(), LABELLED | {"drop": 0.0}, False, 0, 1000).parts(0)
    assert (plain.x_0[:, 0, 0, 0] == 1).all()
    assert (plain.cond["y"] < 4).all()
    [unlabelled] = Batches(data, PixelCodec(), LABELLED | {"kind": "none"}, False, 0, 4).parts(0)
    assert unlabelled.cond is None


def test_draws_are_of_their_distributions_and_independent():
    batch = Batch(torch.zeros(2000, 1, 2, 2), None, torch.arange(2000), seed=1, step=0)
    noise, u = batch.noise(), batch.uniform()
    assert abs(noise.mean()) < 0.03
    assert abs(noise.std() - 1) < 0.03
    assert (u.min() > 0) & (u.max() < 1)
    assert abs(u.mean() - 0.5) < 0.02
    assert abs(torch.corrcoef(torch.stack([noise[:, 0, 0, 0].double(), u]))[0, 1]) < 0.08


def test_codec_gets_noise_of_its_latents_only_if_it_takes_it():
    class Latents(PixelCodec):
        takes_noise = True

        def latent_shape(self, image_size, channels):
            return 3, image_size // 2, image_size // 2

        def encode(self, images, noise=None):
            return noise

    [batch] = Batches(digits_like(), Latents(), LABELLED, False, 0, 6).parts(0)
    assert batch.x_0.shape == (6, 3, 4, 4)
    assert len(batch.x_0.flatten().unique()) == batch.x_0.numel()
    assert not torch.equal(batch.x_0, batch.noise())  # a stream of its own
    assert (KLCodec.takes_noise, PixelCodec.takes_noise) == (True, False)


@pytest.mark.parametrize("steps", [None, 4])
def test_plain_loss_is_the_denoisers_at_uniform_times(steps):
    class Spy:
        schedule = type("Schedule", (), {"steps": steps})

        def loss(self, x_0, eps, t, cond):
            self.seen = x_0, eps, t, cond
            return x_0

    spy, batch = Spy(), Batch(torch.zeros(1000, 1, 2, 2), {"y": 3}, torch.arange(1000), seed=1, step=0)
    assert diffusion_loss(spy, batch) is batch.x_0
    _, eps, t, cond = spy.seen
    assert torch.equal(eps, batch.noise())
    assert cond == {"y": 3}
    assert t.dtype == torch.float64
    if steps is None:
        assert torch.equal(t, batch.uniform())
    else:
        values, counts = t.unique(return_counts=True)
        assert values.tolist() == [0.25, 0.5, 0.75, 1.0]
        assert counts.min() > 200


def test_learning_rate():
    rates = [learning_rate(step, 100, 2.0, warmup=10, decay_from=0.4) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10:41] == [2.0] * 31
    assert rates[41:] == pytest.approx([2.0 * (100 - step) / 60 for step in range(41, 100)])
    assert {learning_rate(step, 100, 2.0) for step in range(100)} == {2.0}
    assert [learning_rate(step, 4, 1.0, decay_from=0.0) for step in range(4)] == [1.0, 0.75, 0.5, 0.25]


def test_what_decays():
    config = tiny_config(weight_decay=0.5, lr=0.1)
    net, _ = new_network(config)
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    decayed, free = ({names[id(each)] for each in group["params"]} for group in parameter_groups(net, 0.5))
    assert decayed | free == set(names.values())
    assert {"patch_embed.proj.weight", "label_emb.weight", "mid_block.mlp.fc1.weight"} < decayed
    assert {"pos_embed", "norm.weight", "mid_block.norm1.weight", "decoder_pred.bias"} < free
    net.norm.weight.requires_grad_(False)
    assert sum(len(group["params"]) for group in parameter_groups(net, 0.5)) == len(names) - 1

    for parameter in net.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = {name: parameter.clone() for name, parameter in net.named_parameters()}
    make_optimizer(net, config.train, CPU).step()  # of zero gradients: decay alone is left
    for name, parameter in net.named_parameters():
        torch.testing.assert_close(parameter, before[name] * (0.95 if name in decayed else 1.0))


def test_average_follows_weights_and_buffers():
    net = nn.BatchNorm1d(3)
    ema = EMA(net, 0.9)
    expected = torch.ones(3)
    for value in (2.0, 5.0):
        with torch.no_grad():
            net.weight.fill_(value)
            net.running_mean.fill_(value - 1)
            net.num_batches_tracked += 1
        ema.update()
        expected = 0.9 * expected + 0.1 * value
    torch.testing.assert_close(ema.net.weight, expected)
    torch.testing.assert_close(ema.net.running_mean, expected - 1)
    assert int(ema.net.num_batches_tracked) == 2
    assert not ema.net.training
    assert not ema.net.weight.requires_grad


def test_without_decay_the_average_is_the_network():
    net = nn.BatchNorm1d(3)
    assert EMA(net, 0.0).net is net
    copying = EMA(net, 0.0, apart=True)
    with torch.no_grad():
        net.weight.normal_()
    assert not torch.equal(copying.net.weight, net.weight)
    copying.update()
    assert torch.equal(copying.net.weight, net.weight)


def test_an_average_of_a_frozen_half_and_what_learns():
    """As of a LoRA, which is float32 on a base in half precision."""
    net = nn.Sequential(nn.Linear(2, 2).bfloat16().requires_grad_(False), nn.Linear(2, 2))
    held, learned = net[0].weight.clone(), net[1].weight.detach().clone()
    ema = EMA(net, 0.75)
    with torch.no_grad():
        net[1].weight.zero_()
    ema.update()
    assert torch.equal(ema.net[0].weight, held)
    torch.testing.assert_close(ema.net[1].weight, 0.75 * learned)

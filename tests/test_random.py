"""Philox against the published vectors; rows that depend on their own seed and draw alone."""

import pytest
import torch

from libs.random import Stream, normal, philox, random_bits, uniform

# Known-answer vectors of Random123 for philox4x32-10: counter, key -> words
VECTORS = [
    ("00000000 00000000 00000000 00000000", "00000000 00000000", "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
    ("ffffffff ffffffff ffffffff ffffffff", "ffffffff ffffffff", "408f276d 41c83b0e a20bc7c6 6d5451fd"),
    ("243f6a88 85a308d3 13198a2e 03707344", "a4093822 299f31d0", "d16cfe09 94fdcceb 5001e420 24126ea1"),
]


@pytest.mark.parametrize(("counter", "key", "words"), VECTORS)
def test_philox_known_answers(counter, key, words):
    parse = lambda text: [torch.tensor([int(word, 16)]) for word in text.split()]  # noqa: E731
    assert philox(parse(counter), parse(key)) == parse(words)


def test_a_row_depends_on_its_seed_draw_and_stream_alone():
    seeds = torch.tensor([5, 7, 2**62 + 3, 11])
    together = normal(seeds, 3, (3, 5), Stream.STEP)
    for i, seed in enumerate(seeds):
        assert torch.equal(normal(seed[None], 3, (3, 5), Stream.STEP)[0], together[i])
    order = torch.tensor([2, 0, 3, 1])
    assert torch.equal(normal(seeds[order], 3, (3, 5), Stream.STEP), together[order])
    per_row = normal(seeds, torch.tensor([3, 4, 3, 2**40]), (3, 5), Stream.STEP)
    assert torch.equal(per_row[[0, 2]], together[[0, 2]])
    for other in (per_row[1], per_row[3], normal(seeds, 3, (3, 5), Stream.START)[1],
                  normal(seeds + 2**32, 3, (3, 5), Stream.STEP)[1]):
        assert not torch.isclose(other, together[1]).any()


def test_prefix_of_a_longer_draw_is_the_shorter_draw():
    seeds = torch.arange(2)
    assert torch.equal(random_bits(seeds, 0, 0, 10)[:, :7], random_bits(seeds, 0, 0, 7))


def test_distribution():
    x = normal(torch.arange(64), 0, (4096,)).double()
    n = x.numel()
    assert x.mean().abs() < 4 / n**0.5
    assert (x.square().mean() - 1).abs() < 4 * (2 / n) ** 0.5
    assert (x.pow(4).mean() - 3).abs() < 4 * (96 / n) ** 0.5
    u = uniform(torch.arange(64), 0, (4096,))
    assert u.min() > 0 and u.max() < 1  # noqa: PT018
    assert (u.mean() - 0.5).abs() < 4 * (1 / 12 / n) ** 0.5
    pairs = torch.corrcoef(x.view(64, 4096))
    assert (pairs - torch.eye(64)).abs().max() < 6 / 4096**0.5  # seeds 0, 1, 2 ... are independent

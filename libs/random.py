"""Random numbers that are a function of (seed, draw, stream) alone: Philox4x32-10 (Salmon et al., SC 2011).

A counter-based generator has no state to share between images or to save in a checkpoint: image i gets the
same noise in any batch, on any number of processes, on a CPU or a GPU.
"""

import math
from enum import IntEnum

import torch
from torch import Tensor

MASK = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)  # Salmon et al., table 2
WEYL = (0x9E3779B9, 0xBB67AE85)


class Stream(IntEnum):
    """Independent streams of one seed; the values are part of what makes a seed reproducible."""

    START = 0  # x_T of sampling
    STEP = 1  # noise of a stochastic sampler
    TRAIN_NOISE = 2
    TRAIN_TIME = 3
    TRAIN_FLIP = 4
    TRAIN_DROP = 5  # label dropout
    DATA_ORDER = 6
    ENCODE = 7  # sampling of an autoencoder's latents
    TRAIN_GUIDANCE = 8  # scale of a guided teacher
    TRAIN_CAPTION = 9  # which of an image's captions
    FLASH_START = 10  # Flash Diffusion: the step of the teacher's grid at which the student stands
    FLASH_DMD_NOISE = 11
    FLASH_DMD_TIME = 12
    FLASH_ADV_NOISE = 13  # on the student's image before the discriminator sees it; FLASH_REAL_NOISE: on the real one
    FLASH_ADV_TIME = 14
    FLASH_START_NOISE = 15
    FLASH_REAL_NOISE = 16
    MASK = 17  # which pixels of an image are to be made


def _multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of a * b; int64 wraps modulo 2^64, so the masked bits are exact."""
    product = b * a
    return (product >> 32) & MASK, product & MASK


def philox(counter: list[Tensor], key: list[Tensor], rounds: int = 10) -> list[Tensor]:
    """Four 32-bit words (as int64) for four counter words and two key words, elementwise.

    >>> zero = torch.zeros(1, dtype=torch.int64)
    >>> [f"{int(word):08x}" for word in philox([zero] * 4, [zero] * 2)]
    ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(rounds):
        high0, low0 = _multiply(MULTIPLIERS[0], c0)
        high1, low1 = _multiply(MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + WEYL[0]) & MASK, (k1 + WEYL[1]) & MASK
    return [c0, c1, c2, c3]


def random_bits(seeds: Tensor, draw: Tensor | int, stream: int, count: int) -> Tensor:
    """(b, count) int64 holding 32 random bits each: row i depends on (seeds[i], draw[i], stream) alone.

    seeds: (b,) int64 from 0 to 2^63 - 1. draw: an int, or (b,) int64, 0 <= draw < 2^63.
    """
    seeds = seeds[:, None]
    draw = torch.as_tensor(draw, dtype=torch.int64, device=seeds.device).reshape(-1, 1)
    block = torch.arange(-(-count // 4), dtype=torch.int64, device=seeds.device)[None]  # 1 count/4
    shape = torch.broadcast_shapes(seeds.shape, draw.shape, block.shape)
    counter = [block, draw & MASK, draw >> 32, torch.full_like(block, stream)]
    words = philox([each.expand(shape) for each in counter], [seeds & MASK, seeds >> 32])
    return torch.stack(words, dim=-1).flatten(1)[:, :count]


def uniform(seeds: Tensor, draw: Tensor | int, shape: tuple[int, ...] = (), stream: int = 0) -> Tensor:
    """(b, *shape) float64 in (0, 1), one row a seed; arguments as in `random_bits`."""
    bits = random_bits(seeds, draw, stream, math.prod(shape))
    return ((bits.double() + 0.5) * 2.0**-32).view(-1, *shape)


def normal(seeds: Tensor, draw: Tensor | int, shape: tuple[int, ...], stream: int = 0) -> Tensor:
    """(b, *shape) float32 standard normal, one row a seed (Box and Muller 1958).

    The transform runs in float64, so that devices agree after rounding to float32.
    """
    if seeds.device.type == "mps":  # which has no float64
        draw = draw.cpu() if isinstance(draw, Tensor) else draw
        return normal(seeds.cpu(), draw, shape, stream).to(seeds.device)
    count = math.prod(shape)
    u = uniform(seeds, draw, (2 * -(-count // 2),), stream)
    radius, angle = (-2 * u[:, 0::2].log()).sqrt(), 2 * math.pi * u[:, 1::2]
    pairs = torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1).flatten(1)
    return pairs[:, :count].float().view(-1, *shape)

"""The pixel codec is exact on uint8, and forgiving with what a sampler returns."""

import pytest
import torch

from libs.codecs import PixelCodec, make_codec
from libs.errors import UserError


def test_every_level_survives_the_round_trip():
    levels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).repeat(2, 1, 1, 3)
    levels[1] = 255 - levels[1]
    x = PixelCodec().encode(levels)
    assert x.dtype == torch.float32
    assert (x.min(), x.max()) == (-1, 1)
    assert torch.equal(PixelCodec().decode(x), levels)


def test_layout_is_channels_first_inside():
    images = torch.zeros(2, 4, 5, 3, dtype=torch.uint8)
    images[1, 2, 3, 0] = 255
    x = PixelCodec().encode(images)
    assert x.shape == (2, 3, 4, 5)
    assert x[1, 0, 2, 3] == 1
    assert (x == -1).sum() == x.numel() - 1


def test_decode_rounds_to_the_nearest_level_and_clamps():
    x = torch.tensor([-7.0, -1 + 0.49 / 127.5, -1 + 0.51 / 127.5, 0.999, 7.0]).view(1, 1, 1, 5)
    assert PixelCodec().decode(x).flatten().tolist() == [0, 0, 1, 255, 255]


def test_decode_computes_in_float32_whatever_comes_in():
    x = torch.linspace(-1, 1, 64).view(1, 1, 8, 8)
    coarse = x.to(torch.bfloat16)
    assert torch.equal(PixelCodec().decode(coarse), PixelCodec().decode(coarse.float()))


def test_latent_shape_is_the_shape_of_an_encoded_image():
    x = PixelCodec().encode(torch.zeros(1, 8, 8, 1, dtype=torch.uint8))
    assert PixelCodec().latent_shape(8, 1) == x.shape[1:]


def test_make_codec_by_name():
    assert isinstance(make_codec({"name": "pixel"}), PixelCodec)
    with pytest.raises(UserError, match="codec.name='pixels' is unknown; choose from pixel"):
        make_codec({"name": "pixels"})


def test_bgr_is_the_order_of_the_model_alone():
    images = torch.randint(0, 256, (2, 4, 5, 3), dtype=torch.uint8)
    codec = make_codec({"name": "pixel", "order": "bgr"})
    x = codec.encode(images)
    assert torch.equal(x, PixelCodec().encode(images)[:, [2, 1, 0]])
    assert x.is_contiguous()
    assert torch.equal(codec.decode(x), images)
    with pytest.raises(UserError, match="codec.order='bgr' needs 3 channels; data.channels=1"):
        codec.latent_shape(8, 1)
    with pytest.raises(UserError, match="codec.order='grb' is unknown; choose from rgb, bgr"):
        make_codec({"name": "pixel", "order": "grb"})

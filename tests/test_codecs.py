"""The pixel codec is exact on uint8, and forgiving with what a sampler returns; the latents' codec reads every file."""

import pytest
import torch

from libs.autoencoder_checkpoint import autoencoder_config, diffusers_names
from libs.codecs import KLCodec, PixelCodec, make_codec
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


def test_fields_of_another_codec():
    kl = {"pretrained": "nowhere", "scale_factor": 1.0}
    with pytest.raises(UserError, match=r"^codec.name='pixel': it takes no codec.pretrained, .* its fields are order$"):
        make_codec({"name": "pixel", **kl})
    with pytest.raises(UserError, match=r"^codec.name='kl': it takes no codec.order, .*pretrained, scale_factor, "):
        make_codec({"name": "kl", **kl, "order": "bgr"})
    with pytest.raises(UserError, match=r"^codec.name='kl': codec.pretrained is missing"):
        make_codec({"name": "kl"})


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


# ---- the autoencoder's moments, and U-ViT's file of it


def tiny_vae(**options):
    """diffusers' autoencoder in the architecture of latent diffusion, small."""
    from diffusers import AutoencoderKL

    sizes = {"block_out_channels": (32, 32, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 32}
    sizes |= options
    levels = len(sizes["block_out_channels"])
    return AutoencoderKL(down_block_types=("DownEncoderBlock2D",) * levels,
                         up_block_types=("UpDecoderBlock2D",) * levels, **sizes).eval()


def original_names(vae):
    """The weights under the names of latent diffusion's code, written down here anew, part by part."""
    levels = len(vae.config.block_out_channels)
    parts = {"quant_conv": vae.quant_conv, "post_quant_conv": vae.post_quant_conv}
    for side, net in ("encoder", vae.encoder), ("decoder", vae.decoder):
        parts |= {f"{side}.conv_in": net.conv_in, f"{side}.norm_out": net.conv_norm_out,
                  f"{side}.conv_out": net.conv_out}
        resnets = {f"{side}.mid.block_{i + 1}": block for i, block in enumerate(net.mid_block.resnets)}
        attention = net.mid_block.attentions[0]
        for name, part in ("norm", attention.group_norm), ("q", attention.to_q), ("k", attention.to_k), \
                          ("v", attention.to_v), ("proj_out", attention.to_out[0]):
            parts[f"{side}.mid.attn_1.{name}"] = part
        blocks = vae.encoder.down_blocks if side == "encoder" else vae.decoder.up_blocks
        for run, block in enumerate(blocks):
            # up.0 is the last to run
            name = f"encoder.down.{run}" if side == "encoder" else f"decoder.up.{levels - 1 - run}"
            resnets |= {f"{name}.block.{j}": resnet for j, resnet in enumerate(block.resnets)}
            for resampled in getattr(block, "downsamplers", None) or getattr(block, "upsamplers", None) or ():
                parts[f"{name}.{'down' if side == 'encoder' else 'up'}sample.conv"] = resampled.conv
        for name, resnet in resnets.items():
            parts |= {f"{name}.{part}": getattr(resnet, part) for part in ("norm1", "conv1", "norm2", "conv2")}
            if resnet.conv_shortcut is not None:
                parts[f"{name}.nin_shortcut"] = resnet.conv_shortcut
    tensors = {f"{name}.{kind}": tensor for name, part in parts.items() for kind, tensor in part.named_parameters()}
    return {name: tensor[:, :, None, None] if tensor.dim() == 2 else tensor for name, tensor in tensors.items()}


@pytest.fixture
def vae(tmp_path):
    made = tiny_vae()
    made.save_pretrained(tmp_path / "vae")
    torch.save(original_names(made), tmp_path / "autoencoder_kl.pth")
    return made


def test_u_vits_file_gives_the_network_that_diffusers_gives(tmp_path, vae):
    ours, theirs = (KLCodec(str(tmp_path / name), 0.5) for name in ("autoencoder_kl.pth", "vae"))
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    assert ours.latent_shape(16, 3) == theirs.latent_shape(16, 3) == (4, 4, 4)
    assert torch.equal(ours.moments(images), theirs.moments(images))
    z = theirs.encode(images)
    assert torch.equal(ours.decode(z), theirs.decode(z))


def test_the_published_file_has_every_name_and_shape():
    """Stable Diffusion's autoencoder: 248 tensors, 83.65 M parameters."""
    sizes = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
    with torch.device("meta"):
        full = tiny_vae(**sizes)
    published = original_names(full)
    assert len(published) == 248
    assert sum(tensor.numel() for tensor in published.values()) == 83_653_863
    for name, shape in {"decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
                        "encoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
                        "decoder.up.3.block.2.conv2.bias": (512,), "quant_conv.weight": (8, 8, 1, 1),
                        "encoder.down.2.downsample.conv.weight": (512, 512, 3, 3)}.items():
        assert published[name].shape == shape
    config = autoencoder_config(published)
    assert {name: config[name] for name in sizes} == sizes
    wanted = {name: tensor.shape for name, tensor in full.state_dict().items()}
    assert {name: tensor.shape for name, tensor in diffusers_names(published).items()} == wanted


def test_files_that_hold_no_autoencoder(tmp_path, vae):
    def refused(line):
        with pytest.raises(UserError, match=line) as caught:
            KLCodec(str(path), 1.0)
        assert str(caught.value).startswith(f"codec.pretrained='{path}'")
        assert "\n" not in str(caught.value)

    path = tmp_path / "nowhere.pth"
    refused("no such file")
    path = tmp_path / "a.pth"
    tensors = original_names(vae)
    torch.save({name: tensor for name, tensor in tensors.items() if "attn_1.q" not in name}, path)
    refused(r"no autoencoder of latent diffusion .*Missing key.*to_q")
    torch.save(tensors | {"loss.logvar": torch.zeros(())}, path)
    refused(r"no autoencoder of latent diffusion .*Unexpected key.*loss\.logvar")
    torch.save({"weight": torch.zeros(1)}, path)
    refused("no autoencoder of latent diffusion")
    torch.save(vae, path)
    refused("holds more than tensors")


def test_moments_are_what_images_are_encoded_by(tmp_path, vae):
    codec = KLCodec(str(tmp_path / "vae"), 0.3, chunk=2)
    images = torch.randint(0, 256, (5, 16, 16, 3), dtype=torch.uint8)
    moments = codec.moments(images)
    assert moments.shape == (5, 8, 4, 4)
    assert moments.dtype == torch.float32
    noise = torch.randn(5, 4, 4, 4)
    assert torch.equal(codec.encode_moments(moments, noise), codec.encode(images, noise))
    assert torch.equal(codec.encode_moments(moments), codec.encode(images))
    mean, logvar = moments.chunk(2, dim=1)
    torch.testing.assert_close(codec.encode_moments(moments, noise), 0.3 * (mean + logvar.exp().sqrt() * noise))


def test_log_variances_are_clamped(tmp_path, vae):
    with torch.no_grad():
        vae.quant_conv.bias[4:6], vae.quant_conv.bias[6:] = 1000, -1000
    vae.save_pretrained(tmp_path / "vae")
    moments = KLCodec(str(tmp_path / "vae"), 1.0).moments(torch.zeros(1, 16, 16, 3, dtype=torch.uint8))
    assert (moments[:, 4:6] == 20).all()
    assert (moments[:, 6:] == -30).all()

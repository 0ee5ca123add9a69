"""Files that describe themselves, foreign files, and everything a broken file gets."""

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from libs import build
from libs import config as config_files
from libs.backbones import UNet2D, UViT
from libs.checkpoint import load_backbone, read, resolve, save_backbone
from libs.codecs import KLCodec
from libs.errors import UserError

TINY = {"name": "uvit", "img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 64, "depth": 2, "num_heads": 1}


def tiny():
    torch.manual_seed(1)
    return UViT(**{k: v for k, v in TINY.items() if k != "name"}).eval()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "tiny.safetensors"
    save_backbone(path, tiny().state_dict(), {"backbone": TINY})
    return path


def same_function(a, b):
    x, t = torch.randn(2, 3, 8, 8), torch.tensor([1.0, 500.0])
    return torch.equal(a(x, t), b(x, t))


def test_round_trip(saved, tmp_path):
    assert same_function(load_backbone(saved), tiny())
    assert not load_backbone(saved).training
    save_backbone(saved, tiny().state_dict(), {"backbone": TINY}, dtype=torch.float16)
    tensors, description = read(saved)
    assert description == {"backbone": TINY}
    assert {t.dtype for t in tensors.values()} == {torch.float16}
    assert next(load_backbone(saved).parameters()).dtype == torch.float32
    assert [path.name for path in tmp_path.iterdir()] == ["tiny.safetensors"]  # no temporary file stays


def test_uvit_pth(tmp_path):
    """A published file: a bare state dict, no word of the architecture."""
    torch.save(tiny().state_dict(), tmp_path / "uvit.pth")
    assert same_function(load_backbone(tmp_path / "uvit.pth"), tiny())


def wrapped(net):
    return nn.ModuleDict({"module": net}).state_dict()  # the names that DistributedDataParallel gives


@pytest.mark.parametrize("section", [None, TINY])
def test_pth_of_a_network_inside_distributed_data_parallel(tmp_path, section):
    torch.save(wrapped(tiny()), tmp_path / "uvit.pth")
    assert same_function(load_backbone(tmp_path / "uvit.pth", section), tiny())
    torch.save(wrapped(tiny()) | {"ema": torch.zeros(1)}, tmp_path / "both.pth")
    with pytest.raises(UserError, match="not a U-ViT's|of another architecture"):
        load_backbone(tmp_path / "both.pth", section)


def test_diffusers_folder(tmp_path):
    net = UNet2D(sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
                 down_block_types=("DownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "UpBlock2D")).eval()
    net.save_pretrained(tmp_path / "pipe" / "unet")
    for path in (tmp_path / "pipe", tmp_path / "pipe" / "unet"):
        assert same_function(load_backbone(path), net)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "config.json").write_text(json.dumps({"_class_name": "UNet3DConditionModel"}))
    with pytest.raises(UserError, match="holds a UNet3DConditionModel; a UNet2DModel can be loaded"):
        load_backbone(tmp_path / "other")
    with pytest.raises(UserError, match="no training folder and no diffusers folder"):
        load_backbone(tmp_path)


def test_code_in_a_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "ran"), "w"))

    torch.save({"w": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(UserError, match="would run code"):
        load_backbone(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()


def test_broken_files(saved, tmp_path):
    whole = saved.read_bytes()
    for size in (0, 5, 200, len(whole) - 10):
        saved.write_bytes(whole[:size])
        with pytest.raises(UserError, match="cannot be read"):
            load_backbone(saved)
    torch.save(tiny().state_dict(), tmp_path / "a.pth")
    (tmp_path / "a.pth").write_bytes((tmp_path / "a.pth").read_bytes()[:1000])
    with pytest.raises(UserError, match="cannot be read"):
        load_backbone(tmp_path / "a.pth")
    torch.save([1, 2], tmp_path / "list.pt")
    with pytest.raises(UserError, match="not a state dict"):
        load_backbone(tmp_path / "list.pt")
    (tmp_path / "a.ckpt").write_bytes(b"x")
    with pytest.raises(UserError, match=r"want .safetensors, .pth, .pt"):
        load_backbone(tmp_path / "a.ckpt")
    with pytest.raises(UserError, match="no such file"):
        load_backbone(tmp_path / "absent.pth")


def test_wrong_architecture(saved, tmp_path):
    with pytest.raises(UserError, match=r"its backbone.depth is 2, the config's 4"):
        load_backbone(saved, {**TINY, "depth": 4})
    torch.save(tiny().state_dict(), tmp_path / "u.pth")
    with pytest.raises(UserError, match=r"u.pth is of another architecture: in_blocks.1.norm1.weight is missing"):
        load_backbone(tmp_path / "u.pth", {**TINY, "depth": 4})
    save_file({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.safetensors")
    with pytest.raises(UserError, match="not a U-ViT's"):
        load_backbone(tmp_path / "other.safetensors")


def test_resolve(saved, tmp_path):
    assert resolve(str(saved)) == saved
    assert resolve("cifar10_uvit_tiny").name == "cifar10_uvit_tiny.safetensors"
    with pytest.raises(UserError, match=r"checkpoint='nothing' is not there; .* cifar10_unet_v, .* cifar10_uvit_tiny"):
        resolve("nothing")
    with pytest.raises(UserError, match="checkpoint is empty"):
        resolve("")
    run = tmp_path / "run"
    for step in (10, 200):
        (run / f"ckpts/{step:08d}").mkdir(parents=True)
        save_backbone(run / f"ckpts/{step:08d}/backbone_ema.safetensors", tiny().state_dict(), {"backbone": TINY})
    assert resolve(str(run)).parent.name == "00000200"


@pytest.mark.parametrize(("config", "millions", "tensors"), [
    ("configs/cifar10_uvit_tiny.py", 11.117664, 164), ("configs/cifar10_unet.py", 20.123139, 329),
])
def test_released_checkpoints(config, millions, tensors):
    config = config_files.load(config)
    net, description = build.load_model(config)
    assert sum(p.numel() for p in net.parameters()) == round(millions * 1e6)
    assert len(net.state_dict()) == tensors
    assert description == json.loads(json.dumps(build.describe(config)))  # the file says what the config says


def test_kl_codec(tmp_path):
    """diffusers' autoencoder: the latents' scale goes in and out, noise samples them, seeds do not mix."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2,
                        up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=4, norm_num_groups=4).eval()
    vae.save_pretrained(tmp_path / "vae")
    codec = KLCodec(str(tmp_path / "vae"), scale_factor=0.5, chunk=2)
    images = torch.randint(0, 256, (3, 16, 16, 3), dtype=torch.uint8)
    assert codec.latent_shape(16, 3) == (4, 8, 8)
    z = codec.encode(images)
    posterior = vae.encode(images.permute(0, 3, 1, 2) / 127.5 - 1).latent_dist
    assert torch.allclose(z, 0.5 * posterior.mean, atol=1e-5)
    noise = torch.randn_like(z)
    assert torch.allclose(codec.encode(images, noise), 0.5 * (posterior.mean + posterior.std * noise), atol=1e-5)
    pixels = vae.decode(z / 0.5).sample
    assert torch.equal(codec.decode(z), ((pixels + 1) * 127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1))
    with pytest.raises(UserError, match="no AutoencoderKL there"):
        KLCodec(str(tmp_path / "absent"), 1.0)

"""Training of an autoencoder by train.py: its loss, what it leaves behind, and what it refuses."""

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch.distributions import Normal, kl_divergence

import sample
import train
from libs.codecs import KLCodec
from libs.random import Stream, normal
from libs.training.autoencoder import Autoencoder, AutoencoderLoss, above
from libs.training.state import Checkpoints

TINY = ("--config=configs/emoji32_autoencoder.py", "--config.compute.device=cpu", "--config.compute.rows=4",
        "--config.data.image_size=16", "--config.backbone.block_out_channels=4,8,8",
        "--config.backbone.norm_num_groups=2", "--config.backbone.latent_channels=2", "--config.autoencoder.hold_out=4",
        "--config.train.steps=6", "--config.train.batch_size=4", "--config.train.warmup=0",
        "--config.train.log_every=1", "--config.train.save_every=3", "--config.train.preview_every=3",
        "--config.train.preview_images=2")


def make_pictures(folder, count=14):
    """Smooth random colours, 16 x 16."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (2, 2, 3), dtype=np.uint8))
        coarse.resize((16, 16), Image.Resampling.BILINEAR).save(folder / f"{i:02d}.png")
    return folder


def fit(data, workdir, *more):
    assert train.main([*TINY, f"--config.data.path={data}", f"--workdir={workdir}", *more]) == 0
    return workdir


def rows_of(workdir):
    return [json.loads(line) for line in (workdir / "stats.jsonl").read_text().splitlines()]


def last_of(workdir, name):
    return [row[name] for row in rows_of(workdir) if name in row][-1]


def error_of(ran):
    assert ran.status == 2
    [line] = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.startswith("error")]
    assert "Traceback" not in ran.stderr
    return line


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    return make_pictures(tmp_path_factory.mktemp("data") / "pictures")


@pytest.fixture(scope="module")
def trained(pictures, tmp_path_factory):
    return fit(pictures, tmp_path_factory.mktemp("trained"))


def read(files):
    return torch.stack([torch.from_numpy(np.array(Image.open(file))) for file in files])


def files_of(folder):
    """(those that are learnt from, those that are held out)."""
    files = sorted(folder.glob("*.png"))
    return [file for i, file in enumerate(files) if i % 4 != 3], files[3::4]


def test_loss_of_a_tiny_tensor_by_hand():
    x, reconstruction = torch.tensor([[[[1.0, -1.0]]], [[[0.0, 0.0]]]]), torch.tensor([[[[0.5, 0.0]]], [[[0.0, 0.0]]]])
    mean, logvar = torch.tensor([[[[1.0]]], [[[0.0]]]]), torch.tensor([[[[0.0]]], [[[math.log(4)]]]])
    loss = AutoencoderLoss(0.1, (1, 1, 1)).of(x, reconstruction, mean, logvar)
    # |0.5| and |-1|, KL 1 / 2; and none, KL (4 - 1 - log 4) / 2
    assert loss.tolist() == pytest.approx([0.75 + 0.1 * 0.5, 0.1 * 0.5 * (3 - math.log(4))])


def test_the_kl_term_is_that_of_two_gaussians():
    torch.manual_seed(1)
    mean, logvar = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4)
    kl = kl_divergence(Normal(mean, (0.5 * logvar).exp()), Normal(0.0, 1.0)).flatten(1).mean(dim=1)
    x = torch.zeros(3, 3, 16, 16)
    torch.testing.assert_close(AutoencoderLoss(1.0, (2, 4, 4)).of(x, x, mean, logvar), kl)


def test_learns(pictures, tmp_path):
    fit(pictures, tmp_path, "--config.train.steps=40", "--config.train.lr=1e-2", "--config.train.log_every=8",
        "--config.train.save_every=40", "--config.train.preview_every=0")
    first, *_, last = [row["loss"] for row in rows_of(tmp_path) if "loss" in row]
    assert last < 0.85 * first


def test_the_folder_is_a_codec_and_its_scale_factor_fits(trained, pictures):
    scale = last_of(trained, "scale_factor")
    assert json.loads((trained / "autoencoder" / "config.json").read_text())["scaling_factor"] == scale
    codec = KLCodec(str(trained / "autoencoder"), scale)
    assert codec.latent_shape(16, 3) == (2, 4, 4)

    weights = Checkpoints(trained / "ckpts").load(6).ema  # the averaged ones
    assert all(torch.equal(tensor, weights[f"vae.{name}"]) for name, tensor in codec.vae.state_dict().items())

    learned = read(files_of(pictures)[0]).repeat(200, 1, 1, 1)
    seeds = torch.arange(len(learned))
    z = codec.encode(learned, normal(seeds, 0, (2, 4, 4), Stream.ENCODE))
    assert float(z.std()) == pytest.approx(1, abs=0.01)


def test_psnr_is_that_of_the_held_out_pictures(trained, pictures):
    codec, images = KLCodec(str(trained / "autoencoder"), 1.0), read(files_of(pictures)[1])
    error = (codec.decode(codec.encode(images)).double() - images.double()).square().mean()
    assert last_of(trained, "psnr") == pytest.approx(10 * math.log10(255**2 / error), abs=1e-3)
    assert (trained / "previews" / "00000006.png").is_file()


def test_held_out_pictures_are_not_learnt_from(trained, pictures, tmp_path):
    other = make_pictures(tmp_path / "pictures")
    learned, held = files_of(other)
    for file in held:
        Image.new("RGB", (16, 16), "green").save(file)
    again = fit(other, tmp_path / "run")
    one, two = (Checkpoints(workdir / "ckpts").load(6).weights for workdir in (trained, again))
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert last_of(again, "psnr") != last_of(trained, "psnr")
    Image.new("RGB", (16, 16), "green").save(learned[0])
    changed = Checkpoints(fit(other, tmp_path / "changed") / "ckpts").load(6).weights
    assert not all(torch.equal(one[name], changed[name]) for name in one)


def test_goes_on_bit_for_bit(trained, pictures, tmp_path, run_main):
    argv = [*TINY, f"--config.data.path={pictures}", f"--workdir={tmp_path}"]
    assert run_main(train.main, *argv, "--config.train.max_minutes=0.0000001").status == 0
    assert Checkpoints(tmp_path / "ckpts").steps() == [1]
    assert run_main(train.main, *argv).status == 0
    one, two = (Checkpoints(workdir / "ckpts").load(6) for workdir in (trained, tmp_path))
    assert all(torch.equal(one.weights[name], two.weights[name]) for name in one.weights)
    assert all(torch.equal(one.ema[name], two.ema[name]) for name in one.ema)
    assert last_of(trained, "scale_factor") == last_of(tmp_path, "scale_factor")
    assert (trained / "autoencoder/diffusion_pytorch_model.safetensors").read_bytes() == (
        tmp_path / "autoencoder/diffusion_pytorch_model.safetensors").read_bytes()


def test_starts_from_another_run(trained, pictures, tmp_path):
    workdir = fit(pictures, tmp_path, f"--checkpoint={trained}", "--config.train.steps=1", "--config.train.lr=1e-9")
    old, new = Checkpoints(trained / "ckpts").load(6).ema, Checkpoints(tmp_path / "ckpts").load(1).weights
    assert workdir == tmp_path
    torch.testing.assert_close(new, old, atol=1e-6, rtol=0)


def test_decodes_a_sample_of_the_latents():
    net = Autoencoder(latent_channels=2, block_out_channels=(4, 8), layers_per_block=1, norm_num_groups=2)
    x, noise = torch.rand(2, 3, 16, 16), torch.randn(2, 2, 8, 8)
    reconstruction, mean, logvar = net(x, noise)
    torch.testing.assert_close(reconstruction, net.decode(mean + logvar.exp().sqrt() * noise))
    assert mean.shape == logvar.shape == (2, *net.latent_shape(16))
    assert logvar.mean() < -5  # nearly no noise before training


def test_a_picture_of_pairs():
    """Five images in rows of four: their columns stay, and the last row is filled up."""
    images, out = (torch.full((5, 32, 32, 3), value, dtype=torch.uint8) for value in (10, 20))
    picture = above(images, out)
    assert picture.shape == (2 + 4 * 34, 2 + 4 * 34, 3)
    assert picture[18::34, 18, 0].tolist() == [10, 20, 10, 20]
    assert picture[18 + 2 * 34, 18::34, 0].tolist() == [10, 255, 255, 255]


@pytest.mark.parametrize(("flag", "said"), [
    ("--config.autoencoder.hold_out=1", "--config.autoencoder.hold_out=1 must be at least 2"),
    ("--config.autoencoder.hold_out=15", "--config.autoencoder.hold_out=15: the data set has only 14 images"),
    ("--config.autoencoder.kl_weight=-1", "--config.autoencoder.kl_weight=-1.0 must not be negative"),
    ("--config.train.eval_every=5", "eval.metrics names nothing to measure"),
    ("--config.backbone.norm_num_groups=3", "backbone: "),
    ("--config.data.image_size=14", "--config.data.image_size=14 must be a multiple of 4"),
    ("--config.cond.kind=label", "want pixel and none"),
    ("--checkpoint=assets/checkpoints/digits_uvit.safetensors", "is of another architecture"),
])
def test_refuses(flag, said, pictures, tmp_path, run_main):
    ran = run_main(train.main, *TINY, f"--config.data.path={pictures}", f"--workdir={tmp_path / 'run'}", flag)
    assert said in error_of(ran)
    assert not (tmp_path / "run" / "autoencoder").exists()
    assert not (tmp_path / "run" / "config.json").exists()


def test_is_nothing_to_sample_from(trained, tmp_path, run_main):
    ran = run_main(sample.main, *TINY[:7], f"--checkpoint={trained}", "--seeds=0-1", f"--out={tmp_path}")
    assert "backbone.name='autoencoder_kl'" in error_of(ran)

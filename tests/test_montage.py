"""Captioned rows of images, from tensors, folders and the states of a sampler."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from libs import config as config_files
from libs import montage as montages
from libs.build import describe, make_chain
from libs.checkpoint import build_backbone
from libs.data.images import save_png
from libs.errors import UserError
from libs.montage import capture_indices, captures, montage, read_images
from libs.random import Stream, normal
from libs.samplers import SAMPLERS


def pictures(n, size, channels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 200, (n, size, size, channels), generator=generator, dtype=torch.uint8)


def cells(picture, rows, columns, size, pad=4):
    """The images of a montage and what stands left of them."""
    step = size + pad
    assert len(picture) == pad + rows * step
    grid = picture[:, -(pad + columns * step):]
    images = [[grid[pad + i * step:(i + 1) * step, pad + j * step:(j + 1) * step] for j in range(columns)]
              for i in range(rows)]
    return images, picture[:, :-(pad + columns * step)]


@pytest.mark.parametrize(("size", "factor"), [(8, 8), (24, 3), (64, 1), (100, 1)])
def test_every_image_has_its_place(size, factor):
    """Small ones are enlarged by equal pixels; grey beside colour becomes colour."""
    grey, colour = pictures(3, size, 1), pictures(3, size, 3, seed=1)
    picture = montage([("grey", grey), ("colour", colour)])
    assert picture.dtype == torch.uint8
    shown, captions = cells(picture, 2, 3, size * factor)
    for i, images in enumerate((grey, colour)):
        for j in range(3):
            enlarged = images[j].repeat_interleave(factor, 0).repeat_interleave(factor, 1)
            assert torch.equal(shown[i][j], enlarged.expand(-1, -1, 3))
    assert montage([("grey", grey)]).shape[2] == 1
    assert captions[0].min() == 255


@pytest.mark.parametrize("size", [8, 64, 256])
@pytest.mark.parametrize("caption", ["8 steps", "student of 8 steps, guided by 1.5, clipped at ±1.2, of seeds in order",
                                     "a very long caption " * 12, "w" * 90])
def test_a_caption_stands_whole_beside_its_own_row(caption, size):
    """Black on white, never outside its row, with a margin, and no row has another's text."""
    rows = [(caption, pictures(2, size, 1)), ("", pictures(2, size, 1)), (caption, pictures(2, size, 1))]
    enlarged = max(size, 64)
    _, captions = cells(montage(rows), 3, 2, enlarged)
    captions = captions[4:].unflatten(0, (3, enlarged + 4))
    assert captions[0].min() < 30
    assert captions[1].min() == 255
    assert torch.equal(captions[0], captions[2])
    ink = captions[0, :, :, 0] < 255
    assert not ink[0].any()
    assert not ink[-1].any()
    assert not ink[:, :2].any()
    assert not ink[:, -2:].any()


def test_rows_must_match():
    for other, text in ((pictures(2, 8, 1), "2 x 8 x 8"), (pictures(3, 9, 1), "3 x 9 x 9")):
        with pytest.raises(UserError, match=f"rows of a picture must match: 'b' has {text} .*, 'a' 3 x 8 x 8"):
            montage([("a", pictures(3, 8, 3)), ("b", other)])


# --- folders ----------------------------------------------------------------------------------------------

@pytest.fixture
def folder(tmp_path):
    """A function that makes a folder of images by seed, called as sample.py (or others) call them."""
    def make(name, images, pattern="{:06d}.png"):
        for seed, image in enumerate(images):
            save_png(tmp_path / name / pattern.format(seed), image)
        return tmp_path / name

    return make


def test_command(folder, tmp_path, run_main):
    """Rows in the order named, columns in the seeds' order; the caption may hold an equals sign."""
    many, few = pictures(10, 8, 1), pictures(4, 8, 1, seed=1)
    a, b = folder("a", many), folder("b", few, "{}.png")
    save_png(a / "grid.png", pictures(1, 99, 3)[0])
    out = tmp_path / "new" / "steps.png"
    ran = run_main(montages.main, "--seeds=3,0-1", f"1,024 steps={a}", f"w = 2={b}", f"--out={out}")
    assert ran.status == 0, ran.stderr
    expect = montage([("1,024 steps", many[[3, 0, 1]]), ("w = 2", few[[3, 0, 1]])])
    assert np.array_equal(np.asarray(Image.open(out)), expect[:, :, 0].numpy())


BAD = [
    (["a={a}"], "has no image of seed 4, 5, 6, 7; it has 4 with a seed as name, such as 000007.png"),
    (["--seeds=0-99", "a={a}"], "has no image of seed 4, 5, 6, 7, 8, 9, 10, 11 and 88 more; it has 4"),
    (["--seeds=0-3", "a={a}", "b={b}"], "rows of a picture must match: 'b' has 4 x 9 x 9"),
    (["--seeds=0-3", "a={mixed}"], "000002.png and {mixed}/000000.png are of different size or number of channels"),
    (["--seeds=0-3", "a={broken}"], "{broken}/000001.png cannot be read as an image"),
    (["--seeds=0-3", "a={a}/none"], "'{a}/none' is not a folder"),
    (["--seeds=0-3", "{a}"], "'{a}' is no row; a row is written 'CAPTION=FOLDER'"),
    (["--seeds=3-0", "a={a}"], "--seeds=3-0: the range 3-0 is reversed"),
    (["--seeds=0-3"], "no rows given; each is written 'CAPTION=FOLDER'"),
    (["--seeds=0-3", "a={a}", "--out=x.jpg"], "--out=x.jpg must end in .png"),
    (["--seeds=0-3", "a={a}", "--columns=3"], "--columns: no such flag; choose from --out, --seeds"),
]


@pytest.mark.parametrize(("argv", "message"), BAD, ids=[message for _, message in BAD])
def test_bad_input(folder, tmp_path, run_main, argv, message):
    paths = {"a": folder("a", pictures(4, 8, 1)), "b": folder("b", pictures(4, 9, 1)),
             "mixed": folder("mixed", pictures(4, 8, 1)), "broken": folder("broken", pictures(4, 8, 1))}
    shutil.copy(paths["b"] / "000002.png", paths["mixed"])
    (paths["broken"] / "000001.png").write_bytes(b"no image")
    out = tmp_path / "out.png"
    ran = run_main(montages.main, f"--out={out}", *(arg.format(**paths) for arg in argv))
    assert ran.status == 2
    assert ran.stderr.count("\n") == 1, ran.stderr
    assert message.format(**paths) in ran.stderr
    assert not out.exists()


def test_a_palette_is_colour_and_bits_are_grey(tmp_path):
    Image.new("P", (8, 8)).save(tmp_path / "0.png")
    Image.new("1", (8, 8), 1).save(tmp_path / "1.png")
    assert read_images(tmp_path, [0]).shape == (1, 8, 8, 3)
    assert torch.equal(read_images(tmp_path, [1]), torch.full((1, 8, 8, 1), 255, dtype=torch.uint8))


# --- states of a sampler ----------------------------------------------------------------------------------

def tiny_chain(methods="", policy=None, **sampler):
    config = config_files.load("configs/digits_uvit.py" + methods).unlock()
    config.backbone.update(embed_dim=24)
    config.policy.update(policy or {})
    config.compute.rows = 4
    config.sampler.update(cfg_scale=1.0, **sampler)
    torch.manual_seed(0)
    return make_chain(config, build_backbone(config.backbone).eval(), describe(config), torch.device("cpu"))


SEEDS, LABELS = [5, 0, 900, 3, 17, 8], [0, 1, 2, 3, 4, 5]


def test_captures_are_the_states():
    """Noise, the states of shorter runs on the same grid, and the images themselves, in groups of the chain's rows."""
    chain = tiny_chain(steps=8)
    rows = captures(chain, SEEDS, LABELS, capture_indices(chain, 5))
    assert [caption for caption, _ in rows] == ["t = 1", "t = 0.75", "t = 0.5", "t = 0.25", "t = 0"]
    assert all(images.shape == (6, 8, 8, 1) for _, images in rows)
    (_, images), = chain.images(SEEDS, LABELS, 6)
    assert torch.equal(rows[-1][1], images)
    ts = chain.ts
    for index, (_, states) in zip((2, 4, 6), rows[1:-1], strict=True):
        chain.ts = ts[:index + 1]
        (_, images), = chain.images(SEEDS, LABELS, 6)
        assert torch.equal(states, images)
    noise = normal(torch.tensor(SEEDS), 0, chain.shape, Stream.START)
    assert torch.equal(rows[0][1], chain.codec.decode(noise))


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_captures_of_every_sampler_and_as_many_as_there_are(sampler):
    chain = tiny_chain(name=sampler, steps=5, order=3, grid="logsnr", t_end=1e-3)
    states = {"dpm_solver": 3, "dpm_solver_pp_singlestep": 3}.get(sampler, 6)
    rows = captures(chain, [1, 2], [3, 4], capture_indices(chain, states))
    assert len(rows) == states
    assert (rows[0][0], rows[-1][0]) == ("t = 1", "t = 0.001")
    assert torch.equal(rows[-1][1], next(chain.images([1, 2], [3, 4]))[1])
    for count in (states + 1, 1, -1):
        with pytest.raises(UserError, match=rf"--captures={count} must be 2 .* to {states} \(all states"):
            capture_indices(chain, count)


def test_captures_leave_the_chain_as_it_was():
    """Also one whose policy changes the state between the steps."""
    chain = tiny_chain(":encoder_propagation", {"key_steps": "every:2", "prior_noise": 0.1}, steps=4)
    assert chain.policy.after_step(torch.zeros(1)) is not None
    images = next(chain.images(SEEDS[:4], LABELS[:4]))[1]
    sampler = chain.sampler
    rows = captures(chain, SEEDS[:4], LABELS[:4], capture_indices(chain, 2))
    assert torch.equal(rows[-1][1], images)
    assert chain.sampler is sampler
    assert torch.equal(next(chain.images(SEEDS[:4], LABELS[:4]))[1], images)

"""Conditioners: what each makes, how they are joined, left out and refused."""

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from libs.backbones import UNet2D, UViT
from libs.checkpoint import build_backbone
from libs.conditioners import (
    Apply,
    Conditioners,
    Draws,
    Inpainting,
    Label,
    Sinusoids,
    SuperResolution,
    TextContext,
    make_conditioners,
)
from libs.conditioners.tasks import MASKS
from libs.errors import UserError

CPU = torch.device("cpu")
SECTION = {"kind": "image", "task": "super_resolution", "factor": 2, "masks": ("boxes",), "drop": 0.25,
           "num_classes": 0, "null_label": -1}


def draws(count, seed=0, first=0):
    return Draws(torch.full((count,), seed), torch.arange(first, first + count))


def images(count, size=8, channels=3):
    return torch.rand(count, channels, size, size, generator=torch.Generator().manual_seed(1)) * 2 - 1


def test_super_resolution_is_pillows_bicubic_of_the_mean():
    levels = torch.randint(0, 256, (1, 1, 8, 8), generator=torch.Generator().manual_seed(2))
    x = levels / 127.5 - 1
    small = levels.float().unflatten(2, (4, 2)).unflatten(4, (4, 2)).mean((3, 5)).round()[0, 0].numpy()
    enlarged = Image.fromarray(small.astype(np.float32), mode="F").resize((8, 8), Image.Resampling.BICUBIC)
    wanted = torch.from_numpy(np.array(enlarged)) / 127.5 - 1
    torch.testing.assert_close(SuperResolution(2, (8, 8))(x, draws(1))[0, 0], wanted.clamp(-1, 1), atol=1e-5, rtol=0)


def test_super_resolution_fits_the_network_and_shows_the_image_size():
    task = SuperResolution(4, (4, 4))
    assert task(images(2), draws(2)).shape == (2, 3, 4, 4)
    assert task.picture(images(2), draws(2)).shape == (2, 3, 8, 8)
    constant = torch.full((1, 3, 8, 8), 0.2)
    assert (task(constant, draws(1)) - 0.2).abs().max() < 1 / 127.5


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("size", [8, 32])
def test_masks_leave_some_pixels_and_make_some(kind, size):
    x = images(64, size)
    hole = Inpainting([kind])(x, draws(64))[:, :1]
    share = hole.mean((1, 2, 3))
    assert hole.unique().tolist() == [0, 1]
    assert 0 < share.min() <= share.max() < 1
    if kind == "halves":
        assert (share == 0.5).all()
        assert len({each.numpy().tobytes() for each in hole}) == 4
    if kind == "boxes":
        sides = [each[0].any(dim).sum() for each in hole for dim in (0, 1)]
        assert all(size // 4 <= side <= size * 3 // 4 + 1 for side in sides)
        assert all(each[0].sum() == each[0].any(0).sum() * each[0].any(1).sum() for each in hole)
    if kind != "halves":
        assert len({each.numpy().tobytes() for each in hole}) > 32


def test_inpainting_hides_the_hole_and_nothing_else():
    x, task = images(16), Inpainting()
    given = task(x, draws(16))
    hole = given[:, :1].bool()
    assert torch.equal(task.hole(x, draws(16)), hole)
    assert torch.equal(given[:, 1:], torch.where(hole, 0.0, x))
    other = torch.where(hole, -x, x)  # what lies in the hole cannot be told
    assert torch.equal(task(other, draws(16)), given)


def test_masks_are_a_function_of_seed_and_position():
    x, task = images(12), Inpainting()
    whole = task.hole(x, draws(12))
    assert torch.equal(torch.cat([task.hole(x[:5], draws(5)), task.hole(x[5:], draws(7, first=5))]), whole)
    assert not torch.equal(task.hole(x, draws(12, seed=1)), whole)
    kinds = [Inpainting([kind]).hole(x, draws(12)) for kind in MASKS]
    picked = torch.stack([(whole == each).all((1, 2, 3)) for each in kinds])
    assert (picked.sum(0) >= 1).all()
    assert (picked.sum(1) >= 1).all()  # all kinds occur


class Encoder:
    def __call__(self, texts):
        return torch.stack([torch.full((3, 4), float(len(text))) for text in texts])


def test_ranks_say_what_the_network_takes_them_for():
    made = Conditioners([
        Label(), Sinusoids(6, "size"), Apply(lambda x: x.mean((2, 3))), TextContext(Encoder()),
        Apply(lambda x: x.flatten(2)), SuperResolution(2, (8, 8)), Inpainting(),
    ])
    x = images(2)
    inputs = {"image": x, "label": torch.tensor([3, 4]), "size": torch.tensor([0.0, 5.0]), "text": ["a", "bird"]}
    cond = made(inputs, draws(2))
    assert {name: tuple(each.shape) for name, each in cond.items()} == {
        "y": (2,), "vector": (2, 9), "context": (2, 3, 68), "concat": (2, 7, 8, 8)}
    assert torch.equal(cond["y"], inputs["label"])
    assert torch.equal(cond["vector"][:, 6:], x.mean((2, 3)))
    assert cond["vector"][0, :6].tolist() == [1, 1, 1, 0, 0, 0]
    assert torch.equal(cond["context"][..., :4], Encoder()(inputs["text"]))
    assert torch.equal(cond["concat"][:, :3], SuperResolution(2, (8, 8))(x, draws(2)))


def test_conditions_are_left_out_at_their_rates_and_together():
    made = Conditioners([Label(0.2), Apply(lambda x: x.mean((2, 3)), rate=0.2), SuperResolution(2, (8, 8), rate=0.6),
                         Apply(lambda x: x[:, :1])], null_label=10)
    inputs = {"image": images(2000) + 3, "label": torch.zeros(2000, dtype=torch.long)}
    whole, some = made(inputs, draws(2000)), made(inputs, draws(2000), drop=True)
    null = made.unconditional(whole)
    dropped = some["y"] == 10
    assert abs(dropped.float().mean() - 0.2) < 0.03
    assert torch.equal(dropped, (some["vector"] == 0).all(1))
    without = (some["concat"][:, :3] == 0).all((1, 2, 3))
    assert abs(without.float().mean() - 0.6) < 0.04
    assert (without | ~dropped).all()  # who loses the rarer one loses the other too
    assert torch.equal(some["concat"][:, 3:], whole["concat"][:, 3:])  # rate 0
    assert torch.equal(some["concat"][~without], whole["concat"][~without])
    assert torch.equal(some["y"], torch.where(dropped, null["y"], whole["y"]))
    assert (null["y"] == 10).all()
    assert not null["vector"].any()
    assert not null["concat"][:, :3].any()
    assert torch.equal(null["concat"][:, 3:], whole["concat"][:, 3:])  # what is always there stays under guidance
    assert made.guidable
    assert Conditioners([Label(0.1)], null_label=10).guidable
    assert not Conditioners([Label(0.1)]).guidable
    assert not Conditioners([Label(), Apply(lambda x: x)], null_label=10).guidable
    always = made.always()
    assert torch.equal(always(inputs, draws(2000), drop=True)["concat"], whole["concat"])
    assert [each.rate for each in made.parts] == [0.2, 0.2, 0.6, 0.0]


@pytest.mark.parametrize(("parts", "message"), [
    ([Apply(lambda x: x[0, 0])], r"Apply gives \(8, 8\) float32 for b=3; want \(b,\) int64 labels, \(b, d\)"),
    ([Apply(lambda x: x[None])], r"Apply gives \(1, 3, 3, 8, 8\) float32 for b=3; want"),
    ([Apply(lambda x: x.mean((1, 2, 3)))], r"Apply gives \(3,\) float32 for b=3; want"),
    ([Apply(lambda x: (x > 0))], r"Apply gives \(3, 3, 8, 8\) bool for b=3; want"),
    ([Apply(lambda x: [x])], "Apply gives list for b=3; want"),
    ([Label(), Label()], "2 conditioners give labels; a network takes one"),
    ([Apply(lambda x: x), Apply(lambda x: x[:, :, 1:])],
     r"conditions \(3, 3, 8, 8\), \(3, 3, 7, 8\) cannot be joined as concat: only their sizes in dimension 1 may"),
    ([Sinusoids(4, "score")], "Sinusoids reads 'score', which is not there; choose from image, label"),
])
def test_conditions_that_fit_nothing_are_refused(parts, message):
    with pytest.raises(UserError, match=f"^cond.task: {message}"):
        Conditioners(parts)({"image": images(3), "label": torch.zeros(3, dtype=torch.long)}, draws(3))


@pytest.mark.parametrize(("section", "message"), [
    ({"task": ""}, "cond.task is empty; choose from super_resolution, inpainting, label"),
    ({"task": "colour"}, "cond.task='colour'"),
    ({"factor": 1}, "cond.factor=1 must be at least 2"),
    ({"task": "inpainting", "masks": ()}, "cond.masks is empty; choose from boxes, halves, strokes"),
    ({"task": "inpainting", "masks": ("circles",)}, "cond.masks='circles'"),
])
def test_bad_sections_are_refused_in_one_line(section, message):
    with pytest.raises(UserError) as caught:
        make_conditioners(SECTION | section, (8, 8), CPU)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def unet(**options):
    return UNet2D(**{
        "sample_size": 8, "in_channels": 6, "concat_channels": 3, "out_channels": 3, "layers_per_block": 1,
        "block_out_channels": (8, 16), "norm_num_groups": 8, "down_block_types": ("DownBlock2D",) * 2,
        "up_block_types": ("UpBlock2D",) * 2, **options}).eval()


def uvit(**options):
    return UViT(**{"img_size": 8, "patch_size": 2, "in_chans": 3, "concat_channels": 3, "embed_dim": 16, "depth": 2,
                   "num_heads": 2, **options}).eval()


@pytest.mark.parametrize("make", [unet, uvit])
def test_a_network_takes_the_condition_beside_x(make):
    net, x, t = make(), images(2), torch.tensor([3.0, 500.0])
    concat = images(2).flip(0)
    with torch.no_grad():
        out, null = net(x, t, concat=concat), net(x, t)
        assert out.shape == x.shape
        assert not torch.equal(out, null)
        assert torch.equal(null, net(x, t, concat=torch.zeros_like(concat)))
    first = net.conv_in if make is unet else net.patch_embed.proj
    assert first.weight.shape[1] == 6
    with torch.no_grad():
        first.weight[:, 3:] = 0
        assert torch.equal(net(x, t, concat=concat), net(x, t))
    for wrong in (concat[:, :2], concat[:1], concat[..., 1:]):
        with pytest.raises(ValueError, match="this network, built with concat_channels=3, takes"):
            net(x, t, concat=wrong)
    without = make(concat_channels=0, **({"in_channels": 3} if make is unet else {}))
    with pytest.raises(ValueError, match="built with concat_channels=0"):
        without(x, t, concat=concat)


def test_a_unet_keeps_its_condition_in_diffusers_own_folder(tmp_path):
    net = unet()
    net.save_pretrained(tmp_path)
    again = UNet2D.from_pretrained(tmp_path).eval()
    x, t = images(2), torch.tensor([3.0, 500.0])
    with torch.no_grad():
        assert torch.equal(again(x, t, concat=x), net(x, t, concat=x))
    assert (again.concat_channels, again.config.concat_channels) == (3, 3)
    with pytest.raises(UserError, match="concat_channels=6 must be fewer than in_channels=6"):
        build_backbone({"name": "unet2d", **dict(sample_size=8, in_channels=6, concat_channels=6)})


class Plain(nn.Module):
    def forward(self, x, t, y=None):
        return x


def test_a_network_must_take_what_the_conditioners_give():
    image = {"size": 8, "channels": 3}
    made = make_conditioners(SECTION, (8, 8), CPU)
    made.check(unet(), image, (8, 8))
    with pytest.raises(UserError, match="it gives 4 channels beside x, this network takes 3"):
        make_conditioners(SECTION | {"task": "inpainting"}, (8, 8), CPU).check(unet(), image, (8, 8))
    with pytest.raises(UserError, match="it gives 0 channels beside x, this network takes 3"):
        Conditioners([Label()]).check(unet(), image, (8, 8), labelled=True)
    with pytest.raises(UserError, match="it gives the condition 'concat', which this Plain does not take"):
        made.check(Plain(), image, (8, 8))
    with pytest.raises(UserError, match="it gives 8x8 pixels beside x, which has 4x4"):
        made.check(unet(), image, (4, 4))
    with pytest.raises(UserError, match="cond.factor=3 does not divide images of 8x8"):
        make_conditioners(SECTION | {"factor": 3}, (8, 8), CPU).check(unet(), image, (8, 8))
    with pytest.raises(UserError, match="Label reads 'label', which is not there; choose from image"):
        Conditioners([Label()]).check(Plain(), image, (8, 8))


OWN = '''
import torch
from torch import nn
from libs.conditioners import Apply, SuperResolution

def make():
    return [SuperResolution(2, (8, 8), rate=0.5), Apply(nn.Conv2d(3, 2, 3, padding=1), rate=0.1)]

def one():
    return Apply(nn.Conv2d(3, 2, 3, padding=1))

def net():
    return nn.Conv2d(3, 2, 3)

def broken():
    raise ValueError("no weights")
'''


def test_conditioners_of_ones_own(tmp_path):
    path = tmp_path / "own.py"
    path.write_text(OWN)
    made = make_conditioners(SECTION | {"task": f"{path}:make, {path}:one, inpainting"}, (8, 8), CPU)
    assert [each.rate for each in made.parts] == [0.5, 0.1, 0.0, 0.25]
    cond = made({"image": images(2)}, draws(2))
    assert cond["concat"].shape == (2, 3 + 2 + 2 + 4, 8, 8)
    assert not cond["concat"].requires_grad
    state = torch.random.get_rng_state()
    again = make_conditioners(SECTION | {"task": f"{path}:make, {path}:one, inpainting"}, (8, 8), CPU)
    assert torch.equal(torch.random.get_rng_state(), state)  # what others draw stays the same
    assert torch.equal(again({"image": images(2)}, draws(2))["concat"], cond["concat"])  # so do its random weights
    for name, message in (("net", "returns a Conv2d, not a libs.conditioners.Conditioner; Apply makes one of"),
                          ("broken", "ValueError in line 16: no weights"), ("nothing", "has no function nothing")):
        with pytest.raises(UserError, match=message):
            make_conditioners(SECTION | {"task": f"{path}:{name}"}, (8, 8), CPU)

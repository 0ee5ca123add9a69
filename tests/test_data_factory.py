"""data.name=factory: torch data sets of the user's own become ImageData."""

import numpy as np
import pytest
import refusals
import torch
from PIL import Image
from torch.utils.data import Dataset

import train
from libs.data import load_data, torch_dataset
from libs.errors import UserError

MODULE = """
import torch
from torch.utils.data import Dataset
from torchvision import transforms

LEVELS = torch.arange(12 * 8 * 8 * 3, dtype=torch.float32).remainder(256).view(12, 8, 8, 3).to(torch.uint8)


class Packed(Dataset):
    def __init__(self, flip):
        steps = [transforms.ToTensor(), transforms.Normalize((0.5,) * 3, (0.5,) * 3)]
        self.transform = transforms.Compose(steps + [transforms.RandomHorizontalFlip()] * flip)

    def __len__(self):
        return len(LEVELS)

    def __getitem__(self, index):
        return self.transform(LEVELS[index].numpy()), index % 3


def make_dataset():
    return Packed(flip=False)


def make_flipped():
    return Packed(flip=True)


def make_nothing():
    return None


def make_broken():
    raise KeyError("celeba")
"""


@pytest.fixture
def module(tmp_path):
    pytest.importorskip("torchvision")
    path = tmp_path / "my_data.py"
    path.write_text(MODULE)
    return path


def levels():
    return torch.arange(12 * 8 * 8 * 3).remainder(256).view(12, 8, 8, 3).to(torch.uint8)


def refused(*fragments, **request):
    refusals.refused(*fragments, name="factory", **request)


class Items(Dataset):
    def __init__(self, *items):
        self.items = items

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


def read(*items, image_size=4, channels=3):
    return torch_dataset.read_dataset(Items(*items), "data.factory='x'", image_size, channels)


def test_every_level_comes_back(module):
    data = load_data("factory", image_size=8, factory=f"{module}:make_dataset")
    assert torch.equal(data.images, levels())
    assert data.labels.tolist() == [0, 1, 2] * 4
    assert data.labels.dtype == torch.int64


def test_random_transforms_are_drawn_once_and_the_same_in_every_run(module):
    before = torch.get_rng_state()
    first = load_data("factory", image_size=8, factory=f"{module}:make_flipped").images
    assert torch.equal(torch.get_rng_state(), before)  # the caller's random numbers go on as if nothing was read
    torch.manual_seed(7)
    assert torch.equal(load_data("factory", image_size=8, factory=f"{module}:make_flipped").images, first)
    flipped = [not torch.equal(a, b) for a, b in zip(first, levels(), strict=True)]
    assert 0 < sum(flipped) < 12
    assert torch.equal(torch.where(torch.tensor(flipped)[:, None, None, None], first.flip(2), first), levels())


def test_reading_processes_give_the_same(module, monkeypatch):
    alone = load_data("factory", image_size=8, factory=f"{module}:make_flipped")
    monkeypatch.setattr(torch_dataset, "PARALLEL_FROM", 1)
    together = load_data("factory", image_size=8, factory=f"{module}:make_flipped", workers=2)
    assert torch.equal(alone.images, together.images)
    assert torch.equal(alone.labels, together.labels)


def test_kinds_of_images_and_labels():
    pixels = torch.randint(0, 256, (3, 4, 4), dtype=torch.uint8)
    picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())
    floats = pixels / 127.5 - 1
    images, labels = read((floats, 3), (floats.double(), torch.tensor(1)), (pixels, np.int64(2)), [picture, 0])
    assert torch.equal(images, pixels.permute(1, 2, 0).expand(4, 4, 4, 3))
    assert labels.tolist() == [3, 1, 2, 0]
    gray = Image.fromarray(np.full((4, 4), 90, np.uint8))
    assert read((gray, 0))[0].shape == (1, 4, 4, 3)  # Pillow images become what data.channels says
    assert read((gray, 0), channels=1)[0].unique().tolist() == [90]


def test_channels_stay_in_their_order():
    images, _ = read((torch.tensor([1.0, 0.0, -1.0]).view(3, 1, 1).expand(3, 4, 4), 0))
    assert images[0, 0, 0].tolist() == [255, 128, 0]


GOOD = torch.zeros(3, 4, 4)


@pytest.mark.parametrize(("item", "text"), [
    (GOOD, "item 1 is Tensor, want (image, label)"),
    ((GOOD, 0, 0), "item 1 is tuple, want (image, label)"),
    ((GOOD.add(1.01), 0), "item 1 has pixels from 1.01 to 1.01, want [-1, 1]"),
    ((GOOD - 1.5, 0), "item 1 has pixels from -1.5 to -1.5, want [-1, 1]"),
    ((GOOD * torch.nan, 0), "item 1 has pixels from nan to nan, want [-1, 1]"),
    ((torch.zeros(3, 4, 5), 0), "item 1 has an image of shape (3, 4, 5), want (channels, height, width) = (3, 4, 4) "
                                "by data.channels and data.image_size"),
    ((torch.zeros(4, 4, 3), 0), "item 1 has an image of shape (4, 4, 3)"),
    ((Image.new("RGB", (5, 4)), 0), "item 1 has an image of shape (3, 4, 5)"),
    ((GOOD.long(), 0), "item 1 has as image a tensor of torch.int64, want a float tensor in [-1, 1]"),
    ((GOOD.numpy(), 0), "item 1 has as image ndarray, want a float tensor"),
    ((GOOD, -1), "item 1 has the label -1, want an int from 0"),
    ((GOOD, 0.5), "item 1 has the label 0.5, want an int from 0"),
    ((GOOD, None), "item 1 has the label None, want an int from 0"),
])
def test_items_that_are_refused(item, text):
    with pytest.raises(UserError) as caught:
        read((GOOD, 0), item)
    assert str(caught.value).startswith(f"data.factory='x': {text}")
    assert "\n" not in str(caught.value)


def test_values_a_rounding_error_outside_are_taken():
    assert read((GOOD + 1 + 1e-6, 0))[0].unique().tolist() == [255]


def test_an_item_that_fails():
    class Failing(Items):
        def __getitem__(self, index):
            raise OSError("no such file\nand more")

    with pytest.raises(UserError, match=r"^x: item 0 cannot be read \(OSError: no such file\)$"):
        torch_dataset.read_dataset(Failing(1), "x", 4, 3)


def test_a_warning_where_images_seem_to_lie_in_0_1(caplog):
    read((GOOD + 0.5, 0))
    assert "no pixel is darker than mid-gray" in caplog.text
    caplog.clear()
    read((GOOD + 0.5, 0), (GOOD - 0.5, 0))
    assert caplog.text == ""


def test_refusals(module):
    refused("data.factory", "want path/to/module.py:function", factory="my_data.py")
    refused("data.factory is empty")
    refused(f"data.factory='{module}:make_data'", "has no function make_data", factory=f"{module}:make_data")
    refused("returns NoneType, want a torch Dataset", factory=f"{module}:make_nothing")
    refused(f"data.factory='{module}:make_broken'", "celeba", factory=f"{module}:make_broken")
    refused("item 0 has an image of shape (3, 8, 8)", "(1, 8, 8)", image_size=8, channels=1,
            factory=f"{module}:make_dataset")
    refused("data.split='test'", "one split", factory=f"{module}:make_dataset", split="test")


def test_trains_from_a_factory(run_main, tmp_path, module):
    """Labels included: the images' classes reach the network."""
    (tmp_path / "config.py").write_text(f"""
from configs import digits_uvit

def get_config():
    config = digits_uvit.get_config()
    config.data.update(name="factory", factory={f"{module}:make_dataset"!r}, channels=3)
    config.backbone.update(patch_size=4, embed_dim=16, depth=2, num_heads=2, in_chans=3)
    config.train.update(steps=2, batch_size=4, warmup=1, log_every=1, preview_every=0)
    config.compute.device = "cpu"
    return config
""")
    argv = [f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}"]
    ran = run_main(train.main, *argv)
    assert ran.status == 0, ran.stderr
    assert len((tmp_path / "run" / "stats.jsonl").read_text().splitlines()) == 2
    ran = run_main(train.main, *argv, "--config.data.factory=nowhere.py:make_dataset")
    assert ran.status == 2
    assert ran.stderr.count("\n") == 1
    assert "data.factory='nowhere.py:make_dataset'" in ran.stderr

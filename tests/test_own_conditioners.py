"""Conditioners and a network of the user's own, by their files."""

import pytest
from image_condition_runs import refused, save_digits, write_config
from PIL import Image

import sample
import train

OWN = '''
import torch
from libs.conditioners import Apply, Conditioner


class Blurred(Conditioner):
    rate = 0.1

    def __call__(self, value, draws):
        return torch.nn.functional.avg_pool2d(value, 3, stride=1, padding=1)


def make():
    return [Blurred(), Apply(lambda image: image.mean((2, 3)), rate=0.1)]


def too_deep():
    return Apply(lambda image: image[None])


class Net(torch.nn.Module):
    image_size = [1, 1, 8, 8]
    concat_channels = 1

    def __init__(self):
        super().__init__()
        self.first, self.mean = torch.nn.Conv2d(2, 8, 3, padding=1), torch.nn.Linear(1, 8)
        self.last = torch.nn.Conv2d(8, 1, 3, padding=1)

    def forward(self, x, t, concat, vector=None):
        h = self.first(torch.cat([x, concat], dim=1))
        return self.last(torch.relu(h if vector is None else h + self.mean(vector)[:, :, None, None]))
'''


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    return save_digits(tmp_path_factory.mktemp("digits"))


def test_conditioners_and_a_model_of_ones_own(tmp_path, digits, run_main):
    path, own = write_config(tmp_path / "config.py"), tmp_path / "own.py"
    own.write_text(OWN)
    path.write_text(path.read_text().replace('UNET | {"concat_channels": 1}', '{"name": "factory", "factory": ""}'))
    model = [f"--config={path}", f"--config.backbone.factory={own}:Net", f"--config.cond.task={own}:make"]
    ran = run_main(train.main, *model, f"--workdir={tmp_path / 'run'}")
    assert ran.status == 0, ran.stderr
    ran = run_main(sample.main, *model, f"--checkpoint={tmp_path / 'run'}", f"--images={digits}", "--seeds=0-3",
                   f"--out={tmp_path / 'out'}", "--config.sampler.cfg_scale=1.5")
    assert ran.status == 0, ran.stderr
    assert Image.open(tmp_path / "out/grid.png").width == 2 + 4 * (16 * 4 + 2)  # image and original: no picture
    without = [each for each in model if "cond.task" not in each]
    line = refused(run_main, sample.main, *without, f"--checkpoint={tmp_path / 'run'}", f"--images={digits}",
                   f"--out={tmp_path / 'other'}")
    assert "holds conditioners of the user's own" in line
    assert "weights choose no code" in line
    line = refused(run_main, train.main, *without, f"--config.cond.task={own}:too_deep",
                   f"--workdir={tmp_path / 'deep'}")
    assert "Apply gives (1, 1, 1, 8, 8) float32 for b=1; want (b,) int64 labels" in line

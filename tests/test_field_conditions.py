"""Conditions made of any field of a training set's samples: a number, an image of a map, another file."""

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image
from small_shards import write_tar
from tiny_training import assert_equal_runs

import distillate
import eval as eval_script
import sample
import train
from libs import build
from libs import config as config_files
from libs.conditioners import Apply, Conditioners, Draws, Shown, Sinusoids
from libs.data.canny import canny
from libs.data.images import save_png
from libs.errors import UserError
from libs.processes import Processes
from libs.random import Stream
from libs.training import load_training_data
from libs.training.batches import Batches
from libs.training.run import Run

CPU = torch.device("cpu")
SCORES = [4, 5.5, 7, 6, 4.5]
MODEL = """
import torch
from torch import nn

from libs.conditioners import Apply, Sinusoids

class Net(nn.Module):
    image_size = [1, 3, 8, 8]
    concat_channels, vector_size = 3, 8

    def __init__(self):
        super().__init__()
        self.vector, self.first, self.last = nn.Linear(8, 8), nn.Conv2d(6, 8, 1), nn.Conv2d(8, 3, 3, padding=1)

    def forward(self, x, t, concat, vector):
        h = self.first(torch.cat([x, concat], dim=1)) + self.vector(vector)[:, :, None, None]
        return self.last(torch.relu(h) * torch.cos(t)[:, None, None, None])

def make_model():
    return Net()

def make_conditioners():
    return [Sinusoids(8, "aesthetic_score", rate=0.2), Apply(lambda edges: edges, reads="edge.png")]
"""


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """net.py, and 0.tar of pictures with captions, scores and, beside each, the same picture as edge.png."""
    root = tmp_path_factory.mktemp("fields")
    (root / "net.py").write_text(MODEL)
    random, samples = np.random.default_rng(0), {}
    for i, score in enumerate(SCORES):
        file = io.BytesIO()
        Image.fromarray(random.integers(0, 256, (10, 8, 3), np.uint8)).save(file, "PNG")
        told = {"caption": "noise", "aesthetic_score": score, "a": "b", "mixed": "b" if i else 1}
        samples[str(i)] = {"png": file.getvalue(), "edge.png": file.getvalue(), "json": json.dumps(told).encode()}
    write_tar(root / "0.tar", samples)
    return root


@pytest.fixture(scope="module")
def flags(root):
    path = root / "net.py"
    return ["--config=configs/own_model.py", "--config.compute.device=cpu", "--config.compute.rows=4",
            f"--config.backbone.factory={path}:make_model", f"--config.cond.task={path}:make_conditioners",
            "--config.cond.kind=image", "--config.data.image_size=8", "--config.sampler.steps=2"]


@pytest.fixture(scope="module")
def learning(root, flags):
    return [*flags, "--config.data.name=webdataset", f"--config.data.path={root / '0.tar'}",
            "--config.data.keys=edge.png", "--config.train.batch_size=8", "--config.train.steps=4",
            "--config.train.save_every=2", "--config.train.preview_every=4", "--config.train.preview_images=3"]


@pytest.fixture(scope="module")
def trained(root, learning):
    assert train.main([*learning, f"--workdir={root / 'run'}"]) == 0
    return root / "run"


def load(root, **fields):
    config = config_files.load("configs/own_model.py")
    config.data.update(name="webdataset", path=str(root / "0.tar"), image_size=8, **fields)
    description = build.describe(config) | {"image": {"size": 8, "channels": 3}}
    return load_training_data(config.data, description | {"cond": {"kind": "none"}}, CPU)


def batches(data, *parts, flip=True):
    cond = {"kind": "image", "num_classes": 0, "null_label": -1, "drop": 0.0}
    return Batches(data, build.make_codec({"name": "pixel"}), cond, flip, 0, 16, conditioners=Conditioners(parts))


def test_training_sees_the_fields_of_its_images(root):
    data = load(root, keys="edge.png")
    score = Sinusoids(8, "aesthetic_score")
    [batch] = batches(data, score, Apply(lambda x: x, reads="edge.png")).parts(0)
    indices = batches(data, score).order(batch.positions)
    assert torch.equal(batch.cond["concat"], batch.x_0)  # the same picture, so mirrored together
    flipped = batch.uniform(Stream.TRAIN_FLIP) < 0.5
    assert 0 < flipped.sum() < len(flipped)
    wanted = torch.tensor([SCORES[i] for i in indices])
    assert torch.equal(batch.cond["vector"], score(wanted, None))


def test_what_maps_make_and_texts(root):
    data = load(root, maps="resize 8; canny 50 100; rescale edges e; rename a words")
    [batch] = batches(data, Apply(lambda x: x, reads="edges"), Apply(lambda x: x, reads="e"),
                      Apply(lambda words: torch.tensor([[len(word)] for word in words]).float(), "words")).parts(0)
    flipped, first = batch.uniform(Stream.TRAIN_FLIP) < 0.5, ((batch.x_0 + 1) * 127.5).round().to(torch.uint8)
    assert batch.cond["vector"].tolist() == [[1.0]] * 16
    for image, cond, mirrored in zip(first.permute(0, 2, 3, 1), batch.cond["concat"], flipped, strict=True):
        edges = canny((image.flip(1) if mirrored else image).numpy(), 50, 100)
        wanted = torch.from_numpy(edges).permute(2, 0, 1) / 127.5 - 1
        wanted = wanted.flip(2) if mirrored else wanted
        assert torch.equal(cond[:3], wanted.expand(3, -1, -1))  # as many channels as the image
        assert torch.equal(cond[3:], wanted)


def test_going_on_is_the_same_as_not_stopping(trained, learning, tmp_path, run_main):
    for steps in (2, 4):
        ran = run_main(train.main, *learning, f"--workdir={tmp_path / 'again'}", f"--config.train.steps={steps}")
        assert ran.status == 0, ran.stderr
    config = config_files.load("configs/own_model.py")
    for flag in learning[1:]:
        config_files.override(config, *flag.removeprefix("--config.").split("=", 1))
    assert_equal_runs(*(Run(folder, config, None, Processes(CPU)) for folder in (trained, tmp_path / "again")), step=4)
    assert Image.open(trained / "previews/00000004.png").width > 0


def test_a_student_learns_with_them(trained, learning, flags, tmp_path, run_main):
    learning = ["--config=configs/own_model.py:flash", *learning[1:], "--config.train.steps=2",
                f"--checkpoint={trained}", "--config.distill.guidance=2,5",
                "--config.distill.discriminator_features=output"]
    ran = run_main(distillate.main, *learning, f"--workdir={tmp_path / 'student'}")
    assert ran.status == 0, ran.stderr
    fields = f"--fields=aesthetic_score=6; edge.png={trained / 'previews/00000004.png'}"
    ran = run_main(sample.main, *flags, f"--checkpoint={tmp_path / 'student'}", fields, f"--out={tmp_path / 'out'}",
                   "--seeds=0-3")
    assert ran.status == 0, ran.stderr


def test_sampling_is_given_them(root, trained, flags, tmp_path, run_main):
    def images(name, fields):
        ran = run_main(sample.main, *flags, f"--checkpoint={trained}", "--seeds=0-3", f"--fields={fields}",
                       f"--out={tmp_path / name}")
        assert ran.status == 0, ran.stderr
        return [np.asarray(Image.open(tmp_path / name / f"{seed:06d}.png")).tolist() for seed in range(4)]

    for i in range(2):
        save_png(tmp_path / f"edges/{i}.png", torch.full((9, 8, 3), 200 * i, dtype=torch.uint8))
    one = images("one", f"aesthetic_score=6.5; edge.png={tmp_path / 'edges'}")
    assert one != images("score", f"aesthetic_score=4; edge.png={tmp_path / 'edges'}")
    first = images("edge", f"aesthetic_score=6.5; edge.png={tmp_path / 'edges/0.png'}")
    assert [a == b for a, b in zip(one, first, strict=True)] == [True, False, True, False]
    ran = run_main(sample.main, *flags, f"--checkpoint={trained}", "--seeds=0-5", f"--out={tmp_path / 'one'}",
                   f"--fields=aesthetic_score=6; edge.png={tmp_path / 'edges'}")
    assert "holds images of another chain (fields_sha256.aesthetic_score is" in ran.stderr
    out = tmp_path / "score.json"
    ran = run_main(eval_script.main, *flags, f"--checkpoint={trained}", "--seeds=0-3", f"--out={out}",
                   f"--fields=aesthetic_score=6; edge.png={tmp_path / 'edges'}")
    assert ran.status == 0, ran.stderr
    assert json.loads(out.read_text())["fields"].startswith("aesthetic_score=6;")


@pytest.mark.parametrize(("fields", "line"), [
    ([], "--fields: 'aesthetic_score' is missing, of which this model's conditions are made"),
    (["--fields=aesthetic_score=6"], "--fields=aesthetic_score=6: 'edge.png' is missing"),
    (["--fields=aesthetic_score=6; edge.png=1,2,3"], "it gives 0 channels beside x, this network takes 3"),
    (["--fields=aesthetic_score=high"], "'aesthetic_score=high' is neither; want numbers, an image or a folder of"),
    (["--fields=aesthetic_score=6; edge.png=1; size=3"], "are not made of 'size'; choose from aesthetic_score"),
])
def test_what_is_given_must_fit(trained, flags, tmp_path, run_main, fields, line):
    ran = run_main(sample.main, *flags, f"--checkpoint={trained}", "--seeds=0-3", f"--out={tmp_path}", *fields)
    assert ran.status == 2
    assert line in ran.stderr.splitlines()[-1]
    assert not list(tmp_path.glob("*.png"))


def test_what_is_not_there_is_told_before_training(root, learning, tmp_path, run_main):
    command = [*learning, f"--workdir={tmp_path / 'run'}"]
    save_png(root / "images/0.png", torch.zeros(8, 8, 3, dtype=torch.uint8))
    for flags, line in (
        (["--config.data.maps=select edge.png"], "has no 'aesthetic_score'; choose from "),
        (["--config.data.maps=select aesthetic_score"], "has no 'edge.png'; choose from "),
        ([f"--config.data.path={root / 'images'}", "--config.data.name=folder"],
         "it reads the field 'aesthetic_score', and this data set's images have none; choose data.name=webdataset"),
    ):
        ran = run_main(train.main, *command, *flags)
        assert ran.status == 2
        assert line in ran.stderr.splitlines()[-1]
        assert not (tmp_path / "run/stats.jsonl").exists()
    shown = Shown(Conditioners([Sinusoids(8, "mixed")]), load(root))
    with pytest.raises(UserError, match="'mixed' is no number, or no list of equally many, in some samples"):
        shown([0, 1])


def test_a_field_needs_a_source():
    with pytest.raises(UserError, match="reads 'size', which is not there"):
        Conditioners([Sinusoids(8, "size")])({"text": [""]}, Draws(*torch.zeros(2, 1, dtype=torch.long)))

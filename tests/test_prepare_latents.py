"""prepare_data.py latents and text: what they write, read back, is what encoding on the fly gives."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from prepared_features import (
    CLASSES,
    LEARNS,
    contents,
    error_of,
    labelled,
    learn,
    prepare,
    save_models,
    texted,
    write_coco,
    write_image,
    write_imagenet,
)
from safetensors.torch import load_file, save_file

import prepare_data
import train
from libs import config as config_files
from libs.codecs import KLCodec
from libs.data import load_data, make_features
from libs.data.feature_data import LATENTS_RECORD


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    return save_models(tmp_path_factory.mktemp("models"))


@pytest.fixture
def imagenet(tmp_path):
    return write_imagenet(tmp_path)


@pytest.fixture
def coco(tmp_path):
    return write_coco(tmp_path)


# ---- latents


def test_latents_are_those_of_encoding_on_the_fly(run_main, tmp_path, models, imagenet):
    out = tmp_path / "features"
    printed = prepare(run_main, "latents", *labelled(models), f"--images={imagenet}", f"--out={out}")
    assert printed == f"{out}: latents of 20 images, 10 of them mirrored\n"
    raw, data = load_data("imagenet", imagenet, image_size=16), load_data("features", out)
    moments, labels = data.batch(torch.arange(20))
    codec = KLCodec(str(models / "vae"), 0.5)
    torch.testing.assert_close(moments[:10], codec.moments(raw.images), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(moments[10:], codec.moments(raw.images.flip(2)), rtol=1e-5, atol=1e-5)
    assert labels.tolist() == [*raw.labels.tolist(), *raw.labels.tolist()]
    stored, label = np.load(out / "9.npy", allow_pickle=True)  # as U-ViT's reader does it
    assert stored.shape == (8, 8, 8)
    assert stored.dtype == np.float32
    assert label == 2


def test_mirror_images_stand_behind_their_batch(run_main, tmp_path, models, imagenet, monkeypatch):
    monkeypatch.setattr(make_features, "BATCH", 4)
    monkeypatch.setattr(make_features, "GROUP", 2)
    prepare(run_main, "latents", *labelled(models), f"--images={imagenet}", f"--out={tmp_path}/features")
    moments, labels = load_data("features", tmp_path / "features").batch(torch.arange(20))
    raw = load_data("imagenet", imagenet, image_size=16)
    order = [*range(4), *range(4), *range(4, 8), *range(4, 8), 8, 9, 8, 9]
    mirrored = torch.tensor([False] * 4 + [True] * 4 + [False] * 4 + [True] * 4 + [False] * 2 + [True] * 2)
    images = torch.where(mirrored[:, None, None, None], raw.images.flip(2)[order], raw.images[order])
    expected = KLCodec(str(models / "vae"), 0.5).moments(images)
    torch.testing.assert_close(moments, expected, rtol=1e-5, atol=1e-5)
    assert labels.tolist() == raw.labels[order].tolist()


def test_flips_and_limit_are_what_the_flags_say(run_main, tmp_path, models, imagenet):
    out, argv = tmp_path / "features", ["latents", *labelled(models), f"--images={imagenet}"]
    printed = prepare(run_main, *argv, f"--out={out}", "--noflips", "--limit=4")
    assert printed == f"{out}: latents of 4 images\n"
    raw = load_data("imagenet", imagenet, image_size=16)
    assert load_data("features", out).labels.tolist() == raw.labels[:4].tolist()
    unlabelled = ["--config.cond.kind=none", "--config.cond.drop=0"]
    prepare(run_main, *argv, *unlabelled, "--flips", f"--out={tmp_path}/none")
    data = load_data("features", tmp_path / "none")
    assert (len(data), data.labels) == (20, None)


def test_training_on_features_is_training_on_the_images(run_main, tmp_path, models, imagenet):
    out = tmp_path / "features"
    prepare(run_main, "latents", *labelled(models), f"--images={imagenet}", f"--out={out}", "--noflips")
    argv = [*labelled(models), "--config.data.flip=False"]
    on_the_fly = learn(run_main, tmp_path / "images", *argv, "--config.data.name=imagenet",
                       f"--config.data.path={imagenet}")
    stored = learn(run_main, tmp_path / "stored", *argv, "--config.data.name=features", f"--config.data.path={out}")
    assert stored == pytest.approx(on_the_fly, rel=1e-5)
    assert len(stored) == 3


def _killed_at_its_sixth_file(argv):
    write, written = make_features.write_feature, []

    def killed(*args):
        written.append(args)
        if len(written) == 6:
            os.kill(os.getpid(), signal.SIGKILL)
        write(*args)

    make_features.write_feature = killed
    prepare_data.main(argv)


def test_goes_on_after_a_kill(run_main, tmp_path, models, imagenet, monkeypatch):
    out, argv = tmp_path / "features", ["latents", *labelled(models), f"--images={imagenet}"]
    monkeypatch.setattr(make_features, "GROUP", 2)
    prepare(run_main, *argv, f"--out={tmp_path}/whole")
    process = multiprocessing.get_context("fork").Process(target=_killed_at_its_sixth_file,
                                                          args=([*argv, f"--out={out}"],))
    process.start()
    process.join(timeout=100)
    assert process.exitcode == -signal.SIGKILL
    assert sorted(contents(out)) == sorted([LATENTS_RECORD, *(f"{i}.npy" for i in (0, 1, 2, 10, 11))])
    ran = run_main(train.main, *labelled(models), *LEARNS, f"--workdir={tmp_path}/run", "--config.data.name=features",
                   f"--config.data.path={out}")
    assert error_of(ran) == (f"data.path={str(out)!r}: the features in {out} are half made; the same prepare_data.py "
                             "latents command goes on with them")

    encoded, moments = [], KLCodec.moments
    monkeypatch.setattr(KLCodec, "moments", lambda self, images: encoded.append(len(images)) or moments(self, images))
    prepare(run_main, *argv, f"--out={out}")
    assert encoded == [4, 4, 4, 4]  # all groups but the first, with their mirror images
    assert contents(out) == contents(tmp_path / "whole")
    prepare(run_main, *argv, f"--out={out}")
    assert len(encoded) == 4


TOGETHER = """
import sys
sys.path.insert(0, {root!r})
import prepare_data
from libs.data import make_features
from libs.processes import Processes

make_features.GROUP = 2
Processes.close = lambda self: None  # both commands run in these processes
for argv in {commands!r}:
    assert prepare_data.main(argv) == 0
"""


def test_two_processes_write_what_one_does(run_main, tmp_path, models, imagenet, coco, monkeypatch):
    commands = [["latents", *labelled(models), f"--images={imagenet}", f"--out={tmp_path}/one"],
                ["text", *texted(models), f"--captions={tmp_path}/captions.json", f"--out={tmp_path}/one"]]
    monkeypatch.setattr(make_features, "GROUP", 2)
    printed = "".join(prepare(run_main, *argv) for argv in commands)
    commands = [[arg.replace("/one", "/two") for arg in argv] for argv in commands]
    (tmp_path / "together.py").write_text(TOGETHER.format(root=str(config_files.ROOT), commands=commands))
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2", "--main_process_port=0")
    ran = subprocess.run([sys.executable, *launch, tmp_path / "together.py"], cwd=config_files.ROOT,
                         capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout == printed.replace("/one", "/two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


# ---- mistakes


def test_an_image_that_cannot_be_read_is_named_and_nothing_is_skipped(run_main, tmp_path, models, imagenet):
    broken = imagenet / CLASSES[1] / f"{CLASSES[1]}_4.JPEG"
    broken.write_bytes(b"no image")
    ran = run_main(prepare_data.main, "latents", *labelled(models), f"--images={imagenet}", f"--out={tmp_path}/f")
    assert error_of(ran).startswith(f"--images: {broken} cannot be read as an image")


def test_a_folder_made_from_something_else_is_not_gone_on_with(run_main, tmp_path, models, imagenet):
    argv = ["latents", *labelled(models), f"--images={imagenet}", f"--out={tmp_path}/f"]
    prepare(run_main, *argv, "--limit=3")
    before = contents(tmp_path / "f")
    for flags, told in (["--limit=4"], "images=3, not 4"), (["--limit=3", "--noflips"], "flips=True, not False"):
        assert error_of(run_main(prepare_data.main, *argv, *flags)) == \
            f"--out: the features in {tmp_path}/f were made with {told}; choose another folder"
    write_image(imagenet / CLASSES[0] / f"{CLASSES[0]}_0.JPEG", 77)
    assert "were made from other images; choose" in error_of(run_main(prepare_data.main, *argv, "--limit=3"))
    assert contents(tmp_path / "f") == before


@pytest.mark.parametrize(("command", "model"), [("latents", "autoencoder"), ("text", "text_encoder")])
def test_a_model_counts_by_its_weights_and_not_by_where_it_lies(run_main, tmp_path, models, coco, command, model):
    moved = shutil.copytree(models, tmp_path / "moved")
    flags = [f"--captions={tmp_path}/captions.json", f"--out={tmp_path}/f"]
    flags += [f"--images={coco}"] if command == "latents" else []
    prepare(run_main, command, *texted(models), *flags)
    written, record = contents(tmp_path / "f"), next((tmp_path / "f/train").glob(f".{command}*.json"))
    prepare(run_main, command, *texted(moved), *flags)
    assert {**contents(tmp_path / "f"), f"train/{record.name}": ""} == {**written, f"train/{record.name}": ""}

    weights = moved / {"latents": "vae/diffusion_pytorch_model.safetensors", "text": "clip/model.safetensors"}[command]
    save_file({name: each + 1 for name, each in load_file(weights).items()}, weights, {"format": "pt"})
    before = contents(tmp_path / "f")
    told = error_of(run_main(prepare_data.main, command, *texted(moved), *flags))
    place = moved / {"latents": "vae", "text": "clip"}[command]
    assert told == (f"--out: the features in {tmp_path}/f/train were made with other weights of {model}="
                    f"{str(place)!r}; choose another folder")
    assert contents(tmp_path / "f") == before

    # Records of before the weights' digests tell models by their names.
    record.write_text(json.dumps({name: value for name, value in json.loads(record.read_text()).items()
                                  if name != f"{model}_weights"}))
    told = error_of(run_main(prepare_data.main, command, *texted(models), *flags))
    assert f"were made with {model}={str(place)!r}, not " in told
    if command == "latents":  # texts are told by the empty one too
        prepare(run_main, command, *texted(moved), *flags)
        assert f"{model}_weights" in record.read_text()


BAD = [
    (["latents"], "--config is missing"),
    (["latents", "LABELLED", "--out={}/f"], "--images is missing"),
    (["latents", "LABELLED", "--images={}/imagenet"], "--out is missing"),
    (["latents", "LABELLED", "--images=nowhere", "--out={}/f"], "--images='nowhere' is neither a folder nor a .zip"),
    (["latents", "LABELLED", "--images={}/imagenet", "--out={}/f", "--limit=0"], "--limit=0: want a positive integer"),
    (["latents", "LABELLED", "--images={}/coco", "--out={}/f"], "5.png is unknown: want class folders"),
    (["latents", "LABELLED", "--images={}/imagenet", "--out={}/f", "--config.cond.num_classes=2"],
     "has 3 classes; cond.num_classes is 2"),
    (["latents", "LABELLED", "--images={}/imagenet", "--out={}/f", "--config.codec.pretrained=nowhere.pth"],
     "codec.pretrained='nowhere.pth': no such file"),
    (["latents", "--config=configs/cifar10_uvit_tiny.py", "--config.compute.device=cpu", "--images={}/imagenet",
      "--out={}/f"], "codec.name='pixel' has no latents; choose kl"),
    (["latents", "TEXTED", "--images={}/coco", "--out={}/f"], "--captions is missing: cond.kind is text"),
    (["latents", "TEXTED", "--images={}/coco", "--captions={}/nowhere.json", "--out={}/f"],
     "--captions: {}/nowhere.json cannot be read as COCO's captions"),
    (["latents", "TEXTED", "--images={}/imagenet", "--captions={}/captions.json", "--out={}/f"],
     "5 of 5 images that {}/captions.json names are missing; the first: 9.png"),
    (["text", "TEXTED", "--out={}/f"], "give --captions=FILE or --prompts=FILE, one of them"),
    (["text", "TEXTED", "--out={}/f", "--captions=a.json", "--prompts=b.txt"], "or --prompts=FILE, one of them"),
    (["text", "TEXTED", "--out={}/f", "--prompts=nowhere.txt"], "--prompts=nowhere.txt cannot be read"),
    (["text", "TEXTED", "--out={}/f", "--prompts=a cat", "--config.cond.text_encoder=nowhere"],
     "cond.text_encoder='nowhere'"),
    (["text", "--config=configs/sd15.py", "--out={}/f", "--prompts=a cat"],
     "--prompts=a cat: the previews of a pipeline's student show its captions"),
]


@pytest.mark.parametrize(("argv", "line"), BAD, ids=[" ".join(argv) for argv, _ in BAD])
def test_bad_input(run_main, tmp_path, models, imagenet, coco, argv, line):
    groups = {"LABELLED": labelled(models), "TEXTED": texted(models)}
    argv = [each for arg in argv for each in groups.get(arg, [arg.format(tmp_path)])]
    assert line.format(tmp_path) in error_of(run_main(prepare_data.main, *argv))
    assert not (tmp_path / "f").exists()


def test_features_of_another_resolution_are_refused_before_training(run_main, tmp_path, models, imagenet):
    prepare(run_main, "latents", *labelled(models), f"--images={imagenet}", f"--out={tmp_path}/f")
    ran = run_main(train.main, *labelled(models), *LEARNS, f"--workdir={tmp_path}/run", "--config.data.name=features",
                   f"--config.data.path={tmp_path}/f", "--config.data.image_size=32", "--config.backbone.img_size=16")
    assert error_of(ran) == (f"data.path='{tmp_path}/f' holds latents of 4x8x8 (channels, height, width); this network "
                             "takes 4x16x16")


def test_latents_of_another_autoencoder_are_refused_before_training(run_main, tmp_path, models, imagenet):
    prepare(run_main, "latents", *labelled(models), f"--images={imagenet}", f"--out={tmp_path}/f")
    other = shutil.copytree(models, tmp_path / "other")
    weights = other / "vae/diffusion_pytorch_model.safetensors"
    argv = [*labelled(other), "--config.data.name=features", f"--config.data.path={tmp_path}/f"]
    held = load_file(weights)
    save_file({name: each * (1 + name.startswith("decoder.")) for name, each in held.items()}, weights)
    assert len(learn(run_main, tmp_path / "decoder", *argv)) == 3  # which changes nothing of the latents
    save_file({name: each * (1 + name.startswith("encoder.")) for name, each in held.items()}, weights)
    ran = run_main(train.main, *argv, *LEARNS, f"--workdir={tmp_path}/encoder")
    assert error_of(ran) == (f"data.path='{tmp_path}/f' holds latents of another autoencoder than this model's; they "
                             f"were made by '{models}/vae'")
    assert not (tmp_path / "encoder").exists()

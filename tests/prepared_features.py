"""What prepare_data.py makes features of and by: images, captions, tiny models; and its commands."""

import json
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tiny_pipelines import CROSS, clip_text_model, clip_tokenizer

import prepare_data
import train

TOKENS = 9
CLASSES = ("n01", "n02", "n07")


def save_models(folder: Path) -> Path:
    """A folder with a tiny autoencoder (`vae`, latents of half the side) and a tiny CLIP text model (`clip`)."""
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    AutoencoderKL(block_out_channels=(8, 16), down_block_types=("DownEncoderBlock2D",) * 2, latent_channels=4,
                  up_block_types=("UpDecoderBlock2D",) * 2, norm_num_groups=4).save_pretrained(folder / "vae")
    tokenizer = clip_tokenizer(folder / "vocabulary")
    clip_text_model(tokenizer).save_pretrained(folder / "clip")
    tokenizer.save_pretrained(folder / "clip")
    return folder


def write_image(path, seed, size=(20, 16)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path, "PNG")


def write_imagenet(folder: Path) -> Path:
    """Ten images of three classes."""
    for i in range(10):
        name = CLASSES[i % 3]
        write_image(folder / "imagenet" / name / f"{name}_{i}.JPEG", i)
    return folder / "imagenet"


def write_coco(folder: Path) -> Path:
    """Five images, named by folder/captions.json in another order; image i has i % 2 + 1 captions."""
    listed = {"images": [], "annotations": []}
    for i in (3, 0, 4, 1, 2):
        write_image(folder / "coco" / f"{9 - i}.png", i)
        listed["images"].append({"id": i, "file_name": f"{9 - i}.png"})
        listed["annotations"] += [{"id": k, "image_id": i, "caption": f"a {'red ' * k}cat {i}"}
                                  for k in range(i % 2 + 1)]
    (folder / "captions.json").write_text(json.dumps(listed))
    return folder / "coco"


def labelled(models):
    """Flags of a class-conditional latent model."""
    return ["--config=configs/imagenet256_uvit_large.py", *_common(models), "--config.cond.num_classes=3",
            "--config.cond.null_label=3", "--config.backbone.num_classes=4"]


def texted(models):
    """Flags of a text-to-image latent model."""
    return ["--config=configs/mscoco_uvit_small.py", *_common(models), f"--config.cond.text_encoder={models}/clip",
            f"--config.cond.tokens={TOKENS}", f"--config.backbone.num_clip_token={TOKENS}",
            f"--config.backbone.clip_dim={CROSS}"]


def _common(models):
    return ["--config.compute.device=cpu", f"--config.codec.pretrained={models}/vae", "--config.data.image_size=16",
            "--config.backbone.img_size=8"]


def prepare(run_main, *argv):
    """What the command printed."""
    ran = run_main(prepare_data.main, *argv)
    assert ran.status == 0, ran.stderr
    return ran.stdout


def error_of(ran):
    assert (ran.status, ran.stdout) == (2, ""), ran
    [line] = [line for line in ran.stderr.replace("\r", "\n").splitlines() if line.startswith("error: ")]
    assert "Traceback" not in ran.stderr
    return line.removeprefix("error: ")


def contents(folder):
    """Every file below a folder, but for what readers keep there."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*"))
            if path.is_file() and not path.name.startswith((".moments", ".labels"))}


LEARNS = ("--config.backbone.embed_dim=16", "--config.backbone.depth=2", "--config.backbone.num_heads=2",
          "--config.backbone.conv=False", "--config.compute.precision=fp32", "--config.train.steps=3",
          "--config.train.batch_size=4", "--config.train.log_every=1", "--config.train.preview_every=0",
          "--config.train.warmup=0", "--config.sampler.steps=4")


def learn(run_main, workdir, *argv):
    """The losses of a training."""
    ran = run_main(train.main, *argv, *LEARNS, f"--workdir={workdir}")
    assert ran.status == 0, ran.stderr
    return [json.loads(line)["loss"] for line in (workdir / "stats.jsonl").read_text().splitlines()]

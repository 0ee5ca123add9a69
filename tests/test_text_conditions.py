"""Captions and prompts as conditions of the chain's own models, through every command."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_texts import TOKENS, write_text_encoders
from tiny_training import assert_equal_runs

import distillate
import eval as eval_script
import prepare_data
import sample
import train
from libs import build
from libs import config as config_files
from libs.checkpoint import read
from libs.conditioners import SuperResolution
from libs.cost import gmacs_per_image
from libs.data.images import save_png
from libs.denoiser import guided
from libs.processes import Processes
from libs.prompts import prompts_id
from libs.random import Stream, normal
from libs.text import T5Encoder, TextEncoder
from libs.training import load_training_data
from libs.training.batches import Batches
from libs.training.run import Run

CPU = torch.device("cpu")
CAPTIONS = ["a cat", "a red dog\na dog of the sea", "a photo of the red sea", "a blurry cat", "the sea"]
CONFIG = '''
from libs.defaults import base_config
from libs.methods import METHODS, apply_methods

def get_config(methods=""):
    config = base_config()
    config.backbone = {{"name": "uvit", "img_size": 8, "patch_size": 2, "in_chans": 3, "embed_dim": 16, "depth": 4,
                        "num_heads": 2, "num_clip_token": {tokens}, "clip_dim": 32, "concat_channels": {concat}}}
    config.schedule = {{"name": "squared_cosine", "steps": 64}}
    config.denoiser.update(prediction="v", time_input="index")
    config.cond.update(kind="image", task="{task}", factor=2, drop=0.3, text_encoder="{clip}", tokens={tokens})
    config.compute.update(rows=4, device="cpu")
    config.sampler.update(name="ddim", steps=2, grid="trailing", threshold="static")
    config.data.update(name="captioned_folder", path="{pictures}", image_size=8, channels=3)
    config.train.update(steps=4, batch_size=8, warmup=2, log_every=1, save_every=2, keep=9, preview_every=4,
                        preview_images=3, ema=0.5, lr=1e-3)
    config.eval.metrics = ("psnr",)
    apply_methods(config, methods, METHODS)
    return config
'''


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """A folder with tiny text encoders (clip, projection, t5), pictures with captions, and images."""
    root = tmp_path_factory.mktemp("text")
    write_text_encoders(root)
    (root / "pictures").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (len(CAPTIONS), 8, 8, 3), np.uint8)
    for i, (caption, image) in enumerate(zip(CAPTIONS, pixels, strict=True)):
        save_png(root / f"pictures/{i}.png", image)
        save_png(root / f"images/{i}.png", 255 - image)
        (root / f"pictures/{i}.txt").write_text(caption)
    return root


def write_config(root, path, task="super_resolution,text", tokens=TOKENS, concat=3):
    path.write_text(CONFIG.format(task=task, tokens=tokens, concat=concat, clip=root / "clip",
                                  pictures=root / "pictures"))
    return path


@pytest.fixture(scope="module")
def trained(root):
    """(config file, training folder) of super-resolution with captions."""
    path = write_config(root, root / "config.py")
    assert train.main([f"--config={path}", f"--workdir={root / 'run'}"]) == 0
    return path, root / "run"


def chain_of(path, run, images=None, prompts=None, **fields):
    config = config_files.load(str(path))
    for field, value in fields.items():
        config_files.override(config, field.replace("__", "."), str(value))
    chosen = [field.replace("__", ".") for field in fields]
    return build.load_chain(config, str(run), CPU, chosen, prompts, images and str(images))[0]


def prompts_file(root, *prompts):
    path = root / f"{prompts_id(prompts)[:8]}.txt"
    path.write_text("\n".join(prompts))
    return str(path)


def test_training_sees_the_captions_of_its_images(root, trained):
    path, _ = trained
    config = config_files.load(str(path))
    description = build.describe(config)
    data, encoder = load_training_data(config.data, description, CPU), TextEncoder(str(root / "clip"), TOKENS)

    def batches(drop=0.0, **share):
        return Batches(data, build.make_codec(description["codec"]), description["cond"] | {"drop": drop}, True, 0, 8,
                       **share)

    [batch] = batches().parts(3)
    indices = batches().order(batch.positions)
    texts = data.texts(indices, batch.uniform(Stream.TRAIN_CAPTION))
    assert torch.equal(batch.cond["context"], encoder(texts))
    assert torch.equal(batch.cond["concat"], SuperResolution(2, (8, 8))(batch.x_0, None))
    parts = [part for rank in range(2) for part in batches(rank=rank, count=2, accumulate=2).parts(3)]
    assert torch.equal(torch.cat([part.cond["context"] for part in parts]), batch.cond["context"])
    [dropped] = batches(drop=0.5).parts(3)
    gone = dropped.uniform(Stream.TRAIN_DROP) < 0.5
    assert 0 < gone.sum() < 8
    assert torch.equal(dropped.cond["context"][gone], encoder.empty.expand(int(gone.sum()), -1, -1))
    assert not dropped.cond["concat"][gone].any()


def test_going_on_is_the_same_as_not_stopping(trained, tmp_path, run_main):
    path, run = trained
    command = [f"--config={path}", f"--workdir={tmp_path / 'again'}"]
    for steps in (2, 4):
        ran = run_main(train.main, *command, f"--config.train.steps={steps}")
        assert ran.status == 0, ran.stderr
    config = config_files.load(str(path))
    whole, again = (Run(folder, config, None, Processes(CPU)) for folder in (run, tmp_path / "again"))
    assert_equal_runs(whole, again, step=4)
    assert Image.open(run / "previews/00000004.png").width == 2 + 2 * 98  # condition, sample and original
    for field, value in (("tokens", 8), ("text_null", "zeros"), ("text_drop", 0.5)):
        ran = run_main(train.main, *command, "--config.train.steps=6", f"--config.cond.{field}={value}")
        assert ran.status == 2
        assert f"--config.cond.{field}=" in ran.stderr.splitlines()[-1]


def test_a_checkpoint_says_how_it_knows_texts(root, trained):
    _, description = read(trained[1] / "ckpts/00000004/backbone_ema.safetensors")
    assert description["cond"] == {
        "kind": "image", "num_classes": 0, "null_label": -1, "drop": 0.3, "task": "super_resolution,text", "factor": 2,
        "masks": ["boxes", "halves", "strokes"], "text_encoder": str(root / "clip"), "tokens": TOKENS,
        "text_null": "empty", "text_drop": -1.0}


def test_an_image_depends_on_its_seed_its_original_and_its_prompt_alone(root, trained):
    chain = chain_of(*trained, root / "images", prompts_file(root, "a cat", "a red dog"))
    assert chain.texts([0, 1, 4]) == ["a cat", "a red dog", "a cat"]
    seeds = [0, 3, 5, 8, 9, 2**40]
    whole = torch.cat([images for _, images in chain.images(seeds)])
    for i, seed in enumerate(seeds):
        [(_, one)] = chain.images([seed])
        assert torch.equal(one[0], whole[i])
    other = chain_of(*trained, root / "images", prompts_file(root, "a cat", "the sea"))
    changed = torch.cat([images for _, images in other.images(seeds)])
    assert [not torch.equal(*pair) for pair in zip(whole, changed, strict=True)] == [seed % 2 == 1 for seed in seeds]


def test_guidance_against_no_image_and_the_empty_text(root, trained):
    chain = chain_of(*trained, root / "images", "a cat", sampler__cfg_scale=3.0, sampler__steps=1,
                     sampler__threshold="none")
    seeds = torch.tensor([0, 1, 2, 3])
    cond, x_T = chain.shown(seeds.tolist()), normal(seeds, 0, chain.shape, Stream.START)
    encoder = TextEncoder(str(root / "clip"), TOKENS)
    null = {"context": encoder.empty.expand(4, -1, -1), "concat": torch.zeros(4, 3, 8, 8)}
    assert torch.equal(cond["context"], encoder(["a cat"]).expand(4, -1, -1))
    with torch.inference_mode():
        wanted = guided(chain.denoiser, 3.0, null)(x_T, chain.ts[0], cond).x_0
        assert not torch.allclose(wanted, chain.denoiser(x_T, chain.ts[0], cond).x_0)
    assert torch.equal(chain.sample(seeds.tolist()), wanted)


def test_sample_and_evaluate(root, trained, tmp_path, run_main):
    path, run = trained
    prompts = prompts_file(root, "a cat", "a red dog")
    command = [f"--config={path}", f"--checkpoint={run}", f"--images={root / 'images'}", f"--prompts={prompts}",
               "--seeds=0-5"]
    ran = run_main(sample.main, *command, f"--out={tmp_path / 'out'}", "--cost")
    assert ran.status == 0, ran.stderr
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert (summary["prompts"], summary["images_folder"]) == (prompts, str(root / "images"))
    held = json.loads((tmp_path / "out/chain.json").read_text())
    assert held["prompts_sha256"] == prompts_id(["a cat", "a red dog"])
    assert held["text_encoders"] == [TextEncoder(str(root / "clip"), TOKENS).id]
    assert Image.open(tmp_path / "out/grid.png").width == 2 + 4 * (3 * 32 + 2)
    others = prompts_file(root, "the sea")
    refused = run_main(sample.main, *command, f"--prompts={others}", f"--out={tmp_path / 'out'}")
    assert refused.status == 2
    assert "holds images of another chain (prompts_sha256" in refused.stderr
    ran = run_main(eval_script.main, *command, f"--out={tmp_path / 'result.json'}")
    assert ran.status == 0, ran.stderr
    result = json.loads((tmp_path / "result.json").read_text())
    assert (result["prompts"], result["metrics"]["psnr"]["samples"]) == (prompts, 6)
    chain = chain_of(*trained, root / "images", prompts)
    fresh = gmacs_per_image(chain, [0])
    assert fresh == gmacs_per_image(chain, [0]) == summary["gmacs_per_image"]  # the text encoder's are not counted


def test_flash_distils_a_student_that_is_prompted(root, trained, tmp_path, run_main):
    path, run = trained
    flash = [f"--config={path}:flash", f"--checkpoint={run}", f"--workdir={tmp_path / 'flash'}",
             "--config.train.steps=4", "--config.train.batch_size=8", "--config.train.preview_every=4",
             "--config.train.save_every=4", "--config.distill.stage_updates=1,1,1,1",
             "--config.distill.teacher_steps=4", "--config.distill.guidance=2,4", "--config.distill.lora_rank=2"]
    ran = run_main(distillate.main, *flash)
    assert ran.status == 0, ran.stderr
    _, description = read(tmp_path / "flash/ckpts/00000004/backbone_ema.safetensors")
    assert (description["cond"]["drop"], description["cond"]["text_drop"]) == (0.0, 0.0)
    assert (tmp_path / "flash/previews/00000004.png").is_file()
    known = [f"--config={path}", f"--checkpoint={tmp_path / 'flash'}", f"--images={root / 'images'}", "--seeds=0-2"]
    ran = run_main(sample.main, *known, "--prompts=a cat", f"--out={tmp_path / 'out'}")
    assert ran.status == 0, ran.stderr
    assert json.loads((tmp_path / "out/summary.json").read_text())["nfe"] == 4
    ran = run_main(sample.main, *known, f"--out={tmp_path / 'other'}")
    assert ran.status == 2
    assert "--prompts is missing" in ran.stderr


def test_progressive_distillation_with_captions(root, trained, tmp_path, run_main):
    path, run = trained
    ran = run_main(distillate.main, f"--config={path}:progressive", f"--checkpoint={run}", f"--workdir={tmp_path}",
                   "--config.distill.start_steps=4", "--config.train.steps=2", "--config.train.batch_size=8",
                   "--config.train.preview_every=2", "--config.distill.pair_images=3")
    assert ran.status == 0, ran.stderr
    assert (tmp_path / "pairs/steps_0002.png").is_file()
    chain = chain_of(path, tmp_path / "steps_0002", root / "images", "a cat")
    assert (chain.nfe, chain.sample([0, 1]).shape) == (2, (2, 3, 8, 8))


OWN = '''
import torch
from torch import nn
from libs.conditioners import SuperResolution, TextContext, TextVector
from libs.text import PooledTextEncoder, T5Encoder


class Net(nn.Module):
    image_size = [1, 3, 8, 8]
    concat_channels, context_shape, vector_size = 3, [7, 16], 32

    def __init__(self):
        super().__init__()
        self.first, self.vector = nn.Conv2d(6, 16, 3, padding=1), nn.Linear(32, 16)
        self.attention = nn.MultiheadAttention(16, 2, batch_first=True)
        self.last = nn.Conv2d(16, 3, 3, padding=1)

    def forward(self, x, t, concat, context, vector):
        h = self.first(torch.cat([x, concat], dim=1)) + self.vector(vector)[:, :, None, None]
        queries = h.flatten(2).transpose(1, 2)
        read, _ = self.attention(queries, context, context)
        return self.last(torch.relu(h + read.transpose(1, 2).unflatten(2, h.shape[2:])))


class Blind(Net):
    context_shape = None


def make():
    return [SuperResolution(2, (8, 8)), TextContext(T5Encoder("{root}/t5", 7), rate=0.2),
            TextVector(PooledTextEncoder("{root}/projection", 9), rate=0.2, unknown="zeros")]


def longer():
    return [*make()[:1], TextContext(T5Encoder("{root}/t5", 8)), make()[2]]


def flat():
    return [TextContext(lambda texts: torch.zeros(len(texts)))]
'''


def test_a_model_and_text_conditioners_of_ones_own(root, tmp_path, run_main):
    path, own = write_config(root, tmp_path / "config.py"), tmp_path / "own.py"
    own.write_text(OWN.format(root=root))
    backbone = f'    config.backbone = {{"name": "factory", "factory": "{own}:Net"}}\n'
    path.write_text(path.read_text().replace("    config.schedule", backbone + "    config.schedule"))
    task = f"--config.cond.task={own}:make"
    ran = run_main(train.main, f"--config={path}", task, f"--workdir={tmp_path / 'run'}")
    assert ran.status == 0, ran.stderr
    known = [f"--config={path}", task, f"--checkpoint={tmp_path / 'run'}", f"--images={root / 'images'}"]
    ran = run_main(sample.main, *known, "--prompts=a cat", "--seeds=0-3", "--config.sampler.cfg_scale=2",
                   f"--out={tmp_path / 'out'}")
    assert ran.status == 0, ran.stderr
    chain = chain_of(path, tmp_path / "run", root / "images", "a cat", cond__task=f"{own}:make")
    cond = chain.shown([0, 1])
    null = chain._null(cond)
    assert torch.equal(null["context"], T5Encoder(str(root / "t5"), 7).empty.expand(2, -1, -1))
    assert not null["vector"].any()
    assert torch.equal(null["concat"], cond["concat"])  # its rate is 0: guidance is by the text alone
    for arguments, message in (
        ([f"--config.cond.task={own}:longer"], "it gives a context of 8x16, this Net takes a context of 7x16"),
        ([f"--config.cond.task={own}:flat"], r"TextContext gives (1,) float32 for b=1; want (b,) int64 labels"),
        ([task, f"--config.backbone.factory={own}:Blind"],
         "the model's call needs a context, so that it must have the attribute context_shape; its value is None"),
    ):
        ran = run_main(train.main, f"--config={path}", *arguments, f"--workdir={tmp_path / 'bad'}")
        assert ran.status == 2, ran.stderr
        assert message in ran.stderr.splitlines()[-1]


def test_a_model_of_texts_alone_is_shown_no_images(root, tmp_path, run_main):
    path = write_config(root, tmp_path / "config.py", task="text", concat=0)
    ran = run_main(train.main, f"--config={path}", f"--workdir={tmp_path / 'run'}", "--config.cond.text_drop=0.2",
                   "--config.data.name=webdataset", f"--config.data.path={shards(root, tmp_path, run_main)}")
    assert ran.status == 0, ran.stderr
    assert Image.open(tmp_path / "run/previews/00000004.png").width == 2 + 2 * 34  # the samples alone
    known = [f"--config={path}", f"--checkpoint={tmp_path / 'run'}", "--seeds=0-4"]
    ran = run_main(sample.main, *known, "--prompts=a cat", f"--out={tmp_path / 'out'}", "--config.sampler.cfg_scale=2")
    assert ran.status == 0, ran.stderr
    assert chain_of(path, tmp_path / "run", prompts="a cat").conditioners.parts[0].rate == 0.2
    ran = run_main(eval_script.main, *known, "--prompts=a cat", f"--out={tmp_path / 'result.json'}")
    assert ran.status == 2
    assert "psnr needs a model of images" in ran.stderr
    ran = run_main(sample.main, *known, "--prompts=a cat", f"--images={root / 'images'}", f"--out={tmp_path / 'no'}")
    assert ran.status == 2
    assert "this model's conditions (cond.task='text') are made of no image" in ran.stderr


def shards(root, tmp_path, run_main):
    ran = run_main(prepare_data.main, "webdataset", f"--out={tmp_path / 'shards'}", root / "pictures")
    assert ran.status == 0, ran.stderr
    return tmp_path / "shards"


def test_bad_input_gets_a_line(root, trained, tmp_path, run_main):
    path, run = trained
    known = [f"--config={path}", f"--checkpoint={run}", "--seeds=0", f"--out={tmp_path / 'out'}"]
    learning = [f"--config={path}", f"--workdir={tmp_path / 'run'}"]
    for main, argv, message in (
        (sample.main, [*known, f"--images={root / 'images'}"],
         "--prompts is missing: a text, a .txt file with one a line, or a .json file of COCO's captions, of which"),
        (sample.main, [*known, "--prompts=a cat"], "--images is missing: a folder of images, of which this"),
        (train.main, [*learning, "--config.data.name=folder"],
         "it reads captions, which this data set has not; choose data.name=webdataset or captioned_folder"),
        (train.main, [*learning, "--config.cond.task=super_resolution"],
         "it gives no context, this UViT takes a context of 9x32"),
        (train.main, [*learning, "--config.cond.tokens=8"],
         "it gives a context of 8x32, this UViT takes a context of 9x32"),
        (train.main, [*learning, "--config.cond.task=super_resolution,text,pooled_text"],
         "it gives the condition 'vector', which this UViT does not take"),
        (train.main, [*learning, "--config.cond.task=super_resolution,text,text"],
         "it gives a context of 9x64, this UViT takes a context of 9x32"),
        (train.main, [*learning, "--config.cond.text_null=nothing"], "cond.text_null='nothing'"),
        (train.main, [*learning, "--config.cond.text_drop=2"], "--config.cond.text_drop=2.0 must lie between 0 and 1"),
        (train.main, [*learning, f"--config.cond.text_encoder={root / 'images'}"], "holds no CLIPTextModel"),
    ):
        ran = run_main(main, *argv)
        assert ran.status == 2, (argv, ran.stderr)
        [line] = [line for line in ran.stderr.splitlines() if line.startswith("error")]
        assert message in line, line

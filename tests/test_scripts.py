"""The shell scripts, on a stand-in for a virtual environment that notes calls: the environment that they share, and the
commands that they run, which are then run here.
"""

import importlib
import json
import subprocess
from pathlib import Path

import numpy as np
import pytest
from network_pipelines import PIPELINES
from PIL import Image
from shell_scripts import BASH, SCRIPTS, noting
from small_shards import png

from libs.seeds import parse_seeds
from libs.tables import fill_tables

ENV_SH = SCRIPTS / "env.sh"

PYTHON = """#!{bash}
[ "$1" = -c ] && exit 0
echo "$@" >> calls
exit $(cat pip_status)
"""


@pytest.fixture
def project(tmp_path) -> Path:
    (tmp_path / "venv/bin").mkdir(parents=True)
    (tmp_path / "venv/bin/python").write_text(PYTHON.format(bash=BASH))
    (tmp_path / "venv/bin/python").chmod(0o755)
    (tmp_path / "venv/bin/activate").write_text("echo activated\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "requirements-dev.txt").write_text("-r requirements.txt\n")
    (tmp_path / "pip_status").write_text("0")
    return tmp_path


def source_env(project, requirements, **env):
    command = [BASH, "-c", f"set -euo pipefail; source {ENV_SH} {requirements}"]
    env = {"PATH": "/usr/bin:/bin", "VENV": "venv"} | env
    ran = subprocess.run(command, cwd=project, env=env, capture_output=True, text=True)
    calls = (project / "calls").read_text().splitlines() if (project / "calls").exists() else []
    return ran, len(calls)


def test_installs_only_what_changed(project):
    ran, calls = source_env(project, "requirements-dev.txt")
    assert (ran.returncode, calls) == (0, 1)
    assert ran.stdout.splitlines()[-1] == "activated"

    ran, calls = source_env(project, "requirements-dev.txt")
    assert (ran.returncode, ran.stdout, calls) == (0, "activated\n", 1)

    (project / "requirements.txt").write_text("torch>=2.11\n")  # included by the development file
    assert source_env(project, "requirements-dev.txt")[1] == 2
    assert source_env(project, "requirements.txt")[1] == 3
    assert source_env(project, "requirements-dev.txt")[1] == 3


def test_failed_installation_is_repeated(project):
    (project / "pip_status").write_text("1")
    ran, calls = source_env(project, "requirements.txt")
    assert (ran.returncode, calls) == (1, 1)
    assert "activated" not in ran.stdout
    (project / "pip_status").write_text("0")
    assert source_env(project, "requirements.txt")[1] == 2


def test_no_python(project):
    ran, _ = source_env(project, "requirements.txt", PATH="/nowhere", VENV="other")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: no Python 3.11 or newer found")
    assert ran.stderr.count("\n") == 1


def test_python_without_venv(project):
    (project / "bin").mkdir()
    (project / "bin/python3").write_text(f'#!{BASH}\n[[ "$2" != *ensurepip* ]]\n')
    (project / "bin/python3").chmod(0o755)
    ran, _ = source_env(project, "requirements.txt", PATH=str(project / "bin"), VENV="other")
    assert (ran.returncode, ran.stdout) == (1, "")
    assert ran.stderr.startswith("error: python3 has no venv module; install it")
    assert ran.stderr.count("\n") == 1


# what the scripts of progressive distillation run

DIGITS_TINY = ("--config.compute.device=cpu", "--config.backbone.patch_size=4", "--config.backbone.embed_dim=16",
               "--config.backbone.depth=2", "--config.backbone.num_heads=2", "--config.train.batch_size=8")
UNET_TINY = ("--config.compute.device=cpu", "--config.backbone.channel=8", "--config.backbone.channel_multiplier=1,2",
             "--config.backbone.n_res_blocks=1", "--config.backbone.attn_strides=2", "--config.train.batch_size=2",
             "--config.train.preview_every=0")


@pytest.fixture
def run_script(tmp_path):
    return noting(tmp_path)


def run_call(run_main, call, *more):
    """Run one of the commands here, with more flags."""
    name, argv = (call[1], call[2:]) if call[0] == "-m" else (call[0].removesuffix(".py"), call[1:])
    ran = run_main(importlib.import_module(name).main, *argv, *more)
    assert ran.status == 0, (call, ran.stderr)
    return ran


def heads(calls):
    return [call[1] if call[0] == "-m" else call[0] for call in calls]


def test_digits(run_script, run_main, tmp_path):
    out = tmp_path / "a folder"
    ran, calls = run_script("digits.sh", out)
    assert ran.returncode == 0, ran.stderr
    assert heads(calls) == ["train.py", "distillate.py", *["sample.py"] * 4, "libs.montage", "libs.summary"]
    short = {"train.py": ["--config.train.steps=2"], "distillate.py": ["--config.distill.updates=2"],
             "libs.montage": [], "libs.summary": []}
    for call in calls:
        more = () if call[0] == "-m" else DIGITS_TINY
        run_call(run_main, call, *more, *short.get(call[0], []))
    nfe = {name: json.loads((out / name / "summary.json").read_text()) for name in
           ("base_16", "base_4", "student_8", "student_4")}
    assert [(each["nfe"], each["cfg_scale"]) for each in nfe.values()] == [(16, 2.5), (4, 2.5), (8, 1.0), (4, 1.0)]
    assert Image.open(out / "montage.png").height == 4 + 4 * (64 + 4)


@pytest.mark.parametrize("method", ["progressive", "hramchenko"])
def test_celebahq256(run_script, run_main, tmp_path, method):
    images, workdir = tmp_path / "images of faces", tmp_path / "run"
    images.mkdir()
    for i in range(3):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 18, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(images / f"{i}.png")
    ran, calls = run_script(
        "celebahq256_unet.sh", images.name, *UNET_TINY, cwd=tmp_path, METHOD=method, WORKDIR=workdir, SIZE=16,
        UPDATES_BASE=2, UPDATES="2,1", START=16, END=4, FULL=16, FEW=8, SEEDS="0-1", CLIPPING="0.5 1",
        DISTIL_FLAGS="--config.distill.gamma=0 --config.distill.clip_teacher=true")
    assert ran.returncode == 0, ran.stderr
    assert heads(calls) == ["prepare_data.py", "train.py", "distillate.py", *["sample.py"] * 3, "libs.montage",
                            *["sample.py"] * 2, "libs.montage"]
    for call in calls:
        run_call(run_main, call)

    stages = json.loads((workdir / method / "stages.json").read_text())["stages"]
    assert [(stage["steps"], stage["done"]) for stage in stages] == [(8, 2), (4, 1)]
    samples = workdir / f"{method}_samples"
    made = {path.parent.name: json.loads(path.read_text()) for path in samples.glob("*/summary.json")}
    sampler = {"progressive": "ddim", "hramchenko": "ddpm"}[method]
    assert {name: (each["sampler"], each["nfe"]) for name, each in made.items()} == {
        "base_16": (sampler, 16), "base_8": (sampler, 8), "student_4": (sampler, 4), "clipped_0.5": ("clipped", 4),
        "clipped_1": ("clipped", 4)}
    rows = {samples / "student_4/montage.png": 5, workdir / f"{method}_steps.png": 3,
            workdir / f"{method}_clipping.png": 2}
    assert {path: (Image.open(path).height - 4) / (64 + 4) for path in rows} == rows
    two = [np.array(Image.open(samples / f"clipped_{value}/000000.png")).astype(int) for value in ("0.5", "1")]
    assert abs(two[0] - 127.5).max() <= 64 < abs(two[1] - 127.5).max()


def test_celebahq256_lengths_are_those_of_the_recipe(run_script, tmp_path):
    _, calls = run_script("celebahq256_unet.sh", tmp_path)
    flags = dict(word.split("=", 1) for call in calls[1:3] for word in call[1:])
    updates = [int(each) for each in flags["--config.distill.updates"].split(",")]
    assert [round(3 * each, -3) for each in updates] == [5000] * 4 + [10_000] * 3
    assert flags["--config.train.steps"] == "50000"
    assert (flags["--config.distill.start_steps"], flags["--config.distill.end_steps"]) == ("1024", "8")


@pytest.mark.parametrize(("argv", "env", "message"), [
    ([], {}, "error: no folder of images given; usage: bash scripts/celebahq256_unet.sh IMAGES [FLAGS]\n"),
    (["nowhere"], {}, "is no folder; want one with CelebA-HQ's pictures\n"),
    (["."], {"METHOD": "fast"}, "error: METHOD=fast: choose from progressive, hramchenko\n"),
])
def test_celebahq256_refuses(run_script, argv, env, message):
    ran, calls = run_script("celebahq256_unet.sh", *argv, **env)
    assert (ran.returncode, calls) == (2, [])
    assert ran.stderr.endswith(message)
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("given", [{}, {"START": 16, "END": 4, "UPDATES": 7, "SAMPLES": 9, "PRECISION": "bf16"}])
def test_cifar10(run_script, run_main, given):
    ran, calls = run_script("cifar10_unet.sh", "--config.data.download=true", **given)
    assert ran.returncode == 0, ran.stderr
    steps = [8, 4] if given else [512, 256, 128, 64, 32, 16, 8, 4, 2]
    assert heads(calls) == ["distillate.py", *["eval.py"] * (1 + len(steps)), "libs.montage"] * 2
    for model, part in (("cifar10_unet", calls[:len(calls) // 2]), ("cifar10_uvit_tiny", calls[len(calls) // 2:])):
        assert all(f"configs/{model}.py" in call[1] for call in part[:-1])
        for call in part[:-1]:
            run_call(run_main, call, "--help")
        asked = [set(call) for call in part]
        assert "--config.data.download=true" in asked[0]
        assert ("--config.distill.updates=7" in asked[0]) == bool(given)
        assert all(f"--config.compute.precision={given.get('PRECISION', 'fp32')}" in each for each in asked[:-1])
        checkpoints = [word for call in part for word in call if word.startswith("--checkpoint=")]
        assert checkpoints == [f"--checkpoint=runs/cifar10_students/{model}/steps_{n:04d}" for n in steps]
        seeds = [word.partition("=")[2] for call in part for word in call if word.startswith("--seeds=")]
        assert [len(parse_seeds(each)) for each in seeds] == ([9] * 4 if given else [500] * 10 + [16])
        assert len(part[-1]) == 4 + 1 + len(steps)


def test_cifar10_one_model(run_script):
    _, calls = run_script("cifar10_unet.sh", MODELS="cifar10_uvit_tiny", START=8)
    assert all("cifar10_unet" not in word for call in calls for word in call)
    assert calls


# those of Flash Diffusion

PIPELINE_TINY = ("--config.compute.device=cpu", "--config.train.steps=2", "--config.train.batch_size=2",
                 "--config.train.preview_every=0", "--config.distill.lora_rank=2", "--config.distill.teacher_steps=4",
                 "--config.distill.stage_updates=1,1,1,1")
LAUNCHED = ["launch", "--mixed_precision", "bf16"]


def values(call, flag):
    return [word.partition("=")[2] for word in call if word.startswith(f"{flag}=")]


@pytest.fixture
def coco(tmp_path):
    """MS-COCO's folder with two captions, and no images."""
    (tmp_path / "coco/val2017").mkdir(parents=True)
    (tmp_path / "coco/annotations").mkdir()
    content = {"images": [{"id": i, "file_name": f"{i}.jpg"} for i in range(2)],
               "annotations": [{"id": i, "image_id": i, "caption": f"picture {i}"} for i in range(2)]}
    (tmp_path / "coco/annotations/captions_val2017.json").write_text(json.dumps(content))
    return tmp_path / "coco"


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_flash_of_a_pipeline(run_script, run_main, tmp_path, coco, name):
    """From pictures to the student's images; scores need networks that are not here, so they are only parsed."""
    (tmp_path / "words").mkdir()
    (tmp_path / "my pictures").mkdir()
    PIPELINES[name](tmp_path / "words").save_pretrained(tmp_path / "model")
    for i in range(3):
        (tmp_path / f"my pictures/{i}.png").write_bytes(png(i, (40, 36)))
        (tmp_path / f"my pictures/{i}.txt").write_text(f"picture {i}")
    workdir, out = tmp_path / "run", tmp_path / "out"
    ran, calls = run_script(f"flash_{name}.sh", "my pictures", coco.name, "--config.train.lr=1e-3", cwd=tmp_path,
                            WORKDIR=workdir, OUT=out, SAMPLES=2)
    assert ran.returncode == 0, ran.stderr
    assert calls[1][:3] == LAUNCHED
    assert calls[2][:3] == LAUNCHED
    calls = [call[3:] if call[:3] == LAUNCHED else call for call in calls]
    assert heads(calls) == ["prepare_data.py", "distillate.py", *["sample.py", "eval.py", "eval.py"] * 3]
    model = f"--config.pipeline.path={tmp_path / 'model'}"
    more = {"prepare_data.py": [], "distillate.py": [model, *PIPELINE_TINY], "eval.py": ["--help"],
            "sample.py": [model, "--config.compute.device=cpu", "--config.compute.precision=fp32"]}
    for call in calls:
        run_call(run_main, call, *more[call[0]])
    assert values(calls[1], "--config.train.lr") == ["1e-3"]
    assert ("--config.train.grad_checkpoint=true" in calls[1]) == (name == "sdxl")
    told = {path.parent.name: json.loads(path.read_text()) for path in out.glob("*/summary.json")}
    assert {key: (each["nfe"], each["sampler"], bool(each["student"])) for key, each in told.items()} == {
        "student_4": (4, "own", True), "student_2": (2, "own", True), "dpm_solver_pp_4": (4, "dpm_solver_pp", False)}
    scored = [call for call in calls if call[0] == "eval.py"]
    assert [values(call, "--config.eval.metrics") for call in scored] == [["fid"], ["clip_score"]] * 3
    assert {Path(values(call, "--images")[0]).name for call in scored} == told.keys()


def test_flash_of_shards_that_are_there(run_script, tmp_path, coco):
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards/0.tar").touch()
    for given, seen in (("shards", str(tmp_path / "shards")), ("https://host/{00..09}.tar",) * 2):
        _, calls = run_script("flash_sd15.sh", given, coco, cwd=tmp_path, LAUNCH="python", MIN_SCORE=6)
        call = calls[-10]
        assert call[0] == "distillate.py"
        assert values(call, "--config.data.path") == [seen]
        assert values(call, "--config.data.min_score") == ["6"]
    assert "prepare_data.py" not in heads(calls)


@pytest.mark.parametrize(("name", "argv", "env", "message"), [
    ("flash_sd15.sh", ["."], {}, "error: PICTURES and COCO are missing; usage: bash "),
    ("flash_sdxl.sh", [".", "nowhere"], {}, "nowhere/annotations/captions_val2017.json is not there; cocodataset.org"),
    ("cifar10_flash.sh", [], {"STUDENTS": "whole half"},
     "error: STUDENTS: 'half' is none; choose from whole, lora\n"),
    ("flash_ablation.sh", [], {"ARMS": "modes both"},
     "error: ARMS: 'both' is none; choose from distil, dmd, adversarial, uniform, modes\n"),
])
def test_flash_refuses(run_script, name, argv, env, message):
    ran, calls = run_script(name, *argv, **env)
    assert (ran.returncode, calls) == (2, [])
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


@pytest.mark.parametrize("given", [{}, {"STUDENTS": "lora", "UPDATES": 7, "SAMPLES": 9, "RANK": 4}])
def test_cifar10_flash(run_script, run_main, tmp_path, given):
    out, workdir = tmp_path / "out", tmp_path / "run"
    out.mkdir()
    (out / "table.md").touch()
    ran, calls = run_script("cifar10_flash.sh", "--config.data.download=true", OUT=out, WORKDIR=workdir, **given)
    assert ran.returncode == 0, ran.stderr
    students = ["lora"] if given else ["whole", "lora"]
    assert heads(calls) == [*["distillate.py"] * len(students),
                            *[*["eval.py"] * (2 + len(students)), "libs.montage"] * 2, "libs.tables"]
    trained, scored = ([call for call in calls if call[0] == name] for name in ("distillate.py", "eval.py"))
    for call in (*trained, *scored):
        run_call(run_main, call, "--help")
    assert all("--config.data.download=true" in call for call in trained)
    ranks = {values(call, "--workdir")[0]: values(call, "--config.distill.lora_rank") for call in trained}
    assert ranks == {str(workdir / name): ["0" if name == "whole" else str(given.get("RANK", 64))] for name in students}
    updates = given.get("UPDATES", 5000)
    for call in trained:
        assert values(call, "--config.train.steps") == [str(4 * updates)]
        assert values(call, "--config.distill.stage_updates") == [",".join([str(updates)] * 4)]
    assert [values(call, "--checkpoint") for call in scored] == 2 * [[], [], *[[str(workdir / name)] for name in
                                                                              students]]
    assert [values(call, "--config.sampler.steps") for call in scored] == [[each] for each in "42" for _ in
                                                                           range(2 + len(students))]
    assert {values(call, "--config")[0] for call in scored} == {"configs/cifar10_unet.py",
                                                                "configs/cifar10_unet.py:dpm_solver_pp"}
    assert all(len(parse_seeds(values(call, "--seeds")[0])) == given.get("SAMPLES", 500) for call in scored)


def test_flash_ablation(run_script, run_main, tmp_path):
    """Every arm with the same updates, then two of them run on a small teacher up to the table."""
    out, workdir, arms = tmp_path / "out", tmp_path / "run", ["distil", "dmd", "adversarial", "uniform", "modes"]
    out.mkdir()
    (out / "table.md").touch()
    ran, calls = run_script("flash_ablation.sh", OUT=out, WORKDIR=workdir, SEEDS="3 5")
    assert ran.returncode == 0, ran.stderr
    assert heads(calls) == [*["distillate.py", "eval.py"] * 10, "libs.tables"]
    trained = [call for call in calls if call[0] == "distillate.py"]
    assert [values(call, "--workdir") for call in trained] == [[f"{workdir}/{arm}_{seed}"] for seed in "35"
                                                               for arm in arms]
    own = ("--config.distill.dmd_scale", "--config.distill.adversarial_scale", "--config.distill.start")
    assert [[values(call, flag) for flag in own] for call in trained[:5]] == [
        [["0"], ["0"], []], [[], ["0"], []], [["0"], [], []], [[], [], ["uniform"]], [[], [], []]]
    same = {tuple(word for word in call if not word.startswith((*own, "--workdir", "--config.seed")))
            for call in trained}
    assert len(same) == 1
    for call in calls[:2]:
        run_call(run_main, call, "--help")

    for i in range(10):
        (tmp_path / f"images/{i}").mkdir(parents=True)
        (tmp_path / f"images/{i}/0.png").write_bytes(png(20 * i, (32, 32)))
    small = ("--config.compute.device=cpu", "--config.compute.rows=4", "--config.backbone.block_out_channels=32,32",
             "--config.backbone.layers_per_block=1", "--config.backbone.attention_head_dim=32",
             "--config.backbone.down_block_types=DownBlock2D,AttnDownBlock2D",
             "--config.backbone.up_block_types=AttnUpBlock2D,UpBlock2D", "--config.data.name=folder",
             f"--config.data.path={tmp_path}/images", "--config.data.labels=folders")
    train = ("--config.train.batch_size=4", "--config.train.preview_every=0")
    taught = run_main(importlib.import_module("train").main, "--config=configs/cifar10_unet.py", *small, *train,
                      "--config.train.steps=1", "--config.train.eval_every=0", f"--workdir={tmp_path}/teacher")
    assert taught.status == 0, taught.stderr
    _, both = run_script("flash_ablation.sh", f"--checkpoint={tmp_path}/teacher", *train, OUT=out, WORKDIR=workdir,
                         ARMS="distil modes", UPDATES="1,1,1,1", RANK=2, SAMPLES=4)
    for call in both[:-1]:
        run_call(run_main, call, *small)
    told = [json.loads((out / f"{arm}_{seed}.json").read_text()) for arm in ("distil", "modes") for seed in "01"]
    assert all((each["nfe"], each["samples"], each["sampler"]["name"]) == (4, 4, "lcm") for each in told)
    table = fill_tables((out / "table.md").read_text(), out).splitlines()
    assert [line.split(" | ")[:4] for line in table[3:]] == [["| distillation", "pi_s", "4", "2"],
                                                             ["| all three", "pi_s", "4", "2"]]

"""The U-ViT recipes: each of their stages, alone, on a stand-in for a virtual environment that notes the commands;
these are then parsed by the scripts that they call. What a stage needs of the internet is put at its place before.
"""

import importlib
import json
import math
import os
import re
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from documentation import pages
from shell_scripts import BASH, SCRIPTS, noting

from libs.config import load
from libs.policies.exit_schedule import depths_of
from libs.seeds import parse_seeds

# What the stages read of zip files and of results, they read.
ANSWERS = f'[ "$1" = -c ] && [[ $2 = *zipfile* || $2 = *executed_ratio* ]] && exec {sys.executable} "$@"'
PUBLISHED = {line.split("\t")[0]: line.split("\t")[1] for line in (SCRIPTS / "downloads.tsv").read_text().splitlines()
             if line and not line.startswith("#")}

# recipe, MODEL, config, published weights, samples, threshold, updates of the fine-tuning
RECIPES = [
    ("cifar10_uvit", None, "cifar10_uvit_small", "cifar10_uvit_small", 50_000, 0.92, 75_000),
    ("celeba64_uvit", None, "celeba64_uvit_small", "celeba64_uvit_small", 50_000, 0.95, 200_000),
    ("imagenet64_uvit", "mid", "imagenet64_uvit_mid", "imagenet64_uvit_mid", 50_000, 0.92, 110_000),
    ("imagenet64_uvit", "large", "imagenet64_uvit_large", "imagenet64_uvit_large", 50_000, 0.92, 110_000),
    ("imagenet256_uvit", "large", "imagenet256_uvit_large", "imagenet256_uvit_large", 50_000, 0.92, 110_000),
    ("imagenet256_uvit", "huge", "imagenet256_uvit_huge", "imagenet256_uvit_huge", 50_000, 0.92, 110_000),
    ("imagenet512_uvit", "large", "imagenet512_uvit_large", "imagenet512_uvit_large", 50_000, 0.92, 110_000),
    ("imagenet512_uvit", "huge", "imagenet512_uvit_huge", "imagenet512_uvit_huge", 50_000, 0.92, 110_000),
    ("mscoco_uvit", "small", "mscoco_uvit_small", "mscoco_uvit_small", 30_000, 0.87, 330_000),
    ("mscoco_uvit", "deep", "mscoco_uvit_deep", "mscoco_uvit_small_deep", 30_000, 0.87, 330_000),
]
NAMES = sorted({row[0] for row in RECIPES})


@pytest.fixture
def recipe(tmp_path):
    """Run a stage of scripts/NAME.sh with DATA, WORKDIR and OUT in a folder of its own: status, what it said, calls."""
    places = {name: tmp_path / "my files" / name.lower() for name in ("DATA", "WORKDIR", "OUT")}
    run_script = noting(tmp_path, ANSWERS, **places)

    def run(name, *argv, **options):
        ran, calls = run_script(f"{name}.sh", *argv, **options)
        return SimpleNamespace(status=ran.returncode, stdout=ran.stdout, stderr=ran.stderr, calls=calls)

    run.data, run.workdir, run.out = places.values()
    return run


def put(data, *names):
    """Files at the places of published ones, so that nothing is fetched."""
    for path in (data / PUBLISHED[name] for name in names):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def put_all(data):
    put(data, *PUBLISHED)
    (data / "celeba/img_align_celeba").mkdir()
    with zipfile.ZipFile(data / PUBLISHED["coco_annotations2014"], "w") as file:
        file.writestr("annotations/captions_val2014.json", "{}")


def parses(run_main, call):
    """See that the script takes the flags and the fields of the config."""
    name, argv = (call[1], call[2:]) if call[0] == "-m" else (call[0].removesuffix(".py"), call[1:])
    if name == "libs.tables":  # takes files alone
        return
    ran = run_main(importlib.import_module(name).main, *argv, "--help")
    assert ran.status == 0, (call, ran.stderr)


def values(call, flag):
    return [word.partition("=")[2] for word in call if word.startswith(f"{flag}=")]


def value(call, flag):
    """Of the last word that sets it, as the scripts take it."""
    return values(call, flag)[-1]


def heads(calls):
    return [call[1] if call[0] == "-m" else call[0] for call in calls]


@pytest.mark.parametrize("path", sorted(SCRIPTS.glob("*.sh")), ids=lambda path: path.name)
def test_shell_syntax(path):
    ran = subprocess.run([BASH, "-n", path], capture_output=True, text=True)
    assert (ran.returncode, ran.stderr) == (0, "")


@pytest.mark.parametrize(("name", "model", "config", "weights", "samples", "threshold", "updates"), RECIPES)
def test_train_and_finetune(recipe, run_main, name, model, config, weights, samples, threshold, updates):
    put(recipe.data, weights)
    ran = recipe(name, "train", "--config.train.batch_size=8", MODEL=model, PRECISION="bf16")
    assert (ran.status, ran.stderr) == (0, "")
    assert heads(ran.calls) == ["train.py"]
    call = ran.calls[0]
    parses(run_main, call)
    assert value(call, "--config") == f"configs/{config}.py"
    assert value(call, "--workdir") == str(recipe.workdir / "train")
    assert value(call, "--config.train.batch_size") == "8"
    assert value(call, "--config.compute.precision") == "bf16"
    assert not values(call, "--checkpoint")

    ran = recipe(name, "finetune", MODEL=model)
    assert (ran.status, ran.stderr) == (0, "")
    assert heads(ran.calls) == ["train.py"]
    call = ran.calls[0]
    parses(run_main, call)
    assert value(call, "--config") == f"configs/{config}.py:early_exit"
    assert value(call, "--checkpoint") == str(recipe.data / PUBLISHED[weights])
    assert value(call, "--workdir") == str(recipe.workdir / "early_exit")
    shown = run_main(importlib.import_module("train").main, *call[1:], "--help").stdout
    assert f"--config.train.steps={updates}\n" in shown


@pytest.mark.parametrize(("name", "model", "config", "weights", "samples", "threshold", "updates"), RECIPES)
def test_evaluate(recipe, run_main, name, model, config, weights, samples, threshold, updates):
    put_all(recipe.data)
    recipe.out.mkdir(parents=True)
    (recipe.out / "1_before.json").touch()  # as the noted command would
    rows = "before after per_sample schedule released pictures"
    ran = recipe(name, "evaluate", "--config.sampler.steps=7", MODEL=model, ROWS=rows)
    assert (ran.status, ran.stderr) == (0, "")
    assert heads(ran.calls) == ["eval.py"] * 5 + ["libs.exits.report", "libs.tables"]
    for call in ran.calls:
        parses(run_main, call)
    before, after, per_sample, schedule, released, report, _ = ran.calls
    assert [Path(value(call, "--out")).name for call in ran.calls[:-1]] == [
        "1_before.json", "2_after.json", "3_per_sample.json", "4_schedule.json", "5_released.json", "exits"]
    for call in ran.calls[:5]:
        assert len(parse_seeds(value(call, "--seeds"))) == samples
        assert value(call, "--config.sampler.steps") == "7"
        assert Path(value(call, "--config.eval.reference")).is_file()
    assert value(before, "--checkpoint") == str(recipe.data / PUBLISHED[weights])
    assert [value(call, "--config") for call in (before, after)] == [f"configs/{config}.py"] * 2
    for call in (after, per_sample, schedule, released, report):
        assert value(call, "--checkpoint") == str(recipe.workdir / "early_exit")
    for call in (per_sample, schedule, released, report):
        assert value(call, "--config") == f"configs/{config}.py:early_exit"
        assert float(value(call, "--config.policy.threshold")) == threshold
    assert [values(call, "--config.policy.mode") for call in ran.calls[2:6]] == [[], ["schedule"], ["batch_mean"], []]
    assert value(released, "--config.compute.rows") == "1"


@pytest.mark.parametrize(("name", "model", "config"), [row[:3] for row in RECIPES])
def test_what_early_exit_is_compared_with(recipe, run_main, name, model, config):
    put_all(recipe.data)
    recipe.out.mkdir(parents=True)
    (recipe.out / "4_schedule.json").write_text(json.dumps({"sampler": {"steps": 50},
                                                            "policy": {"executed_ratio": 0.55}}))
    ran = recipe(name, "evaluate", "--config.sampler.steps=50", MODEL=model, ROWS="fixed split fewer_steps")
    assert (ran.status, ran.stderr) == (0, "")
    *scores, tables = ran.calls
    assert tables[:2] == ["-m", "libs.tables"]
    assert [Path(value(call, "--out")).name for call in scores] == [
        "6_fixed.json", "7_split.json", "8_fewer_steps.json"]
    for call in scores:
        parses(run_main, call)
        assert value(call, "--checkpoint") == str(recipe.workdir / "early_exit")
    layers = load(f"configs/{config}.py").backbone.depth + 1
    depths = [depths_of(value(call, "--config.policy.schedule"), layers, torch.arange(50)) for call in scores[:2]]
    assert depths[0] == (math.floor(0.6 * layers + 0.5),) * 50
    assert depths[1] == (3,) * 25 + (layers,) * 25
    assert [values(call, "--config.policy.mode") for call in scores] == [["schedule"], ["schedule"], []]
    assert value(scores[2], "--config") == f"configs/{config}.py"
    assert value(scores[2], "--config.sampler.steps") == "28"


def test_rows_and_settings_of_the_user(recipe):
    put_all(recipe.data)
    ran = recipe("cifar10_uvit", "evaluate", ROWS="fixed split fewer_steps", FIXED=7, SPLIT="2x900,13x100", STEPS=9)
    assert ran.status == 0, ran.stderr
    assert [values(call, "--config.policy.schedule") for call in ran.calls] == [["7"], ["2x900,13x100"], []]
    assert value(ran.calls[2], "--config.sampler.steps") == "9"


@pytest.mark.parametrize(("rows", "message"), [
    ("fewer_steps", "4_schedule.json is not there; or set STEPS\n"),
    ("all", "choose from before, after, per_sample, schedule, released, fixed, split, fewer_steps, pictures\n")])
def test_rows_that_cannot_be_made(recipe, rows, message):
    put_all(recipe.data)
    ran = recipe("cifar10_uvit", "evaluate", ROWS=rows)
    assert (ran.status, ran.calls, ran.stderr.count("\n")) == (2, [], 1)
    assert ran.stderr.endswith(message)


@pytest.mark.parametrize("name", NAMES)
def test_prepare_with_what_was_published(recipe, run_main, name, tmp_path):
    put_all(recipe.data)
    folder = tmp_path / "the images"
    (folder / "train").mkdir(parents=True)
    argv = [folder.name] if name.startswith("imagenet") else []
    ran = recipe(name, "prepare", *argv, cwd=tmp_path)
    assert (ran.status, ran.stderr) == (0, "")
    if argv:
        assert (recipe.data / "imagenet").resolve() == folder
    commands = [call for call in ran.calls if call[0] != "-c"]
    made = {"imagenet256_uvit": ["latents"], "imagenet512_uvit": ["latents"],
            "mscoco_uvit": ["latents", "text"] * 2}.get(name, [])
    assert [call[:2] for call in commands] == [["prepare_data.py", each] for each in made]
    for call in commands:
        parses_of_command(run_main, call)
        assert value(call, "--out") == str(recipe.data / f"{name.replace('mscoco', 'coco256')[:-5]}_features")
    if name == "mscoco_uvit":
        assert [value(call, "--split") for call in commands] == ["train", "train", "val", "val"]
        again = recipe(name, "evaluate", ROWS="before").calls[0]
        assert Path(value(again, "--prompts")).read_text() == "{}"


def parses_of_command(run_main, call):
    ran = run_main(importlib.import_module("prepare_data").main, *call[1:], "--help")
    assert ran.status == 0, (call, ran.stderr)


@pytest.mark.parametrize("name", NAMES)
def test_prepare_own_statistics(recipe, run_main, name, tmp_path):
    put_all(recipe.data)
    (recipe.data / "imagenet/train").mkdir(parents=True)
    ran = recipe(name, "prepare", STATS="own")
    assert (ran.status, ran.stderr) == (0, "")
    call = ran.calls[-1]
    assert call[:2] == ["prepare_data.py", "stats"]
    parses_of_command(run_main, call)
    out = Path(value(call, "--out"))
    assert (out.parent, out.name[-8:]) == (recipe.data / "fid_stats", "_own.npz")
    out.touch()
    ran = recipe(name, "evaluate", STATS="own", ROWS="before")
    assert value(ran.calls[0], "--config.eval.reference") == str(out)


def test_the_users_models(recipe, run_main):
    """BASE and a training of one's own go before the published weights; METHOD and EXIT name the early-exit model."""
    put(recipe.data, "fid_stats_cifar10")
    (recipe.workdir / "train/ckpts").mkdir(parents=True)
    ran = recipe("cifar10_uvit", "finetune", METHOD="early_exit_paper")
    assert ran.status == 0, ran.stderr
    call = ran.calls[0]
    parses(run_main, call)
    assert (value(call, "--config"), value(call, "--checkpoint"), value(call, "--workdir")) == (
        "configs/cifar10_uvit_small.py:early_exit_paper", str(recipe.workdir / "train"),
        str(recipe.workdir / "early_exit_paper"))
    ran = recipe("cifar10_uvit", "evaluate", BASE="mine", EXIT="adadiff.pth", ROWS="before per_sample", SAMPLES=9,
                 THRESHOLD=0.9, BENCHMARK="", LAUNCH="python -u")
    assert ran.status == 0, ran.stderr
    before, per_sample = ran.calls
    assert before[:2] == ["-u", "eval.py"]
    assert (value(before, "--checkpoint"), value(per_sample, "--checkpoint")) == ("mine", "adadiff.pth")
    assert (value(per_sample, "--seeds"), value(per_sample, "--config.policy.threshold")) == ("0-8", "0.9")
    assert "--benchmark" not in before


@pytest.mark.parametrize(("name", "argv", "env", "message"), [
    ("cifar10_uvit", [], {}, "error: no stage given; usage: bash "),
    ("cifar10_uvit", ["trian"], {}, "error: 'trian' is no stage; usage: bash "),
    ("imagenet64_uvit", ["train"], {"MODEL": "huge"}, "error: MODEL=huge: choose from mid, large\n"),
    ("mscoco_uvit", ["train"], {"MODEL": "large"}, "error: MODEL=large: choose from small, deep\n"),
    ("cifar10_uvit", ["evaluate"], {"STATS": "none"}, "error: STATS=none: choose from published, own\n"),
    ("cifar10_uvit", ["finetune"], {"METHOD": "full"},
     "error: METHOD=full: choose from early_exit, early_exit_paper\n"),
    ("imagenet256_uvit", ["prepare"], {}, "/imagenet is not there, and prepare was given no folder\n"),
    ("imagenet64_uvit", ["prepare", "nowhere"], {}, "/nowhere is no folder\n"),
    ("mscoco_uvit", ["prepare", "."], {}, "2014.zip"),
    ("celeba64_uvit", ["evaluate"], {},
     "fid_stats_celeba64_train_50000_ddim.npz is not there; the stage prepare makes it\n"),
])
def test_mistakes_are_told_in_one_line(recipe, name, argv, env, message):
    ran = recipe(name, *argv, **env)
    assert (ran.status, ran.calls) == (2, [])
    assert message in ran.stderr
    assert ran.stderr.count("\n") == 1


def test_no_other_folder_is_replaced(recipe, tmp_path):
    (recipe.data / "imagenet/train").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    ran = recipe("imagenet64_uvit", "prepare", tmp_path / "other")
    assert ran.status == 2
    assert ran.stderr.endswith(f"/imagenet is there, and is another folder than {tmp_path / 'other'}\n")
    assert os.listdir(recipe.data / "imagenet") == ["train"]


def test_a_host_that_refuses_ends_the_stage(recipe):
    """AdaDiff's host hands nothing out: the link and the place are told, and nothing is trained."""
    ran = recipe("cifar10_uvit", "finetune", PATH="/nowhere:/usr/bin:/bin", http_proxy="http://127.0.0.1:9",
                 https_proxy="http://127.0.0.1:9")
    assert (ran.status, ran.calls) == (1, [])
    assert ran.stderr.startswith("error: cifar10_uvit_small: curl: ")
    assert ran.stderr.endswith(f"its place is {recipe.data / PUBLISHED['cifar10_uvit_small']}\n")


def test_recipes_in_docstrings_and_documentation_are_there():
    found = set()
    for path in (*pages(), *SCRIPTS.parent.glob("configs/*.py")):
        found |= set(re.findall(r"bash scripts/(\w+_uvit)\.sh(?: (\w+))?", path.read_text()))
    assert {name for name, _ in found} >= set(NAMES)
    assert {stage for name, stage in found if name in NAMES} <= {"", "prepare", "train", "finetune", "evaluate"}

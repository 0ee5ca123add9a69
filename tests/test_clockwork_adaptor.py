"""Clockwork's distillation: what is learnt from, that only the adaptor learns, that a run goes on, and its file."""

import json
import os
import signal

import numpy as np
import pytest
import torch
from ml_collections import ConfigDict
from PIL import Image
from tiny_pipelines import prompted
from two_processes import run_in_two

import distillate
import sample
from libs import config as config_files
from libs.adaptors import DeepFeatures, ResNetAdaptor
from libs.adaptors.files import load_adaptor
from libs.build import describe, load_chain
from libs.checkpoint import build_backbone, load_described, read, save_backbone
from libs.config import override
from libs.distillation import adaptor_training
from libs.distillation.trajectories import (
    FIRST_SEED,
    Trajectories,
    chain_teacher,
    deep_part,
    reuse_runs,
    unrolled_error,
)
from libs.policies.clockwork import Clockwork
from libs.processes import Processes

CPU = torch.device("cpu")
CONFIG = "configs/cifar10_unet.py"
TINY = {"compute.device": "cpu", "compute.rows": 4, "backbone.sample_size": 16, "backbone.block_out_channels":
        "8,16,16,16", "backbone.layers_per_block": 1, "backbone.norm_num_groups": 4, "backbone.attention_head_dim": 8,
        "data.image_size": 16, "sampler.steps": 5}
FAST = {"distill.trajectories": 8, "distill.updates": 5, "distill.rounds_kept": 2, "distill.width": 16,
        "train.steps": 12, "train.batch_size": 8, "train.log_every": 1, "train.save_every": 4, "train.keep": 9}


def tiny_config(methods="", **options):
    config = config_files.load(f"{CONFIG}:{methods}")
    for field, value in {**TINY, **options}.items():
        override(config, field, str(value))
    return config


def flags_of(*tables):
    return [f"--config.{field}={value}" for table in tables for field, value in table.items()]


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """The file of a UNet of random weights."""
    config = tiny_config()
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("released") / "unet.safetensors"
    save_backbone(path, build_backbone(config.backbone).state_dict(), describe(config))
    return path


@pytest.fixture
def distil(released, tmp_path, run_main):
    """Run distillate.py on that UNet in a folder below tmp_path."""
    def run(name, **options):
        return run_main(distillate.main, f"--config={CONFIG}:clockwork_adaptor", *flags_of(TINY, FAST, options),
                        f"--checkpoint={released}", f"--workdir={tmp_path / name}")

    return run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "stats.jsonl").read_text().splitlines()]


def trajectories(released, options=None, **distill):
    config = tiny_config("clockwork_adaptor", **(options or {}))
    teacher = chain_teacher(config, str(released), CPU, frozenset(options or {}))
    section = ConfigDict({"trajectories": 6, "rounds_kept": 2, **distill})
    return teacher, Trajectories(teacher, deep_part(teacher.net, 0)[-1], section, 0, Processes(CPU))


# What an adaptor learns from


def test_runs_follow_the_schedule():
    assert reuse_runs(Clockwork(2), 5) == [range(1, 2), range(3, 4)]
    assert reuse_runs(Clockwork(4), 7) == [range(1, 4), range(5, 7)]
    assert reuse_runs(Clockwork(2, protect_first=3, protect_last=2), 8) == [range(3, 4), range(5, 6)]
    assert reuse_runs(Clockwork(2), 1) == []


@pytest.mark.parametrize("guidance", [1.0, 2.0])
def test_features_are_those_that_the_policy_sees(released, guidance):
    """An adaptor that hands back the recorded r_out makes Clockwork's images those of the whole network."""
    _, data = trajectories(released, {"sampler.cfg_scale": guidance})
    list(data.draw(0))
    seeds = data.seeds(0)
    assert min(seeds) >= FIRST_SEED
    assert len(data.r_in) == 2 * 6 * int(guidance)
    assert data.count == 6 * int(guidance)
    chain, _ = load_chain(tiny_config(**{"sampler.cfg_scale": guidance}), str(released), CPU)
    group = slice(0, 4 * int(guidance))  # the first group of four seeds, both rows of a guided pair
    labels = [seed % 10 for seed in seeds[:4]]
    plain = chain.sample(seeds[:4], labels)
    seen = []

    class Oracle(ResNetAdaptor):
        def forward(self, deep: DeepFeatures):
            step = 2 * len(seen) + 1
            seen.append(deep)
            for given, recorded in ((deep.r_in, data.r_in[group, step]), (deep.temb, data.temb[group, step]),
                                    (deep.r_prev, data.r_out[group, step - 1])):
                torch.testing.assert_close(given, recorded, atol=1e-5, rtol=1e-5)  # some processors differ in last bits
            return data.r_out[group, step]

    cache = Clockwork(2, adaptor=Oracle(8, 16, 32, 16)).attach(chain.policy.net)
    chain.policy = chain.denoiser.net = cache
    torch.testing.assert_close(chain.sample(seeds[:4], labels), plain, atol=1e-5, rtol=1e-5)
    assert len(seen) == 2


def test_rounds_are_functions_of_their_number(released):
    _, data = trajectories(released)
    for number in range(3):
        assert list(data.draw(number)) == [4, 6]
    _, other = trajectories(released)
    for number in (1, 2):
        list(other.draw(number))
    assert data.count == other.count == 12
    assert list(data.newest) == list(range(6))  # round 2 took the place of round 0
    for name in ("r_in", "r_out", "temb"):
        assert torch.equal(getattr(data, name), getattr(other, name))
    assert len(data.r_out.flatten(1).unique(dim=0)) == 12


def test_adaptor_goes_on_from_its_own_output(released):
    _, data = trajectories(released)
    list(data.draw(0))
    runs = reuse_runs(Clockwork(3), 5)
    assert runs == [range(1, 3), range(4, 5)]
    adaptor = ResNetAdaptor(8, 16, 32, 16)
    torch.nn.init.normal_(adaptor.last.weight, std=0.1)
    learned, identity, elements = unrolled_error(adaptor, data, runs, torch.arange(12))
    r_hat = {0: data.r_out[:6, 0], 3: data.r_out[:6, 3]}
    for t in (1, 2, 4):
        r_hat[t] = adaptor(DeepFeatures(r_in=data.r_in[:6, t], r_prev=r_hat[t - 1], temb=data.temb[:6, t]))
    expected = sum((data.r_out[:6, t] - r_hat[t]).square().sum() for t in (1, 2, 4))
    keys = {1: 0, 2: 0, 4: 3}
    torch.testing.assert_close(learned, expected)
    torch.testing.assert_close(
        identity, sum((data.r_out[:6, t] - data.r_out[:6, key]).square().sum() for t, key in keys.items()))
    assert elements == 3 * data.r_out[:6, 0].numel()


# distillate.py


def test_only_the_adaptor_learns(released, tmp_path, distil, monkeypatch):
    teachers = []
    plain = adaptor_training.AdaptorTraining.__init__

    def init(self, config, run, teacher):
        teachers.append(teacher)
        plain(self, config, run, teacher)

    monkeypatch.setattr(adaptor_training.AdaptorTraining, "__init__", init)
    ran = distil("run", **{"train.steps": 60, "distill.updates": 20, "train.lr": 2e-3, "train.log_every": 10})
    assert ran.status == 0, ran.stderr
    taught = teachers[0].net.state_dict()
    assert all(torch.equal(taught[name], held) for name, held in load_described(released)[0].state_dict().items())
    assert not any(each.requires_grad or each.grad is not None for each in teachers[0].net.parameters())

    rows = rows_of(tmp_path / "run")
    assert [row["step"] for row in rows] == [10, 20, 30, 40, 50, 60]
    assert all(row["loss"] == pytest.approx(row["ratio"] * row["identity_loss"]) for row in rows)
    assert rows[-1]["ratio"] < rows[0]["ratio"] < 1
    assert rows[0]["fresh_ratio"] == 1  # untrained it is the identity adaptor
    assert rows[-1]["fresh_ratio"] < 0.9
    assert (tmp_path / "run" / "loss.png").exists()

    adaptor, made_for = load_adaptor(tmp_path / "run" / "adaptor.safetensors")
    assert type(adaptor) is ResNetAdaptor
    assert (made_for["depth"], made_for["cut"], made_for["c_in"], made_for["c_out"]) == (1, "before", 8, 16)
    assert (made_for["clock"], made_for["steps"], made_for["sampler"]["name"]) == (2, 5, "ddim")
    assert torch.equal(made_for["stem"], taught["conv_in.weight"].half())
    # on trajectories that it never saw
    _, data = trajectories(released)
    list(data.draw(98))
    runs = reuse_runs(Clockwork(2), 5)
    learned, identity, _ = unrolled_error(adaptor, data, runs, torch.arange(data.count * len(runs)))
    assert learned < 0.9 * identity


def assert_equal_runs(one, other):
    for name in ("adaptor.safetensors", "ckpts/00000012/backbone_ema.safetensors"):
        (mine, about), (theirs, same) = (read(each / name) for each in (one, other))
        assert about == same
        assert mine.keys() == theirs.keys()
        assert all(torch.equal(mine[key], theirs[key]) for key in mine)
    states = [torch.load(each / "ckpts/00000012/train_state.pt", weights_only=True) for each in (one, other)]
    for index, held in states[0]["optimizer"].items():
        assert all(torch.equal(held[name], states[1]["optimizer"][index][name]) for name in held)
    rows = [[{name: row[name] for name in ("step", "loss", "ratio", "fresh_ratio")} for row in rows_of(each)]
            for each in (one, other)]
    assert rows[0] == rows[1]


def test_interrupted_run_goes_on_bit_for_bit(tmp_path, distil, monkeypatch):
    options = {"distill.clock": 3, "train.ema": 0.9}  # runs of two lengths
    assert distil("whole", **options).status == 0
    plain = Trajectories.record

    def stopping_at(number, action):
        calls = []

        def record(self, seeds):
            calls.append(seeds)
            if len(calls) == number:
                action()
            return plain(self, seeds)

        return record

    # killed in the middle of round 2 (the fifth group of four), after the checkpoint of step 8
    with monkeypatch.context() as patch:
        patch.setattr(Trajectories, "record", stopping_at(5, lambda: (_ for _ in ()).throw(KeyboardInterrupt)))
        assert distil("killed", **options).status == 130
    ran = distil("killed", **options)
    assert ran.status == 0
    assert "going on from step 8" in ran.stderr
    assert_equal_runs(tmp_path / "whole", tmp_path / "killed")

    # Ctrl-C while round 2 is drawn ends the group, saves step 10, where the round began
    with monkeypatch.context() as patch:
        patch.setattr(Trajectories, "record", stopping_at(5, lambda: os.kill(os.getpid(), signal.SIGINT)))
        ran = distil("stopped", **options)
        assert ran.status == 130
        assert "interrupted at step 10 of 12" in ran.stderr
    ran = distil("stopped", **options)
    assert "going on from step 10" in ran.stderr
    assert_equal_runs(tmp_path / "whole", tmp_path / "stopped")
    assert "is finished: 12 steps" in distil("stopped", **options).stderr

    # a time limit that is over at once, then none
    assert distil("limited", **options, **{"train.max_minutes": 1e-9}).status == 0
    assert not (tmp_path / "limited" / "adaptor.safetensors").exists()
    assert distil("limited", **options).status == 0
    assert_equal_runs(tmp_path / "whole", tmp_path / "limited")


def test_two_processes(released, tmp_path):
    """Each learns from trajectories of its own, so the losses are others than one process's; the adaptor is one."""
    run_in_two(distillate.main, [f"--config={CONFIG}:clockwork_adaptor",
                                 *flags_of(TINY, FAST, {"train.save_every": 40}),
                                 f"--checkpoint={released}", f"--workdir={tmp_path / 'two'}"])
    ratios = [row["fresh_ratio"] for row in rows_of(tmp_path / "two")]
    assert ratios[0] == pytest.approx(1)  # it begins as identity, over the trajectories of both
    assert ratios[-1] < 1
    assert sum(each.abs().sum() for each in load_adaptor(tmp_path / "two" / "adaptor.safetensors")[0].parameters()) > 0


def test_folder_belongs_to_one_sampler(distil):
    assert distil("run", **{"train.steps": 1}).status == 0
    ran = distil("run", **{"sampler.steps": 6})
    assert ran.status == 2
    assert "learns from trajectories with steps=5, not 6" in ran.stderr
    ran = distil("run", **{"distill.clock": 3})
    assert (ran.status, "--config.distill.clock=3" in ran.stderr) == (2, True)


@pytest.mark.parametrize("name", ["resnet", "ridge"])
def test_later_runs_name_the_file(released, tmp_path, distil, run_main, name):
    ran = distil("run", **{"distill.adaptor": name})
    assert ran.status == 0, ran.stderr
    file = tmp_path / "run" / "adaptor.safetensors"
    images = {}

    def sampled(to, *argv, adaptor=file):
        ran = run_main(sample.main, f"--config={CONFIG}:clockwork", *flags_of(TINY), f"--checkpoint={released}",
                       f"--config.policy.adaptor={adaptor}", "--seeds=0-1", f"--out={tmp_path / to}", *argv)
        return ran, [np.asarray(Image.open(path)) for path in sorted((tmp_path / to).glob("0*.png"))]

    for adaptor in (file, "identity"):
        ran, images[adaptor] = sampled(f"with_{name}" if adaptor == file else "identity", adaptor=adaptor)
        assert ran.status == 0, ran.stderr
    assert (images[file][0] != images["identity"][0]).any()
    for flag, text in (("policy.depth=2", "made for depth=1, but here depth=2"), ("policy.cut=after", "cut='before'"),
                       ("backbone.block_out_channels=16,16,16,16", "another architecture")):
        ran, _ = sampled("refused", f"--config.{flag}")
        assert (ran.status, text in ran.stderr) == (2, True), ran.stderr
    other = build_backbone(tiny_config().backbone)
    save_backbone(tmp_path / "other.safetensors", other.state_dict(), describe(tiny_config()))
    ran, _ = sampled("refused", f"--checkpoint={tmp_path / 'other.safetensors'}")
    assert (ran.status, "was made for another UNet" in ran.stderr) == (2, True), ran.stderr


def test_ridge_is_fitted_in_closed_form(tmp_path, distil):
    assert distil("run", **{"distill.adaptor": "ridge"}).status == 0
    row, = rows_of(tmp_path / "run")
    assert row["fresh_ratio"] < 1
    assert "is finished" in distil("run", **{"distill.adaptor": "ridge"}).stderr


@pytest.mark.parametrize("bad", ["inf", "nan"])
def test_loss_that_is_not_finite_stops_the_run(tmp_path, distil, monkeypatch, bad):
    plain = Trajectories.draw

    def draw(self, number):
        yield from plain(self, number)
        if number == 1:
            self.r_out[self.newest.start, 1] = float(bad)

    monkeypatch.setattr(Trajectories, "draw", draw)
    ran = distil("run", **{"train.log_every": 100, "train.batch_size": 64})
    assert ran.status == 2
    assert "the loss is not finite at step 6; the last good checkpoint is" in ran.stderr
    assert sorted(path.name for path in (tmp_path / "run" / "ckpts").iterdir()) == ["00000004"]


@pytest.mark.parametrize(("field", "value", "text"), [
    ("distill.clock", 1, "--config.distill.clock=1 must be at least 2"),
    ("distill.adaptor", "extrapolation", "distill.adaptor='extrapolation' is unknown; choose from resnet, unet, "),
    ("distill.depth", 4, "distill.depth=4 is unknown; choose from 1, 2, 3"),
    ("distill.width", 7, "adaptor width=7: want an even number of channels"),
    ("distill.rounds_kept", 0, "--config.distill.rounds_kept=0 must be at least 1"),
    ("sampler.steps", 1, "distill.clock=2: every one of the 1 steps runs in full"),
    ("train.lr", 0, "--config.train.lr=0.0 must be positive"),
    ("train.preview_every", 5, "--config.train.preview_every=5: the training of an adaptor has none"),
])
def test_mistakes(distil, field, value, text):
    ran = distil("run", **{field: value})
    assert (ran.status, len(ran.stderr.splitlines())) == (2, 1), ran.stderr
    assert text in ran.stderr


def test_what_it_does_not_apply_to(released, tmp_path, run_main):
    def line(*argv):
        ran = run_main(distillate.main, *argv, f"--workdir={tmp_path}", "--config.compute.device=cpu")
        assert (ran.status, len(ran.stderr.splitlines())) == (2, 1), ran.stderr
        return ran.stderr

    assert "learned adaptors are made for UNets, not for a UViT" in line(
        "--config=configs/cifar10_uvit_tiny.py:clockwork_adaptor")
    assert "leave the policy out" in line(f"--config={CONFIG}:clockwork,clockwork_adaptor")
    prompts = line(f"--config={CONFIG}:clockwork_adaptor", "--prompts=a.txt")
    assert "--prompts=a.txt belongs to the adaptor of a pipeline" in prompts
    assert "--prompts is missing" in line("--config=configs/sd15.py:clockwork_adaptor")
    assert "write --config=configs/sd15.py:clockwork_adaptor" in line("--config=configs/sd15.py", "--prompts=a.txt")
    assert "train the adaptor on the plain pipeline" in line(
        "--config=configs/controlnet.py:clockwork_adaptor", "--prompts=a cat")


def test_pipeline_from_prompts(tmp_path, run_main):
    pipe = prompted(tmp_path)[0]
    pipe.save_pretrained(tmp_path / "sd15")
    (tmp_path / "prompts.txt").write_text("a cat\na red dog\n")
    argv = ["--config.compute.device=cpu", f"--config.pipeline.path={tmp_path / 'sd15'}", "--config.pipeline.steps=3",
            "--config.compute.rows=2", "--config.distill.width=16", "--config.distill.trajectories=4",
            "--config.distill.updates=4", "--config.train.steps=8", "--config.train.lr=1e-3",
            "--config.train.log_every=4", "--config=configs/sd15.py:clockwork_adaptor", f"--workdir={tmp_path / 'run'}"]
    ran = run_main(distillate.main, *argv, f"--prompts={tmp_path / 'prompts.txt'}")
    assert ran.status == 0, ran.stderr
    assert rows_of(tmp_path / "run")[-1]["ratio"] < 1
    adaptor, made_for = load_adaptor(tmp_path / "run" / "adaptor.safetensors")
    assert (made_for["network"]["name"], made_for["sampler"]["guidance"]) == ("UNet2DConditionModel", 7.5)
    ran = run_main(distillate.main, *argv, "--prompts=a bird")
    assert (ran.status, "prompts_sha256" in ran.stderr) == (2, True)
    ran = run_main(sample.main, "--config=configs/sd15.py:clockwork", *argv[:4], "--prompts=a cat", "--seeds=0",
                   f"--config.policy.adaptor={tmp_path / 'run' / 'adaptor.safetensors'}", f"--out={tmp_path / 'out'}")
    assert ran.status == 0, ran.stderr
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["stats"]["reuse_calls"] == 1



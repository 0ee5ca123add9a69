"""Early exit in the chain and from the command line: off, it is the plain network bit for bit; it tells what ran."""

import json
from dataclasses import replace

import pytest
import torch
from exit_networks import digits_checkpoint, inputs, mix_exits, tiny
from torch import nn
from two_processes import run_in_two

import eval as eval_script
import sample
from libs import build
from libs.backbones import UNet2D, UViT
from libs.config import load, override
from libs.cost import gmacs_per_image
from libs.errors import UserError
from libs.policies.early_exit import EarlyExit

CPU = torch.device("cpu")


def chain(net=None, methods: str = "early_exit", **fields):
    config = load(f"configs/digits_uvit.py:{methods}")
    config.data.update(image_size=8, channels=3)
    for name, value in {"sampler__steps": 4, "compute__rows": 4, **fields}.items():
        override(config, name.replace("__", "."), str(value))
    return build.make_chain(config, tiny(num_classes=11) if net is None else net, build.describe(config), CPU)


def mixed(**options) -> UViT:
    """A network that sampled images leave at different layers, at the threshold 0.5."""
    net = tiny(num_classes=11, **options)
    x, t, more = inputs(net)
    mix_exits(net, torch.cat([x, x]), t.repeat(2), {"y": torch.arange(30) % 11})
    return net


@pytest.mark.parametrize("mode", ["per_sample", "batch_mean"])
@pytest.mark.parametrize("sampler", ["ddim", "dpm_solver"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_threshold_one_is_the_plain_network_bit_for_bit(mode, sampler, precision):
    fields = {"sampler__name": sampler, "sampler__grid": "logsnr", "sampler__t_end": 0.01,
              "compute__precision": precision}
    net = mixed()
    plain = chain(net, "", **fields).sample([3, 4], [1, 2])
    same = chain(net, policy__mode=mode, policy__threshold=1.0, **fields)
    assert torch.equal(same.sample([3, 4], [1, 2]), plain)
    assert same.policy.stats()["layer_ratio"] == same.policy.stats()["executed_ratio"] == 1
    early = chain(net, policy__mode=mode, policy__threshold=0.45, **fields)
    assert not torch.equal(early.sample([3, 4], [1, 2]), plain)
    assert early.policy.stats()["layer_ratio"] < 1


def test_in_bf16_exits_are_decided_in_fp32():
    net = mixed()
    exits = []
    for precision in ("fp32", "bf16"):
        used = chain(net, policy__threshold=0.5, compute__precision=precision, sampler__steps=1)
        assert used.sample([1, 2, 3, 4], [0, 1, 2, 3]).isfinite().all()
        exits.append(used.policy.exits)
    assert (exits[0] == exits[1]).float().mean() > 0.7  # activations differ in the third digit
    assert len(exits[0].unique()) > 1


def test_what_is_reported_counts_the_images_asked_for():
    used = chain(mixed(), policy__threshold=0.5, policy__compact_from=1.0)
    histogram, executed = torch.zeros(4, 5), 0
    for seeds in ([0, 1, 2, 3], [4, 5, 6]):
        used.sample(seeds, seeds)
        exits = used.policy.exits
        assert exits.shape == (4, 2 * len(seeds))
        histogram += torch.nn.functional.one_hot(exits - 1, 5).sum(1)
        executed += exits.max(1).values.sum().item() * 2 * len(seeds)
    told = used.policy.report()
    assert told["histogram"] == histogram.tolist()
    assert told["images"] == used.policy.stats()["images"] == 7
    assert told["layer_ratio"] == pytest.approx((histogram @ torch.arange(1.0, 6)).sum().item() / (4 * 14 * 5))
    assert told["layer_ratio"] < told["executed_ratio"] <= 1
    layers = [torch.arange(1.0, 6).repeat_interleave(row.int()) for row in histogram]
    assert told["spread"] == pytest.approx([each.std(correction=0).item() for each in layers], abs=1e-5)
    assert (told["threshold"], told["schedule"]) == (0.5, None)


class TwoProcesses:
    """Stands in for `Processes`: the other one reports the same."""

    def gather(self, value):
        return [value, value]


def test_processes_report_together():
    used = chain(mixed(), policy__threshold=0.5)
    used.sample([0, 1, 2], [0, 1, 2])
    one, both = used.policy.report(), used.policy.report(TwoProcesses())
    assert (both["images"], both["layer_ratio"]) == (6, one["layer_ratio"])
    assert torch.equal(torch.tensor(both["histogram"]), 2 * torch.tensor(one["histogram"]))


def test_gmacs_are_those_of_what_ran():
    net = mixed()
    full = gmacs_per_image(chain(net, ""), [1, 2], [1, 2])["with_attention_products"]
    used = chain(net, policy__threshold=0.5, policy__compact_from=0.0)
    early = gmacs_per_image(used, [1, 2], [1, 2])["with_attention_products"]
    ratio = used.policy.stats()["executed_ratio"]
    assert ratio < 0.9
    # The embedding and the head run in full, the uncertainty heads come on top; out-blocks are larger than in-blocks.
    assert early / full == pytest.approx(ratio, abs=0.1)


def test_a_target_ratio_is_found_before_the_first_loop():
    used = chain(mixed(), policy__target_layer_ratio=0.7, policy__calibration_images=8, policy__compact_from=0.0)
    assert used.policy.threshold == 0.92  # nothing is sampled when the chain is made
    used.sample([0, 1, 2, 3], [0, 1, 2, 3])
    assert used.policy.stats()["images"] == 4
    assert used.policy.stats()["calls"] == 4
    threshold = used.policy.report()["threshold"]
    assert 0 < threshold < 1
    again = chain(used.policy.inner, policy__threshold=threshold)
    exits = []
    for start in (0, 4):
        again.sample([2**62 + i for i in range(start, start + 4)], list(range(start, start + 4)))
        exits.append(again.policy.exits)
    assert torch.cat(exits).double().mean() / 5 == pytest.approx(0.7, abs=0.0101)


@pytest.mark.parametrize("mode", ["per_sample", "batch_mean", "schedule"])
def test_a_ratio_that_cannot_be_reached_is_told_with_those_that_can(mode):
    fields = {"policy__mode": mode, "policy__calibration_images": 2, "sampler__steps": 2}
    with pytest.raises(UserError, match=r"target_layer_ratio=0.1: .* from 0\.200 \(threshold near 0\) to 1 \(thr"):
        chain(policy__target_layer_ratio=0.1, **fields).sample([1], [1])
    flat = tiny(num_classes=11)
    for i, head in enumerate(flat.lte_classifer):  # all images leave at the first layer, or at the last
        nn.init.zeros_(head.lte.weight)
        nn.init.constant_(head.lte.bias, 1.0 if i == 0 else 0.0)
    with pytest.raises(UserError, match=r"target_layer_ratio=0.6: .* nearest that can be are 0\.200 and 1\.000"):
        chain(flat, policy__target_layer_ratio=0.6, **fields).sample([1], [1])


@pytest.mark.parametrize(("field", "value", "message"), [
    ("threshold", 0.0, "threshold=0.0 must be a certainty above 0"), ("threshold", 1.5, "threshold=1.5"),
    ("mode", "best", "mode='best' is unknown; choose from per_sample, batch_mean, schedule"),
    ("check_every", 0, "check_every=0 must be at least 1"),
    ("compact_from", 1.5, "compact_from=1.5 must lie between"), ("patience", 0, "patience=0"),
    ("quantile", -0.1, "quantile=-0.1"), ("target_layer_ratio", 1.1, "target_layer_ratio=1.1"),
    ("target_layer_ratio", -0.5, "target_layer_ratio=-0.5"), ("calibration_images", 0, "calibration_images=0"),
    ("schedule", "7", "schedule='7' belongs to policy.mode=schedule, not to per_sample")])
def test_settings_out_of_range_are_refused(field, value, message):
    with pytest.raises(UserError, match=f"^policy.{message}"):
        EarlyExit(**{field: value})


def test_networks_that_cannot_leave_early_are_refused():
    without = tiny(uem="")
    for mode in ("per_sample", "batch_mean", "schedule"):
        with pytest.raises(UserError, match=f"policy.mode={mode} needs uncertainty heads.*train.py --config=.*:early"):
            EarlyExit(mode=mode).attach(without)
    for settings in (EarlyExit(threshold=1.0), EarlyExit(mode="schedule", schedule="3")):
        assert settings.attach(without).disable() is without
    unet = UNet2D(sample_size=8, block_out_channels=(8, 8), down_block_types=("DownBlock2D",) * 2, norm_num_groups=4,
                  up_block_types=("UpBlock2D",) * 2)
    with pytest.raises(UserError, match="a U-ViT between two blocks; this network is a UNet2D"):
        EarlyExit().attach(unet)
    with pytest.raises(UserError, match="so it needs a chain"):
        EarlyExit(target_layer_ratio=0.5).attach(tiny()).start(torch.ones(2))


def test_fewer_sampler_steps_begin_a_new_record():
    used = chain(mixed(), policy__threshold=0.5)
    used.sample([1], [1])
    replace(used, ts=used.ts[[0, 2, 4]]).sample([1, 2], [1, 2])
    assert [sum(row) for row in used.policy.report()["histogram"]] == [4, 4]


# The commands

DIGITS = "--config=configs/digits_uvit.py:early_exit"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return digits_checkpoint(tmp_path_factory.mktemp("digits"))


def test_eval_tells_what_ran(checkpoint, tmp_path, run_main):
    out = tmp_path / "result.json"
    ran = run_main(eval_script.main, DIGITS, f"--checkpoint={checkpoint}", "--seeds=0-4", f"--out={out}",
                   "--config.compute.rows=4", "--config.compute.device=cpu", "--config.sampler.steps=3",
                   "--config.policy.threshold=0.5", "--config.eval.metrics=")
    assert ran.status == 0, ran.stderr
    result = json.loads(out.read_text())
    told = result["policy"]
    assert told["images"] == 5
    assert [sum(row) for row in told["histogram"]] == [10] * 3
    assert 0.2 <= told["layer_ratio"] <= told["executed_ratio"] <= 1
    assert told["threshold"] == result["method"]["threshold"] == 0.5
    assert result["gmacs_per_image"]["with_attention_products"] > 0


def test_sample_says_what_ran_and_resumes(checkpoint, tmp_path, run_main):
    command = [DIGITS, f"--checkpoint={checkpoint}", "--seeds=0-2", f"--out={tmp_path / 'out'}",
               "--config.compute.rows=4", "--config.compute.device=cpu", "--config.sampler.steps=3",
               "--config.policy.threshold=0.5"]
    ran = run_main(sample.main, *command, "--cost")
    assert ran.status == 0, ran.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["stats"]["images"] == 3
    assert 0.2 <= summary["stats"]["layer_ratio"] <= summary["stats"]["executed_ratio"] <= 1
    assert run_main(sample.main, *command).status == 0
    ran = run_main(sample.main, *command, "--config.policy.threshold=0.4")
    assert ran.status == 2
    assert "policy.threshold is 0.5 there and 0.4 here" in ran.stderr


def test_the_summary_is_of_the_images_of_all_processes(checkpoint, tmp_path, run_main):
    """Where the main one has none to make too."""
    command = [DIGITS, f"--checkpoint={checkpoint}", "--config.compute.rows=2", "--config.compute.device=cpu",
               "--config.sampler.steps=3", "--config.policy.threshold=0.5"]
    for name in ("one", "two"):
        assert run_main(sample.main, *command, "--seeds=0-1", f"--out={tmp_path / name}").status == 0
    assert run_main(sample.main, *command, "--seeds=0-3", f"--out={tmp_path / 'one'}").status == 0
    run_in_two(sample.main, [*command, "--seeds=0-3", f"--out={tmp_path / 'two'}"])  # seeds 0 and 1 are the first's
    one, two = (json.loads((tmp_path / name / "summary.json").read_text()) for name in ("one", "two"))
    assert (two["processes"], two["images"]) == (2, 2)
    assert two["stats"] == one["stats"]
    assert two["stats"]["layer_ratio"] < 1


@pytest.mark.parametrize(("argument", "message"), [
    ("--config.policy.threshold=0", "error: policy.threshold=0.0 must be a certainty above 0"),
    ("--checkpoint=digits_uvit",
     "error: policy.mode=per_sample needs uncertainty heads, which checkpoint=digits_uvit has not")])
def test_mistakes_are_told_in_one_line(checkpoint, argument, message, tmp_path, run_main):
    ran = run_main(sample.main, DIGITS, f"--checkpoint={checkpoint}", f"--out={tmp_path / 'out'}", argument)
    assert ran.status == 2
    assert ran.stderr.startswith(message)
    assert len(ran.stderr.splitlines()) == 1

"""What the layer-wise loss costs beside a plain training step."""

import json

import pytest
import torch
from early_exit_runs import DIGITS, FLAGS, config_with_flags, error_of

from libs.backbones.uvit import UViT
from libs.training import early_exit_speed


def test_speed_reports_both_ratios(run_main, tmp_path):
    tiny = [flag for flag in FLAGS if "backbone" in flag]
    ran = run_main(early_exit_speed.main, DIGITS, *tiny, "--config.compute.device=cpu", "--batch_size=4",
                   "--repeats=2", f"--out={tmp_path / 'speed.json'}")
    assert ran.status == 0, ran.stderr
    result = json.loads(ran.stdout)
    assert result == json.loads((tmp_path / "speed.json").read_text())
    assert result["goals"] == {"time_ratio": 1.35, "memory_ratio": 1.1}
    assert result["met"] == {name: result[name] <= most for name, most in result["goals"].items()}
    assert result["command"].startswith("python -m libs.training.early_exit_speed --config=configs/digits_uvit.py "
                                        "--config.backbone.depth=2 ")
    assert result["machine"]
    held = result | {"memory_ratio": 1.2, "met": {"time_ratio": True, "memory_ratio": False}}
    rows = early_exit_speed.table(held).splitlines()[2:]
    assert [row.split(" | ")[3:] for row in rows] == [
        [f"{result['time_ratio']:.3f}", "<= 1.35", "yes |"], ["1.200", "<= 1.1", "no |"]]
    assert result["peak_memory_mib"].keys() == result["seconds"].keys() == {"plain", "early_exit"}
    assert "must end in .json" in error_of(run_main(early_exit_speed.main, DIGITS, "--out=x.txt"))


@pytest.mark.parametrize("depth", [2, 4, 10])
def test_the_output_head_and_the_uncertainty_heads_run_batched(depth):
    """Four layers at a time."""
    net = UViT(img_size=8, patch_size=4, in_chans=1, embed_dim=16, depth=depth, num_heads=2, uem="released")
    calls = []
    net.decoder_pred.register_forward_hook(lambda _, given, out: calls.append(given[0].shape[0]))
    net.lte_classifer.register_forward_hook(lambda _, given, out: calls.append(given[0].shape[0]))
    net(torch.randn(3, 1, 8, 8), torch.ones(3), every_layer=True)
    groups = [min(4, depth + 1 - first) for first in range(0, depth + 1, 4)]
    assert calls == [size for group in groups for size in (group, group)]


def test_a_step_of_the_layerwise_loss_takes_little_more_memory():
    """Deep and narrow, so that it shows where the backward pass keeps what is batched: that would be 1.11."""
    config = config_with_flags()
    with config.unlocked():
        config.backbone.update(embed_dim=64, depth=12, num_heads=2, patch_size=1)
    found = early_exit_speed.measure(config, batch_size=32, repeats=1, device=torch.device("cpu"))
    assert 1 < found["memory_ratio"] < 1.06

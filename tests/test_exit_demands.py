"""Early exit that counts a call's uncertainty by how far its step moves the image (policy.by_step)."""

from dataclasses import replace

import pytest
import torch
from exit_networks import tiny
from torch import nn

from libs import build
from libs.config import load, override
from libs.denoiser import PREDICTIONS, Denoiser
from libs.errors import UserError
from libs.policies.early_exit import EarlyExit
from libs.policies.exit_demands import call_thresholds, call_weights
from libs.samplers import state_times
from libs.schedule import VPLinear

CPU = torch.device("cpu")
ONE_OUTPUT = [name for name in PREDICTIONS if name != "both"]


def chain(net=None, **fields):
    config = load("configs/digits_uvit.py:early_exit")
    config.data.update(image_size=8, channels=3)
    config.schedule = {"name": "vp_linear"}  # whose steps differ in their angles
    config.denoiser.time_input = "999t"
    fields = {"sampler__steps": 8, "sampler__name": "ddim", "compute__rows": 2, "policy__by_step": True, **fields}
    for name, value in fields.items():
        override(config, name.replace("__", "."), str(value))
    return build.make_chain(config, tiny(num_classes=11) if net is None else net, build.describe(config), CPU)


def equally_certain(certainty: float):
    """A network whose heads all say the same of everything."""
    net = tiny(num_classes=11)
    for head in net.lte_classifer:
        nn.init.zeros_(head.lte.weight)
        nn.init.constant_(head.lte.bias, float(torch.logit(torch.tensor(certainty))))
    return net


def angles(ts):
    """Of the steps of DDIM between these times."""
    schedule = VPLinear()
    phi = torch.atan2(schedule.sigma(ts), schedule.alpha(ts))
    phi = torch.where(ts == 0, 0, phi)
    return phi[:-1] - phi[1:]


# How far an error moves the image


@pytest.mark.parametrize("prediction", ONE_OUTPUT)
def test_an_error_of_the_output_moves_the_step_as_told(prediction):
    schedule = VPLinear()
    t, s = torch.tensor([[1.0, 0.7, 0.4, 0.1], [0.9, 0.4, 0.1, 0.0]], dtype=torch.float64)
    x, out = torch.randn(2, 4, 3, 2, 2, dtype=torch.float64)
    denoiser = Denoiser(None, schedule, prediction)
    off = 1 / denoiser.scaled(torch.ones(4, 1, 1, 1, dtype=torch.float64), t)  # an output that `scaled` makes 1

    def step(output):
        denoiser.net = lambda x, timesteps: output
        x_0, eps = denoiser(x, t)
        alpha, sigma, _ = schedule.on_grid(s)
        return alpha.view(-1, 1, 1, 1) * x_0 + sigma.view(-1, 1, 1, 1) * eps

    moved = (step(out + off) - step(out)).abs()
    torch.testing.assert_close(denoiser.moved(t, s).view(-1, 1, 1, 1).expand_as(moved), moved)


@pytest.mark.parametrize("prediction", ["v", "eps_damped", "eps_to_x_0"])
def test_what_counts_as_v_moves_by_the_angle(prediction):
    ts = torch.linspace(1, 0, 9, dtype=torch.float64)
    moved = Denoiser(None, VPLinear(), prediction).moved(ts[:-1], ts[1:])
    torch.testing.assert_close(moved, angles(ts).sin())


def test_weights_are_of_the_steps_of_the_chain():
    used = chain(denoiser__prediction="v")
    weights = call_weights(used)
    expected = angles(used.ts).sin()
    torch.testing.assert_close(weights, expected / expected.max())


def test_calls_inside_a_step_count_by_what_is_left_of_it():
    used = chain(denoiser__prediction="v", sampler__name="dpm_solver", sampler__order=2, sampler__grid="logsnr",
                 sampler__t_end=0.01)
    states = state_times(used.sampler, used.ts, used.denoiser.schedule)
    assert len(states) < len(used.times) + 1  # some are inside
    states = torch.cat([states, states.new_zeros(1)])
    ends = torch.stack([states[states < t].max() for t in used.times])
    moved = used.denoiser.moved(used.times, ends)
    assert moved[-1] < moved.max()  # steps grow shorter at the end, where nothing corrects an error
    expected = torch.stack([moved[:i + 1].max() for i in range(len(moved))])
    torch.testing.assert_close(call_weights(used), expected / moved.max())


# What it does to exits


def expected_exits(used, uncertainty: float, threshold: float):
    """Layer 1 where the uncertainty, by the step's weight, is small enough, else the last."""
    return torch.where(uncertainty * call_weights(used) < 1 - threshold, 1, 5)


@pytest.mark.parametrize("mode", ["per_sample", "batch_mean"])
def test_calls_that_move_little_are_left_at_less_certainty(mode):
    used = chain(equally_certain(0.9), policy__mode=mode, policy__threshold=0.95)
    expected = expected_exits(used, 0.1, 0.95)
    assert 0 < (expected == 1).sum() < len(expected)
    used.sample([0, 1], [0, 1])
    assert torch.equal(used.policy.exits, expected[:, None].expand(-1, len(used.policy.exits[0])))
    alike = chain(used.policy.inner, policy__mode=mode, policy__threshold=0.95, policy__by_step=False)
    alike.sample([0, 1], [0, 1])
    assert (alike.policy.exits == 5).all()


def test_a_schedule_is_calibrated_by_it():
    net = equally_certain(0.9)
    used = chain(net, policy__mode="schedule", policy__threshold=0.95, policy__calibration_images=2)
    used.sample([0, 1], [0, 1])
    assert used.policy.schedule == tuple(expected_exits(used, 0.1, 0.95).tolist())
    found = chain(net, policy__target_layer_ratio=0.6, policy__calibration_images=2)
    found.sample([0, 1], [0, 1])
    assert found.policy.exits.double().mean() / 5 == pytest.approx(0.6, abs=0.05)
    assert torch.equal(found.policy.exits[:, 0], expected_exits(found, 0.1, found.policy.threshold))


def test_other_times_take_the_thresholds_of_the_nearest():
    used = chain(equally_certain(0.9), policy__threshold=0.95)
    expected = expected_exits(used, 0.1, 0.95)
    fewer = replace(used, ts=used.ts[[0, 2, 4, 6, 8]])
    fewer.sample([0, 1], [0, 1])
    assert torch.equal(used.policy.exits[:, 0], expected[[0, 2, 4, 6]])


def test_threshold_one_is_the_plain_network_bit_for_bit():
    net = equally_certain(0.999)
    plain = chain(net, policy__threshold=1.0, policy__by_step=False).sample([3, 4], [1, 2])
    assert torch.equal(chain(net, policy__threshold=1.0).sample([3, 4], [1, 2]), plain)


def test_the_farthest_step_has_the_threshold_itself():
    weights = torch.tensor([0.1, 1.0, 0.5], dtype=torch.float64)
    assert call_thresholds(0.9, weights).tolist() == pytest.approx([0.0, 0.9, 0.8])


# What is refused


def test_there_must_be_steps():
    with pytest.raises(UserError, match="policy.by_step follows the steps of a sampler, so it needs a chain"):
        EarlyExit(by_step=True).attach(tiny()).start(torch.ones(2))


def test_two_outputs_have_no_one_error():
    used = chain(policy__by_step=False)
    used.denoiser.prediction = "both"
    with pytest.raises(UserError, match="denoiser.prediction='both' has two outputs"):
        call_weights(used)

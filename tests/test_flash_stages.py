"""The stages of Flash Diffusion: what the fields mean, and what makes none."""

import pytest
import torch

from libs.distillation.flash_stages import read_stages, stage_at, start_probabilities
from libs.errors import UserError

SECTION = {  # as published, but for few updates
    "stage_updates": "5,4,3,2", "teacher_steps": "32", "spread": 0.5, "start": "modes", "guidance": "3,13",
    "mode_weights": "0,0,.5,.5; .1,.3,.3,.3; .25,.25,.25,.25; .4,.2,.2,.2", "distil_scale": "1",
    "dmd_scale": "0,.3,.5,.7", "adversarial_scale": "0,.1,.2,.3",
}


@pytest.mark.parametrize("steps", [16, 32])
def test_a_mode_and_its_neighbours(steps):
    for m in (1, 2, 3):  # 749, 499, 249 of 1,000
        probabilities = start_probabilities(steps, [float(each == m) for each in range(4)], 0.5)
        centre = m * steps // 4
        assert round(1000 * (1 - centre / steps)) - 1 == (749, 499, 249)[m - 1]
        assert float(probabilities[centre]) == pytest.approx(0.79, abs=0.005)
        assert float(probabilities[centre - 1]) == pytest.approx(0.107, abs=0.001)
        assert float(probabilities[centre + 1]) == pytest.approx(0.107, abs=0.001)
    noise = start_probabilities(steps, [1, 0, 0, 0], 0.5)  # the first mode has a neighbour on one side only
    assert float(noise[0]) == pytest.approx(0.88, abs=0.005)
    for weights in ([0.4, 0.2, 0.2, 0.2], [3, 1]):
        assert float(start_probabilities(steps, weights, 0.5).sum()) == pytest.approx(1)


def test_published_stages():
    stages = read_stages(SECTION)
    assert [stage.updates for stage in stages] == [5, 4, 3, 2]
    assert [stage.steps for stage in stages] == [32] * 4
    assert [(stage.distil, stage.dmd, stage.adversarial) for stage in stages] == [
        (1, 0, 0), (1, 0.3, 0.1), (1, 0.5, 0.2), (1, 0.7, 0.3)]
    assert {stage.guidance for stage in stages} == {(3, 13)}
    for stage, weights in zip(stages, ([0, 0, 0.5, 0.5], [0.1, 0.3, 0.3, 0.3], [0.25] * 4, [0.4, 0.2, 0.2, 0.2]),
                              strict=True):
        assert torch.equal(stage.start_probabilities, start_probabilities(32, weights, 0.5))
    # the mean length of the teacher's roll-outs, which the cut neighbour of the first mode shortens a little
    lengths = [float((stage.start_probabilities * torch.arange(32, 0, -1)).sum()) for stage in stages]
    assert lengths == pytest.approx([12, 17.6, 20, 22.4], abs=0.5)


def test_a_stage_by_the_optimizers_step():
    stages = read_stages(SECTION)
    numbers = [stage_at(stages, step)[0] for step in range(16)]
    assert numbers == [0] * 5 + [1] * 4 + [2] * 3 + [3] * 4  # the last one goes on
    assert all(stage_at(stages, step)[1] is stages[number] for step, number in enumerate(numbers))


def test_a_value_for_each_stage_or_one_for_all():
    stages = read_stages(SECTION | {"stage_updates": "7, 8", "teacher_steps": "16,32", "guidance": "2,9; 1",
                                    "mode_weights": "1,2,1,0", "dmd_scale": "0.25", "adversarial_scale": "0,1"})
    assert [(stage.updates, stage.steps, stage.guidance) for stage in stages] == [(7, 16, (2, 9)), (8, 32, (1, 1))]
    assert [(stage.dmd, stage.adversarial) for stage in stages] == [(0.25, 0), (0.25, 1)]
    for stage in stages:
        assert torch.equal(stage.start_probabilities, start_probabilities(stage.steps, [1, 2, 1, 0], 0.5))


def test_uniform_starts():
    stages = read_stages(SECTION | {"start": "uniform", "teacher_steps": "10"})
    assert all(torch.equal(stage.start_probabilities, torch.full((10,), 0.1, dtype=torch.float64)) for stage in stages)


@pytest.mark.parametrize(("field", "value", "says"), [
    ("dmd_scale", "0,.3,.5", "3 values for 4 stages (stage_updates); give one for each, or one for all"),
    ("mode_weights", "1,1; 1,1", "2 values for 4 stages"),
    ("guidance", "1;2;3", "3 values for 4 stages"),
    ("teacher_steps", "30", "a grid of 30 steps does not hold the 4 modes of mode_weights; choose a multiple of 4"),
    ("teacher_steps", "0", "want whole numbers of at least 1"),
    ("stage_updates", "5,4,3,2.5", "want whole numbers of at least 1"),
    ("adversarial_scale", "0,.1,.2,x", "want numbers, parted by commas"),
    ("adversarial_scale", "nan", "want numbers, parted by commas"),
    ("dmd_scale", "-1", "must not be negative"),
    ("guidance", "13,3", "want the lowest and the highest scale, or one number"),
    ("guidance", "-1,3", "must not be negative"),
    ("guidance", "1,2,3", "want the lowest and the highest scale, or one number"),
    ("mode_weights", "0,0,0,0", "the weights of a stage must not be negative, nor all 0"),
    ("mode_weights", "1,1; 1,1; 1,1; 1,1,1,1", "every stage needs a weight for the same modes"),
    ("spread", 0.0, "must be positive"),
    ("distil_scale", "0", "stage 1 has no loss; its dmd_scale and adversarial_scale are 0 too"),
])
def test_mistakes(field, value, says):
    with pytest.raises(UserError) as caught:
        read_stages(SECTION | {field: value})
    assert str(caught.value).startswith(f"--config.distill.{field}={value}: ")
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_start():
    with pytest.raises(UserError, match="--config.distill.start='mode' is unknown; choose from modes, uniform"):
        read_stages(SECTION | {"start": "mode"})

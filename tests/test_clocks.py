"""Clocks: which loop, step and guidance branch a call of the network belongs to."""

import pytest
import torch

from libs.policies.clocks import AnnouncedClock, TimestepsClock

TIMES = (901, 701, 501, 301, 101)


class Scheduler:
    """Only what a clock may look at: a list that every `set_timesteps` makes anew."""

    def __init__(self, *times: float):
        self.set_timesteps(*times)

    def set_timesteps(self, *times: float) -> None:
        self.timesteps = torch.tensor(times or TIMES)


def vouched(scheduler: Scheduler) -> TimestepsClock:
    return TimestepsClock(lambda: scheduler.timesteps)


def places(clock: TimestepsClock, timesteps, caller=None) -> list[tuple]:
    return [clock.at(t, caller)[:3] for t in timesteps]


FORMS = {
    "view": lambda t: t,
    "unsqueezed": lambda t: t[None],
    "expanded": lambda t: t.expand(2),
    "copy": lambda t: t.clone(),
    "batch": lambda t: torch.stack([t, t]),
    "float copy": lambda t: t.float(),
    "number": float,
}


def test_announced_clock():
    clock = AnnouncedClock()
    times = torch.tensor([0.9, 0.5, 0.1])
    clock.start(times)
    found = [clock.at(t) for t in times]
    assert [each[:4] for each in found] == [(1, 0, 0, 3), (1, 1, 0, 3), (1, 2, 0, 3)]
    assert all(each.times is times for each in found)
    clock.start(times[:2])
    assert clock.at(times[0])[:4] == (2, 0, 0, 2)
    assert clock.at(times[0])[1] == 1  # calls count, values do not
    assert clock.at(times[0], caller="controlnet")[1] == 0  # each caller by itself


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ask", [True, False])
def test_steps_of_two_loops_in_every_form(form, ask):
    scheduler = Scheduler()
    clock = vouched(scheduler) if ask else TimestepsClock()
    for loop in (1, 2):
        scheduler.set_timesteps()
        assert places(clock, map(FORMS[form], scheduler.timesteps)) == [(loop, i, 0) for i in range(5)]


@pytest.mark.parametrize("form", FORMS)
def test_the_list_tells_total_and_times_to_come(form):
    scheduler = Scheduler()
    clock = vouched(scheduler)
    found = [clock.at(FORMS[form](t)) for t in scheduler.timesteps[2:]]  # image to image: the start is cut off
    assert [each.index for each in found] == [0, 1, 2]
    assert all(each.total == 3 and each.times.tolist() == [501, 301, 101] for each in found)


def test_without_a_list_nobody_knows_the_total():
    assert TimestepsClock().at(901)[3:] == (None, None)
    assert TimestepsClock().at(torch.tensor(901))[3:] == (None, None)
    view = TimestepsClock().at(Scheduler().timesteps[1])  # the list behind a view is still a list
    assert view.total == 4
    assert view.times.tolist() == [701, 501, 301, 101]


@pytest.mark.parametrize("ask", [True, False])
def test_separate_calls_of_one_step_are_branches(ask):
    scheduler = Scheduler()
    clock = vouched(scheduler) if ask else TimestepsClock()
    for i, t in enumerate(scheduler.timesteps):
        assert places(clock, [t], "controlnet") == [(1, i, 0)]  # another caller is no branch
        assert places(clock, [t, t]) == [(1, i, 0), (1, i, 1)]


@pytest.mark.parametrize("form", FORMS)
def test_a_scheduler_vouches_for_branches_in_every_form(form):
    scheduler = Scheduler()
    clock = vouched(scheduler)
    found = [clock.at(FORMS[form](t)).branch for t in scheduler.timesteps for _ in range(2)]
    assert found == [0, 1] * 5


@pytest.mark.parametrize("form", FORMS)
def test_a_loop_broken_off_and_begun_again_is_no_branch(form):
    scheduler = Scheduler()
    for steps in (1, 2, 4):
        clock = TimestepsClock()
        places(clock, map(FORMS[form], scheduler.timesteps[:steps]))
        for loop, i, branch in places(clock, map(FORMS[form], scheduler.timesteps)):
            if steps == 1:
                assert branch is None  # the same value again: nobody can tell
            else:
                assert (loop, i, branch) == (2, i, 0)
        assert places(clock, map(FORMS[form], scheduler.timesteps))[-1][2] == 0  # certain again in the next loop


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize("form", FORMS)
def test_new_list_is_a_new_loop_wherever_the_last_one_ended(form, steps):
    scheduler = Scheduler()
    clock = vouched(scheduler)
    places(clock, map(FORMS[form], scheduler.timesteps[:steps]))
    scheduler.set_timesteps(*TIMES[1:])  # another strength or number of steps
    assert places(clock, map(FORMS[form], scheduler.timesteps)) == [(2, i, 0) for i in range(4)]


def test_another_pipeline_with_its_own_scheduler_is_another_loop():
    ours, theirs = Scheduler(), Scheduler()
    clock = vouched(ours)
    places(clock, ours.timesteps[:1])
    assert places(clock, theirs.timesteps) == [(2, i, 0) for i in range(5)]
    assert places(clock, theirs.timesteps[:1]) == [(3, 0, 0)]
    assert places(clock, theirs.timesteps[:1]) == [(3, 0, None)]  # our scheduler does not vouch for that list
    assert places(clock, ours.timesteps) == [(4, i, 0) for i in range(5)]


def test_second_order_lists_and_upward_lists():
    heun, upward = Scheduler(901, 501, 501, 101, 101), Scheduler(*reversed(TIMES))
    for scheduler in (heun, upward):
        assert places(vouched(scheduler), scheduler.timesteps) == [(1, i, 0) for i in range(5)]
        assert places(TimestepsClock(), scheduler.timesteps) == [(1, i, 0) for i in range(5)]
    assert places(TimestepsClock(), map(float, upward.timesteps)) == [(1, i, 0) for i in range(5)]
    # a number does not tell the second half of a step from another branch
    assert places(vouched(heun), map(float, heun.timesteps))[2] == (1, 1, None)


def test_a_strided_list():
    scheduler = Scheduler()
    scheduler.timesteps = torch.arange(1000)[::250]
    assert places(vouched(scheduler), scheduler.timesteps) == [(1, i, 0) for i in range(4)]


def test_a_value_that_is_not_in_the_list_is_unclear():
    scheduler = Scheduler()
    clock = vouched(scheduler)
    clock.at(scheduler.timesteps[0])
    assert clock.at(450.5).branch is None
    assert clock.at(scheduler.timesteps[1]).branch is None  # until the next loop
    scheduler.set_timesteps()
    assert clock.at(scheduler.timesteps[0]).branch == 0


def test_restart_begins_a_loop():
    scheduler = Scheduler()
    for clock in (vouched(scheduler), TimestepsClock()):
        places(clock, scheduler.timesteps[:2])
        clock.restart()
        assert places(clock, scheduler.timesteps[2:]) == [(2, i, 0) for i in range(3)]


def test_on_call_runs_before_the_list_is_read():
    scheduler = Scheduler()
    clock = vouched(scheduler)
    clock.on_call = scheduler.set_timesteps
    assert [clock.at(901).loop, clock.at(901).loop] == [1, 2]

"""The order in which the loop schedules, launches, collects and completes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Step, StepResult
from scheduler_samples import limits, submit


class Noting(FakeRunner):
    """Notes its calls, and the scheduler's."""

    def __init__(self, overlap: bool) -> None:
        super().__init__(FakeSettings(overlap=overlap))
        self.calls: list[str] = []

    def before(self, step: Step) -> None:
        self.calls.append(f"before {step.number}")

    def launch(self, step: Step, beat: Callable[[], None]) -> None:
        self.calls.append(f"launch {step.number}")
        super().launch(step, beat)

    def collect(self, beat: Callable[[], None]) -> StepResult:
        self.calls.append("collect")
        return super().collect(beat)


def run(overlap: bool) -> tuple[list[str], list[int], list[int]]:
    """(calls, steps out after each turn, tokens) of a request with three tokens."""
    scheduler, runner = Scheduler(limits(), 1), Noting(overlap)
    loop = StepLoop(scheduler, runner, runner.before)
    assert not loop.busy
    scheduler.submit(submit(1, most=3))
    out, tokens = [], []
    while loop.busy:
        for output in loop.turn(lambda: None).values():
            tokens += output.tokens
        out.append(len(loop.out))
    return runner.calls, out, tokens


def test_with_overlap_the_next_step_is_launched_before_one_is_collected() -> None:
    calls, out, tokens = run(overlap=True)
    assert " ".join(calls) == "before 1 launch 1 before 2 launch 2 collect before 3 launch 3 collect collect"
    assert out == [1, 1, 1, 0]
    assert tokens == [fake_token([1] * 10, 0, 0, position) for position in range(3)]


def test_without_overlap_each_step_ends_before_the_next_is_scheduled() -> None:
    calls, out, tokens = run(overlap=False)
    assert " ".join(calls) == "before 1 launch 1 collect before 2 launch 2 collect before 3 launch 3 collect"
    assert out == [0, 0, 0]
    assert tokens == run(overlap=True)[2]


@pytest.mark.parametrize("overlap", [False, True])
def test_it_is_busy_until_the_last_step_is_collected(overlap: bool) -> None:
    scheduler, runner = Scheduler(limits(), 1), Noting(overlap)
    loop = StepLoop(scheduler, runner)
    scheduler.submit(submit(1))
    loop.turn(lambda: None)
    scheduler.abort(1)
    assert not scheduler.busy
    assert loop.busy == overlap
    assert loop.turn(lambda: None) == {}
    assert not loop.busy
    assert loop.turn(lambda: None) == {}, "an idle turn does nothing"


def test_waiting_for_the_device_is_told_apart_from_work() -> None:
    """A device that hangs makes no progress, however often it is asked."""
    scheduler, runner = Scheduler(limits(), 1), Noting(True)
    loop = StepLoop(scheduler, runner)
    scheduler.submit(submit(1))
    beats: list[str] = []
    for _ in range(2):
        loop.turn(lambda: beats.append("work"), lambda: beats.append("wait"))
    assert beats == ["wait"]

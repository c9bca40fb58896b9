"""The order in which the loop schedules, launches, collects and completes."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.engine.scheduling.restriction import Restrictions
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Masks, Step, StepResult
from scheduler_samples import limits, submit


class Noting(FakeRunner):
    """Notes its calls, and the scheduler's."""

    def __init__(self, overlap: bool) -> None:
        super().__init__(FakeSettings(overlap=overlap))
        self.calls: list[str] = []

    def before(self, step: Step) -> None:
        self.calls.append(f"before {step.number}")

    def launch(self, step: Step, beat: Callable[[], None], masks: Callable[[], Masks] | None = None) -> None:
        def noting() -> Masks:
            late = masks() if masks is not None else {}
            self.calls.append("masks")
            return late

        self.calls.append(f"launch {step.number}")
        super().launch(step, beat, noting if masks is not None else None)

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


def test_what_tokens_restrict_is_told_between_forward_and_sampling_and_costs_no_step() -> None:
    """Each second token can't be what the two before would make a bad word of: masks need the token that is out."""
    free = [fake_token([1] * 10, 0, 0, position) for position in range(6)]
    runs = []
    for overlap in (False, True):
        changed = limits()
        scheduler, runner = Scheduler(changed, 1, Restrictions(256, changed.eos_ids, None)), Noting(overlap)
        loop = StepLoop(scheduler, runner, runner.before)
        words = [[free[at], free[at + 1]] for at in range(0, 6, 2)]
        scheduler.submit(submit(1, most=6, params={"bad_words": words}))
        tokens = []
        while loop.busy:
            for output in loop.turn(lambda: None).values():
                tokens += output.tokens
        runs.append((tokens, " ".join(runner.calls)))
    assert runs[0][0] == runs[1][0]
    assert [token == other for token, other in zip(tokens, free, strict=True)] == [True, False] * 3
    assert "before 2 launch 2 collect masks before 3 launch 3 collect masks before 4" in runs[1][1]
    assert [calls.count("launch") for _, calls in runs] == [6, 6]


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

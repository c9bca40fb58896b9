"""The hang rule and the clock that it is measured with."""

from __future__ import annotations

import pytest

from lightllmd.config.parameters import SupervisorSettings
from lightllmd.ipc.messages import Heartbeat
from lightllmd.supervisor.children.hang_rule import LONGEST_STEP, RunningClock, Vitals, overdue

SETTINGS = SupervisorSettings(hang_timeout=10, boot_timeout=120, load_timeout=60, warmup_timeout=30)


@pytest.mark.parametrize(
    ("phase", "limit"), [("boot", 120), ("load", 60), ("warmup", 30), ("ready", 10), ("sleep", 10)]
)
def test_deadline_depends_on_the_phase(phase: str, limit: float) -> None:
    vitals = Vitals(moved=0)
    vitals.hear(Heartbeat(phase, 1), 5)
    assert overdue(vitals, SETTINGS, 5 + limit) is None
    assert overdue(vitals, SETTINGS, 5 + limit + 0.1)


def test_a_worker_that_never_speaks_is_overdue() -> None:
    assert overdue(Vitals(moved=0), SETTINGS, 120) is None
    assert "no heartbeat" in str(overdue(Vitals(moved=0), SETTINGS, 121))


def test_heartbeats_without_progress_prove_nothing() -> None:
    vitals = Vitals(moved=0)
    for second in range(12):
        vitals.hear(Heartbeat("ready", 7, busy=True), second)
    assert "no progress" in str(overdue(vitals, SETTINGS, 11))


def test_progress_is_life() -> None:
    vitals = Vitals(moved=0)
    for second in range(0, 1000, 9):
        vitals.hear(Heartbeat("ready", second, busy=True), second)
        assert overdue(vitals, SETTINGS, second + 9) is None


@pytest.mark.parametrize("phase", ["ready", "asleep"])
def test_an_idle_worker_in_service_or_asleep_is_well_but_a_silent_one_is_not(phase: str) -> None:
    vitals = Vitals(moved=0)
    for second in range(100):
        vitals.hear(Heartbeat(phase, 7, busy=False), second)
    assert overdue(vitals, SETTINGS, 105) is None
    assert overdue(vitals, SETTINGS, 110)


def test_idleness_is_no_excuse_while_loading() -> None:
    vitals = Vitals(moved=0)
    for second in range(62):
        vitals.hear(Heartbeat("load", 7, busy=False), second)
    assert overdue(vitals, SETTINGS, 61)


def test_a_stopped_worker_is_not_waited_for_as_long_as_its_phase_may_take() -> None:
    vitals = Vitals(moved=0)
    vitals.hold(True, 1)
    assert overdue(vitals, SETTINGS, 11) is None
    assert "stopped by a signal" in str(overdue(vitals, SETTINGS, 12))
    vitals.hold(False, 12)
    assert overdue(vitals, SETTINGS, 13) is None


def test_a_stopped_supervisor_does_not_count_the_time_it_slept() -> None:
    moments = iter([0.0, 0.1, 3600.0, 3600.1])
    clock = RunningClock(lambda: next(moments))
    for _ in range(3):
        clock.advance()
    assert clock.now == pytest.approx(0.2 + LONGEST_STEP)

"""The restart policy as a pure function."""

from __future__ import annotations

import pytest

from lightllmd.config.parameters import SupervisorSettings
from lightllmd.supervisor.children.restart import Decision, decide

SETTINGS = SupervisorSettings(
    backoff_initial=1.0, backoff_max=10.0, start_limit_burst=6, start_limit_interval=600, retry_interval=60.0
)


def die(failures: tuple[float, ...] = (), now: float = 0.0, proved: bool = False, permanent: bool = False) -> Decision:
    return decide(failures, now, proved=proved, permanent=permanent, settings=SETTINGS, jitter=0.5)


def failing(times: int, step: float = 1.0) -> list[Decision]:
    decisions: list[Decision] = []
    failures: tuple[float, ...] = ()
    for turn in range(times):
        decisions.append(die(failures, now=turn * step))
        failures = decisions[-1].failures
    return decisions


def test_first_restart_is_immediate() -> None:
    assert die().delay == 0
    assert die(proved=True).delay == 0


def test_failed_starts_back_off_exponentially_up_to_the_maximum() -> None:
    assert [decision.delay for decision in failing(6)] == [0, 1, 2, 4, 8, 10]


def test_after_the_limit_slow_retries_go_on_for_ever() -> None:
    late = failing(60)[6:]
    assert {decision.delay for decision in late} == {60.0}
    assert all(decision.limited for decision in late)
    assert len(late[-1].failures) <= SETTINGS.start_limit_burst + 1, "the history is bounded"


def test_a_start_that_served_wipes_out_the_failures() -> None:
    failures = failing(5)[-1].failures
    assert die(failures, proved=True) == Decision(0.0, ())


def test_failures_older_than_the_interval_do_not_count() -> None:
    assert [decision.delay for decision in failing(10, step=601.0)] == [0] * 10


def test_a_permanent_cause_is_never_retried_with_the_same_plan() -> None:
    assert die(permanent=True).delay is None
    assert die(permanent=True, proved=True).delay is None


@pytest.mark.parametrize("jitter", [0.0, 0.25, 0.999])
def test_jitter_spreads_the_delay_by_a_quarter(jitter: float) -> None:
    decision = decide((0.0, 1.0), 2.0, proved=False, permanent=False, settings=SETTINGS, jitter=jitter)
    assert decision.delay is not None
    assert 1.5 <= decision.delay <= 2.5

"""How ends are told and judged."""

from __future__ import annotations

import signal

import pytest

from lightllmd.errors import EXIT_TRY_AGAIN
from lightllmd.ipc.messages import Failed
from lightllmd.supervisor.children.exits import classify


@pytest.mark.parametrize("fault", ["SIGSEGV", "SIGABRT", "SIGBUS", "SIGFPE", "SIGILL"])
def test_a_fault_is_the_workers_own(fault: str) -> None:
    ending = classify(-signal.Signals[fault])
    assert ending.self_inflicted
    assert not ending.outside
    assert fault in ending.cause
    assert not ending.permanent


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGHUP, 40])
def test_a_signal_from_outside_tells_of_no_request(number: int) -> None:
    ending = classify(-number)
    assert not ending.self_inflicted
    assert ending.outside
    assert not ending.permanent


def test_a_kill_while_memory_ran_out_may_be_a_request_s_doing() -> None:
    ending = classify(-signal.SIGKILL, memory_ran_out=True)
    assert not ending.outside
    assert ending.cause == "killed by SIGKILL: the kernel killed for want of memory"
    assert classify(-signal.SIGTERM, memory_ran_out=True).outside


@pytest.mark.parametrize("held", [False, True])
def test_a_hang_may_be_a_request_s_doing_unless_the_process_was_held(held: bool) -> None:
    ending = classify(-signal.SIGABRT, hung="no progress for 10 s in phase ready", held=held)
    assert not ending.self_inflicted
    assert ending.outside == held
    assert ending.cause == "hung: no progress for 10 s in phase ready; ended by SIGABRT"


@pytest.mark.parametrize(
    ("returncode", "kind", "daemon"),
    [(78, None, 78), (69, None, 69), (80, None, 1), (1, "weights", 78), (1, "memory", 1), (78, "config", 78)],
)
def test_causes_that_would_come_back_are_permanent(returncode: int, kind: str | None, daemon: int) -> None:
    ending = classify(returncode, failed=Failed(kind, "why") if kind else None)
    assert ending.exit_code == daemon
    assert not kind or ending.cause.endswith("why")


def test_an_exception_is_self_inflicted_and_told_in_its_words() -> None:
    ending = classify(1, failed=Failed("error", "ValueError: boom"))
    assert (ending.cause, ending.self_inflicted, ending.permanent) == ("ValueError: boom", True, False)


def test_an_end_that_was_asked_for_is_no_failure() -> None:
    ending = classify(-signal.SIGTERM, asked="restart requested")
    assert (ending.cause, ending.self_inflicted) == ("restart requested", False)


def test_changed_files_of_a_model_are_tried_again_and_nobodys_fault() -> None:
    """They may be put back: a file that was damaged at the moment of a restart must not end the plan for ever."""
    ending = classify(EXIT_TRY_AGAIN, failed=Failed("changed", "/m/a.safetensors changed"))
    assert (ending.cause, ending.permanent, ending.changed) == ("/m/a.safetensors changed", False, True)
    assert ending.outside

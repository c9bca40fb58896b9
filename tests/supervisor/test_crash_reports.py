"""Crash reports: one for each death that nobody asked for, kept within bounds, on disk where there is a place."""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import time
from collections import deque
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from harness import wait_for
from lightllmd.config.parameters import Config
from lightllmd.errors import NoSuchCrash
from lightllmd.ipc.flight_record import Flight
from lightllmd.supervisor.children import crashes, exits
from lightllmd.supervisor.children.crashes import Crash, Crashes, open_crashes
from lightllmd.supervisor.journal.logs import EventBook, LogBook, text_line
from lightllmd.supervisor.journal.report_store import ReportStore
from stand_ins import StandInDaemon


def event_book() -> EventBook:
    return EventBook(LogBook(1000, "debug", text_line, None))


def dead(returncode: int = -11, **fields: Any) -> Any:
    child = SimpleNamespace(
        worker="engine-0",
        pid=4711,
        number=3,
        asked=None,
        hung=None,
        vitals=SimpleNamespace(phase="ready", progress=99),
        started=time.time() - 5,
        memory=123,
        stats={"memory_used": 7.0},
        tail=deque(["Fatal Python error: Segmentation fault", "x" * 100_000]),
        process=SimpleNamespace(reap=lambda: returncode),
    )
    vars(child).update(fields)
    return child


def report(book: Crashes, child: Any, **facts: Any) -> Crash | None:
    ending = exits.classify(child.process.reap(), hung=child.hung, asked=child.asked)
    return book.add(child, ending, config=Config(), model="tiny", **facts)


def test_a_report_says_what_was_known() -> None:
    events = event_book()
    flight = Flight(step=12, kind="prefill", rows=2, tokens=300, unproven=list(range(500)))
    book = Crashes(events)
    made = report(book, dead(), revision=2, flight=flight)
    assert made is not None
    assert (made.id, made.worker, made.pid, made.generation, made.revision) == (1, "engine-0", 4711, 3, 2)
    assert (made.signal, made.exit_code, made.self_inflicted) == ("SIGSEGV", None, True)
    assert made.cause == "killed by SIGSEGV"
    assert (made.phase, made.progress, made.memory_bytes, made.stats) == ("ready", 99, 123, {"memory_used": 7.0})
    assert made.last_step is not None
    assert (made.last_step.kind, made.last_step.rows, made.last_step.tokens) == ("prefill", 2, 300)
    assert (len(made.last_step.unproven), made.last_step.unproven_total) == (crashes.MOST_REQUESTS, 500)
    assert made.xids is None, "nobody watched: not the same as none"
    assert made.stderr[0].startswith("Fatal Python error")
    assert len(made.stderr[1]) == crashes.LONGEST_LINE
    assert 5 <= made.uptime_s < 60
    assert book.get(1) == made
    assert [summary.id for summary in book.all()] == [1]
    (event,) = [event for event in events.feed.last(9) if event.kind == "crash"]
    assert (event.worker, event.message) == ("engine-0", "crash report 1: killed by SIGSEGV")


def test_equal_configurations_have_equal_digests() -> None:
    base = Config()
    other = msgspec.structs.replace(base, params=msgspec.structs.replace(base.params, port=8001))
    assert crashes.config_digest(base) == crashes.config_digest(Config())
    assert crashes.config_digest(base) != crashes.config_digest(other)


@pytest.mark.parametrize(
    ("fields", "made"),
    [
        ({"asked": "stopped"}, False),
        ({"asked": "restart requested"}, False),
        ({"hung": "no progress for 10 s in phase ready"}, True),
        ({"hung": "no progress for 10 s in phase ready", "asked": "stopped"}, True),
        ({}, True),
    ],
)
def test_only_a_death_that_nobody_asked_for_is_reported(fields: dict[str, Any], made: bool) -> None:
    book = Crashes(event_book())
    assert (report(book, dead(**fields)) is not None) == made
    assert len(book.all()) == made


def test_an_exit_by_itself_has_a_code_and_no_signal() -> None:
    made = report(Crashes(event_book()), dead(returncode=1))
    assert made is not None
    assert (made.signal, made.exit_code) == (None, 1)


def test_an_idle_engine_had_no_step() -> None:
    made = report(Crashes(event_book()), dead(), flight=Flight())
    assert made is not None
    assert made.last_step is None


def test_reports_in_memory_are_bounded_and_newest_first() -> None:
    book = Crashes(event_book())
    for _ in range(crashes.KEPT + 5):
        report(book, dead())
    ids = [summary.id for summary in book.all()]
    assert ids == list(range(crashes.KEPT + 5, 5, -1))
    with pytest.raises(NoSuchCrash):
        book.get(5)


# --- on disk -------------------------------------------------------------------------------------------------------


async def write(directory: Path, count: int) -> list[Crash]:
    book = open_crashes(event_book(), str(directory))
    made = [made for _ in range(count) if (made := report(book, dead()))]
    await asyncio.to_thread(book.close, 10)
    return made


def test_reports_outlive_the_daemon_and_their_numbers_go_on(tmp_path: Path) -> None:
    (first,) = asyncio.run(write(tmp_path, 1))
    (second,) = asyncio.run(write(tmp_path, 1))
    assert (first.id, second.id) == (1, 2)
    again = open_crashes(event_book(), f"{tmp_path}:/elsewhere")
    assert [again.get(1), again.get(2)] == [first, second]


def test_files_are_bounded_in_number_and_nobody_elses(tmp_path: Path) -> None:
    asyncio.run(write(tmp_path, crashes.KEPT + 3))
    folder = tmp_path / "crashes"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert sorted(int(path.stem) for path in folder.iterdir()) == list(range(4, crashes.KEPT + 4))
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_damaged_files_cost_no_other_report_and_no_number_is_given_twice(tmp_path: Path) -> None:
    asyncio.run(write(tmp_path, 2))
    folder = tmp_path / "crashes"
    (folder / "7.json").write_bytes(b'{"id": 7, "at"')
    (folder / "8.json").mkdir()
    (folder / ".9.partial").write_bytes(b"half")
    (folder / "notes.txt").write_text("not ours")
    events = event_book()
    book = open_crashes(events, str(tmp_path))
    assert [summary.id for summary in book.all()] == [2, 1]
    assert sum("can't be read" in event.message for event in events.feed.last(9)) == 2
    assert not (folder / ".9.partial").exists()
    assert asyncio.run(write(tmp_path, 1))[0].id == 9


def test_without_a_state_directory_or_the_right_to_it_reports_stay_in_memory(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("")
    events = event_book()
    for directory in ("", str(blocked)):
        book = open_crashes(events, directory)
        assert report(book, dead()) is not None
        book.close()
    (warning,) = [event for event in events.feed.last(9) if event.kind == "warning"]
    assert "in memory only" in warning.message


def test_a_disk_that_takes_nothing_never_stops_the_loop_and_is_told(tmp_path: Path) -> None:
    """A FIFO in the place of the temporary file: opening it for writing waits for a reader, which comes last."""
    told: list[str] = []

    async def scenario() -> None:
        store = ReportStore(tmp_path / "crashes", 5, told.append)
        os.mkfifo(tmp_path / "crashes" / ".1.partial")
        for number in range(1, 200):
            store.put(number, b"{}")
        store.close(0.01)
        reader = os.open(tmp_path / "crashes" / ".1.partial", os.O_RDONLY | os.O_NONBLOCK)
        await asyncio.to_thread(store.close, 10)
        os.close(reader)

    asyncio.run(scenario())
    assert any("too slow" in message for message in told)


def test_a_full_disk_is_told_in_the_loop(tmp_path: Path) -> None:
    told: list[str] = []

    async def scenario() -> None:
        store = ReportStore(tmp_path / "crashes", 5, told.append)
        (tmp_path / "crashes" / ".1.partial").mkdir()
        store.put(1, b"{}")
        await asyncio.to_thread(store.close, 10)
        await asyncio.sleep(0)

    asyncio.run(scenario())
    assert len(told) == 1
    assert "1.json can't be written" in told[0]


# --- the daemon ----------------------------------------------------------------------------------------------------


def ask(daemon: StandInDaemon, path: str) -> Any:
    with daemon.control_client() as client:
        return client.get(path).json()


def test_every_death_that_nobody_asked_for_leaves_a_report_that_outlives_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    with StandInDaemon(tmp_path / "first") as daemon:
        daemon.order("engine", unproven=[7, 9])
        daemon.wait_job(daemon.ask("restart", {"worker": "engine"}))
        assert ask(daemon, "/v1/crashes") == [], "a restart on request is no crash"
        daemon.order("live", engine={"memory_used": 5e9})
        wait_for(lambda: daemon.worker("engine-0")["memory_bytes"])
        wait_for(lambda: ask(daemon, "/v1/config?effective=1")["measured"])
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGSEGV)
        (summary,) = wait_for(lambda: ask(daemon, "/v1/crashes"))
        os.kill(daemon.worker("api-0")["pid"], signal.SIGKILL)
        wait_for(lambda: len(ask(daemon, "/v1/crashes")) == 2)
        assert [crash["worker"] for crash in ask(daemon, "/v1/crashes")] == ["api-0", "engine-0"]
        made = msgspec.convert(ask(daemon, f"/v1/crashes/{summary['id']}"), Crash)
        assert (made.worker, made.generation, made.revision, made.phase) == ("engine-0", 2, 1, "ready")
        assert (made.signal, made.self_inflicted, made.stats) == ("SIGSEGV", True, {"memory_used": 5e9})
        assert made.last_step is not None
        assert (made.last_step.kind, made.last_step.unproven) == ("prefill", [7, 9])
        assert made.memory_bytes > 1 << 20
        assert made.model
        assert any("most recent call first" in line for line in made.stderr)
        assert not any(line.startswith("<") for line in made.stderr)
        assert any(event["kind"] == "crash" for event in daemon.status()["events"])
        daemon.wait_ready()
        daemon.stop()
    assert {path.name for path in (tmp_path / "crashes").iterdir()} == {"1.json", "2.json"}
    with StandInDaemon(tmp_path / "second") as daemon:
        assert [crash["id"] for crash in ask(daemon, "/v1/crashes")] == [2, 1]
        with daemon.control_client() as client:
            for unknown in ("3", "last", "1" * 400):
                refusal = client.get(f"/v1/crashes/{unknown}")
                assert (refusal.status_code, refusal.json()["error"]) == (404, "NoSuchCrash")


def test_reset_failed_starts_at_once_what_was_given_up(tmp_path: Path) -> None:
    with StandInDaemon(
        tmp_path, "--supervisor.start_limit_burst", "1", "--supervisor.retry_interval", "1000"
    ) as daemon:
        daemon.order("engine", fail={"kind": "weights", "message": "truncated"}, exit=1)
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)
        daemon.wait_worker("engine-0", state="fatal")
        daemon.order("engine")
        assert (
            daemon.wait_job(daemon.ask("reset-failed", {"worker": "api-0"}))["message"] == "there was nothing to forget"
        )
        assert daemon.worker("engine-0")["state"] == "fatal"
        assert daemon.ask("reset-failed", {"worker": "x"}).json()["error"] == "NoSuchWorker"
        assert daemon.wait_job(daemon.ask("reset-failed"))["message"] == "engine-0 starts again"
        daemon.wait_worker("engine-0", state="running")

        daemon.order("api", exit=1)
        os.kill(daemon.worker("api-0")["pid"], signal.SIGKILL)
        wait_for(lambda: daemon.worker("api-0")["state"] == "backoff" and daemon.worker("api-0")["next_try_at"])
        daemon.order("api")
        assert daemon.wait_job(daemon.ask("reset-failed", {"worker": "api"}))["message"] == "api-0 starts again"
        daemon.wait_worker("api-0", state="running")

"""Crash reports: what is known of each worker that died without having been asked to, and of each fault of our own.

The last ones are kept in memory and, where there is a state directory, as files that outlive the daemon.
"""

from __future__ import annotations

import hashlib
import os
import time
import traceback
from pathlib import Path

import msgspec

from lightllmd import __version__
from lightllmd.config.parameters import Config
from lightllmd.errors import NoSuchCrash
from lightllmd.ipc.flight_record import Flight
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending, signal_name
from lightllmd.supervisor.journal.logs import OWN, EventBook
from lightllmd.supervisor.journal.report_store import ReportStore

KEPT = 50  # reports, in memory and on disk
LONGEST_LINE = 2000  # characters of a line of its output
LONGEST_CAUSE = 300  # characters of an exception's own words
TRACEBACK_LINES = 100
MOST_REQUESTS = 100  # request numbers listed


class LastStep(msgspec.Struct, frozen=True, kw_only=True):
    """What the engine had on its device, by its flight record."""

    number: int
    kind: str  # "prefill" | "decode" | "idle"
    rows: int
    tokens: int  # fed in this step
    unproven: list[int]  # requests in it that had no token since their (re)admission, at most MOST_REQUESTS
    unproven_total: int


class CrashSummary(msgspec.Struct, frozen=True, kw_only=True):
    """What `GET /v1/crashes` lists of each report."""

    id: int  # grows by one; goes on over restarts of the daemon where there is a state directory
    at: float  # Unix seconds
    worker: str  # "engine-0", "engine-0.1": its rank 1, "api-0", "spare"; "lightllmd": the supervisor, which may go on
    pid: int
    generation: int  # the engine's generation, the api worker's epoch; 0: a spare
    revision: int  # of the plan in force for it; 0: none
    phase: str  # the last that it told; of a supervisor: what it was doing
    cause: str  # in words
    signal: str | None  # that ended it, such as "SIGSEGV"
    exit_code: int | None  # None: a signal ended it, or it lives
    self_inflicted: bool  # a fault of its own, not a kill or a hang


class Crash(CrashSummary, frozen=True, kw_only=True):
    """A whole report, as it is stored and as `GET /v1/crashes/{id}` answers."""

    version: str  # lightllmd's
    model: str
    config_digest: str  # equal for equal configurations: the first 16 hexadecimal digits of SHA-256
    uptime_s: float  # of this process
    progress: int  # within the phase: bytes while loading, steps when ready
    memory_bytes: int  # resident set as last measured, up to a second before
    stats: dict[str, float]  # of its last heartbeat; memory_*: bytes by the engine's own account
    last_step: LastStep | None  # engines only; None: nothing is known of it
    xids: list[int] | None  # critical errors of its GPUs; None: unknown, since NVML tells them to listeners only
    stderr: list[str]  # its last lines; after a fault or a hang the stacks of its threads


def words(fault: BaseException) -> str:
    """An exception on one line of bounded length."""
    text = " ".join(str(fault).split())
    return f"internal error: {type(fault).__name__}" + (f": {text[:LONGEST_CAUSE]}" if text else "")


def config_digest(config: Config) -> str:
    """The first 16 hexadecimal digits of SHA-256 over the configuration: equal for equal ones."""
    return hashlib.sha256(msgspec.json.encode(config)).hexdigest()[:16]


def last_step(flight: Flight | None) -> LastStep | None:
    """The step that an engine was in by its flight record; None where it had begun none."""
    if flight is None or flight.step == 0:
        return None
    return LastStep(
        number=flight.step,
        kind=flight.kind,
        rows=flight.rows,
        tokens=flight.tokens,
        unproven=flight.unproven[:MOST_REQUESTS],
        unproven_total=len(flight.unproven),
    )


class Crashes:
    """The last `KEPT` reports. Belongs to the loop's thread; the files are written elsewhere (`ReportStore`)."""

    def __init__(self, events: EventBook, store: ReportStore | None = None) -> None:
        self._events = events
        self._store = store
        self._reports: dict[int, Crash] = {}  # by id, oldest first
        self._started = time.time()
        self._last = 0
        if store is None:
            return
        for number, body in store.load():
            self._last = number  # a damaged one's number is not given again
            try:
                self._reports[number] = msgspec.structs.replace(msgspec.json.decode(body, type=Crash), id=number)
            except msgspec.MsgspecError as damage:
                store.complain(f"crash report {number} can't be read: {damage}")

    def add(
        self,
        child: Child,
        ending: Ending,
        *,
        config: Config,
        model: str,
        revision: int = 0,
        flight: Flight | None = None,
    ) -> Crash | None:
        """The report of `child`, which is dead and disposed of; None where it did what it was asked to."""
        if child.asked is not None and child.hung is None:
            return None
        self._last += 1
        returncode = child.process.reap() or 0
        report = Crash(
            id=self._last,
            at=time.time(),
            worker=child.worker,
            pid=child.pid,
            generation=child.number,
            revision=revision,
            phase=child.vitals.phase,
            cause=ending.cause,
            signal=signal_name(-returncode) if returncode < 0 else None,
            exit_code=returncode if returncode >= 0 else None,
            self_inflicted=ending.self_inflicted,
            version=__version__,
            model=model,
            config_digest=config_digest(config),
            uptime_s=round(time.time() - child.started, 3),
            progress=child.vitals.progress,
            memory_bytes=child.memory,
            stats=child.stats,
            last_step=last_step(flight),
            xids=None,
            stderr=[line[:LONGEST_LINE] for line in child.tail],
        )
        self._keep(report)
        self._events.add("crash", f"crash report {report.id}: {report.cause}", report.worker, "warning")
        return report

    def add_fault(self, doing: str, fault: BaseException, *, config: Config, model: str, revision: int) -> Crash:
        """The report of an exception that the supervisor has no name for. `doing`: what it was raised in."""
        self._last += 1
        lines = "".join(traceback.format_exception(fault)).splitlines()
        report = Crash(
            id=self._last,
            at=time.time(),
            worker=OWN,
            pid=os.getpid(),
            generation=0,
            revision=revision,
            phase=doing,
            cause=words(fault),
            signal=None,
            exit_code=None,
            self_inflicted=True,
            version=__version__,
            model=model,
            config_digest=config_digest(config),
            uptime_s=round(time.time() - self._started, 3),
            progress=0,
            memory_bytes=0,
            stats={},
            last_step=None,
            xids=None,
            stderr=[line[:LONGEST_LINE] for line in lines[-TRACEBACK_LINES:]],
        )
        self._keep(report)
        self._events.add("crash", f"crash report {report.id}: {doing}: {report.cause}", level="error")
        return report

    def _keep(self, report: Crash) -> None:
        self._reports[report.id] = report
        while len(self._reports) > KEPT:
            del self._reports[next(iter(self._reports))]
        if self._store is not None:
            self._store.put(report.id, msgspec.json.encode(report))

    def all(self) -> list[CrashSummary]:
        """Newest first."""
        fields = CrashSummary.__struct_fields__
        return [
            CrashSummary(**{name: getattr(report, name) for name in fields})
            for report in reversed(self._reports.values())
        ]

    def get(self, number: int) -> Crash:
        """Raises NoSuchCrash."""
        try:
            return self._reports[number]
        except KeyError:
            raise NoSuchCrash(f"no crash report {number}", id=number) from None

    def close(self, timeout: float = 1.0) -> None:
        """Waits until all is written, but not for ever."""
        if self._store is not None:
            self._store.close(timeout)


def open_crashes(events: EventBook, state_directory: str) -> Crashes:
    """With the files below `state_directory` ($STATE_DIRECTORY; "": none); without them where it can't be used."""
    if not state_directory:
        return Crashes(events)
    # systemd lists several separated by colons; ours is the first
    directory = Path(state_directory.split(":")[0]) / "crashes"
    complain = lambda message: events.add("warning", message, level="warning")  # noqa: E731
    try:
        return Crashes(events, ReportStore(directory, KEPT, complain))
    except OSError as refused:
        complain(f"crash reports are kept in memory only: {refused}")
        return Crashes(events)

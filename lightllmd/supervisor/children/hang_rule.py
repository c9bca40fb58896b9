"""The hang rule: a worker without progress is overdue after a time that depends on its phase."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lightllmd.config.parameters import SupervisorSettings
from lightllmd.ipc.messages import Heartbeat

LONGEST_STEP = 0.5  # seconds that one turn of the supervisor's loop may count for
SILENT = 2.0  # seconds without a heartbeat, of which one comes every half second


class RunningClock:
    """Seconds that the supervisor really ran.

    Deadlines are measured with it, so a supervisor that was stopped (SIGSTOP, a suspended machine) finds its
    workers as it left them instead of overdue. `advance` is called at every turn of the loop.
    """

    def __init__(self, monotonic: Callable[[], float] = time.monotonic) -> None:
        self._monotonic = monotonic
        self._last = monotonic()
        self.now = 0.0

    def advance(self) -> float:
        """Adds the time since the last call, LONGEST_STEP seconds at most; returns `now`."""
        last, self._last = self._last, self._monotonic()
        self.now += min(self._last - last, LONGEST_STEP)
        return self.now


@dataclass
class Vitals:
    """What one worker's heartbeats say. Times are of the `RunningClock`."""

    moved: float  # of the last progress; the spawn before the first heartbeat
    heard: float | None = None  # of the last heartbeat
    phase: str = "boot"
    progress: int = 0
    total: int = 0
    beats: int = 0
    stopped: float | None = None  # since when SIGSTOP holds it

    def hold(self, stopped: bool, now: float) -> None:
        """What the kernel says: whether the process may run at all."""
        if not stopped:
            self.stopped = None
        elif self.stopped is None:
            self.stopped = now

    def hear(self, beat: Heartbeat, now: float) -> None:
        """Takes in a heartbeat that came at `now` (running clock)."""
        # Only a worker in service, or asleep, can be idle; one that is still starting has work to do, whatever it says.
        idle = beat.phase in ("ready", "asleep") and not beat.busy
        if idle or beat.phase != self.phase or beat.progress != self.progress or self.heard is None:
            self.moved = now
        self.heard = now
        self.phase, self.progress, self.total = beat.phase, beat.progress, beat.total
        self.beats += 1


def patience(phase: str, settings: SupervisorSettings) -> float:
    """Seconds without progress that a worker in `phase` may take."""
    return {
        "boot": settings.boot_timeout,
        "load": settings.load_timeout,
        "warmup": settings.warmup_timeout,
    }.get(phase, settings.hang_timeout)


def overdue(vitals: Vitals, settings: SupervisorSettings, now: float) -> str | None:
    """Why this worker counts as hung, in words; None while it is well."""
    if vitals.stopped is not None and now - vitals.stopped > settings.hang_timeout:
        # It can't make progress, so no phase's longer patience applies.
        return f"stopped by a signal for {settings.hang_timeout:g} s in phase {vitals.phase}"
    limit = patience(vitals.phase, settings)
    if now - vitals.moved <= limit:
        return None
    silent = vitals.heard is None or now - vitals.heard > limit
    what = "heartbeat" if silent else "progress"
    return f"no {what} for {limit:g} s in phase {vitals.phase}"


def slowest(group: Sequence[Vitals], settings: SupervisorSettings, now: float) -> tuple[int, str]:
    """Of workers that wait for each other, at least one of which is overdue: the index of the one that the others wait
    for, as far as can be told, and why it counts as hung. One that is stopped by a signal is that, then the one whose
    heartbeats ceased first, unless all of them beat."""
    stopped = [index for index, vitals in enumerate(group) if vitals.stopped is not None]
    silent = [index for index, vitals in enumerate(group) if _silence(vitals, now) > SILENT]
    late = [index for index, vitals in enumerate(group) if overdue(vitals, settings, now) is not None]
    found = (stopped or sorted(silent, key=lambda index: -_silence(group[index], now)) or late)[0]
    if reason := overdue(group[found], settings, now):
        return found, reason
    phase = group[found].phase
    if stopped:
        return found, f"stopped by a signal in phase {phase}"
    return found, f"no heartbeat for {_silence(group[found], now):.1f} s in phase {phase}"


def _silence(vitals: Vitals, now: float) -> float:
    return now - vitals.heard if vitals.heard is not None else now - vitals.moved

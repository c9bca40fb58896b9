"""One worker, kept running by the restart policy: its process may die, the worker stays."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator

import msgspec

from lightllmd.errors import SystemFailure
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.children import restart
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.context import Context

STDERR_SHOWN = 40  # lines in the status; the crash report has more


class Worker:
    """ "api-0", "engine-0": the name stays, processes come and go.

    `launch(number)` starts process number `number` (1, 2, …) of this place.
    """

    def __init__(
        self,
        context: Context,
        kind: str,
        index: int,
        launch: Callable[[int], Child],
        numbers: Iterator[int] | None = None,
    ) -> None:
        """`numbers`: where the processes' numbers come from, if not from this place alone."""
        self._context = context
        self._launch = launch
        self._numbers = numbers or itertools.count(1)
        self.kind, self.index = kind, index
        self.name = f"{kind}-{index}"
        self.child: Child | None = None
        self.number = 0  # of the last process started
        self.starts = 0
        self._restarts_before = 0  # of those whose place this one took
        self.failures: tuple[float, ...] = ()  # see restart.decide
        self.limited = False  # past the start limit
        self.fatal: Ending | None = None  # will not be started again by itself
        self.changed = False  # the last one ended because the model's files are not those of its plan
        self.last_exit: snapshot.Exit | None = None
        self.due: float | None = None  # running clock: when it is started again
        self.due_at: float | None = None  # the same as Unix time

    # --- life ----------------------------------------------------------------------------------------------------
    def next_number(self) -> int:
        """Counts a process more."""
        self.number = next(self._numbers)
        self.starts += 1
        return self.number

    def start(self) -> None:
        """Starts a process now; where the host refuses one that counts as a failed start."""
        self.next_number()
        self.due = self.due_at = None
        self.fatal = None
        try:
            self.child = self._launch(self.number)
        except SystemFailure as refused:
            self._schedule_restart(Ending(refused.message, False), proved=False, tail=[])

    def start_if_due(self) -> None:
        """At every tick: starts a process when policy says so."""
        if self.due is not None and self._context.clock.now >= self.due:
            self.start()

    def became_ready(self) -> None:
        """Its process is in service."""
        back = ""
        if self.last_exit is not None and self.last_exit.back_in_s is None:
            gone = time.time() - self.last_exit.at
            self.last_exit = msgspec.structs.replace(self.last_exit, back_in_s=round(gone, 3))
            back = f", back in {gone:.1f} s"
        self.limited = self.changed = False
        pid = self.child.pid if self.child else 0
        self._context.events.add("ready", f"ready (pid {pid}{back})", self.name)

    def died(self, ending: Ending, again: bool, first: Child | None = None, asked: bool | None = None) -> None:
        """Its process is dead and disposed of. `again`: it is wanted, so policy decides when it comes back.

        Where it was one of several: `first` was the cause, and `asked` tells whether that was told to end.
        """
        child, self.child = self.child, None
        assert child is not None
        first = first or child
        asked = bool(first.asked) if asked is None else asked
        self._schedule_restart(ending, proved=child.proved, tail=list(first.tail), again=again, asked=asked)

    def _schedule_restart(
        self, ending: Ending, *, proved: bool, tail: list[str], again: bool = True, asked: bool = False
    ) -> None:
        clock = self._context.clock
        self.changed = ending.changed
        self.last_exit = snapshot.Exit(cause=ending.cause, at=time.time(), stderr=tail[-STDERR_SHOWN:])
        if not again:
            self.due = self.due_at = None
            self._context.events.add("exit", ending.cause, self.name)
            return
        if asked:
            # No failure: what failed before still counts.
            decision = restart.Decision(0.0, self.failures, self.limited)
        else:
            decision = restart.decide(
                self.failures,
                clock.now,
                proved=proved,
                permanent=ending.permanent,
                settings=self._context.config.supervisor,
                jitter=self._context.random.random(),
            )
        self.failures, self.limited = decision.failures, decision.limited
        if decision.delay is None:
            self.fatal, self.due, self.due_at = ending, None, None
            what = "not started again: the same plan would fail the same way"
        else:
            self.due, self.due_at = clock.now + decision.delay, time.time() + decision.delay
            what = f"next start in {decision.delay:.1f} s" if decision.delay else "starting again"
            if decision.limited:
                what += f" (failed {len(self.failures)} times in a row)"
        self._context.events.add("exit", f"{ending.cause}; {what}", self.name, "info" if asked else "warning")

    def reset_failures(self) -> None:
        """The next start counts as the first one. Due at once if it is down."""
        self.failures, self.limited, self.fatal = (), False, None
        if self.child is None:
            self.due, self.due_at = self._context.clock.now, time.time()

    def succeed(self, before: Worker) -> None:
        """It takes the place of `before`, and goes on with its count of restarts."""
        self._restarts_before, before.starts, before._restarts_before = before.restarts, 0, 0
        if self.last_exit is None and before.last_exit is not None and before.last_exit.back_in_s is not None:
            self.last_exit = before.last_exit

    # --- snapshot ------------------------------------------------------------------------------------------------
    @property
    def ready(self) -> bool:
        """Whether its process is in service."""
        return self.child is not None and self.child.ready

    @property
    def down(self) -> bool:
        """It has no process, and nothing brings one back."""
        return self.child is None and self.due is None and self.fatal is None

    @property
    def restarts(self) -> int:
        """Starts after the first, those of the places that this one succeeded included."""
        return self._restarts_before + max(self.starts - 1, 0)

    @property
    def trouble(self) -> str:
        """Why it is down, in words."""
        return self.last_exit.cause if self.last_exit else "it does not come up"

    @property
    def state(self) -> str:
        """Its process's state, or "backoff", "fatal" or "exited" where there is none."""
        if self.child is not None:
            return self.child.state
        if self.fatal is not None:
            return "fatal"
        return "backoff" if self.due is not None else "exited"

    def snapshot(self, rank: int | None = None, member: Child | None = None) -> snapshot.WorkerStatus:
        """As the control plane shows it, or, of an engine, `rank`, whose process `member` is; that of rank 0 may be
        missing."""
        child = member or self.child
        heard = child.vitals.heard if child else None
        return snapshot.WorkerStatus(
            name=member.worker if member else self.name,
            kind=self.kind,
            index=self.index,
            rank=rank,
            pid=child.pid if child and not child.exited else None,
            state=child.state if child else self.state,
            phase=child.vitals.phase if child else "",
            progress=child.vitals.progress if child else 0,
            progress_total=child.vitals.total if child else 0,
            restarts=self.restarts,
            generation=child.number if child else self.number,  # a replacement that failed has the newest
            memory_bytes=child.memory if child and not child.exited else 0,
            heartbeat_age_s=round(self._context.clock.now - heard, 3) if heard is not None else None,
            started=child.started if child else None,
            last_exit=self.last_exit,
            next_try_at=self.due_at,
        )

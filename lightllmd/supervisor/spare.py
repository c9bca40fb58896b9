"""A second engine process, with its imports done, that waits for the next restart or swap."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightllmd.config.plan import Plan
from lightllmd.errors import SystemFailure
from lightllmd.ipc import flight_record
from lightllmd.supervisor.child import Child
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.exits import Ending
from lightllmd.supervisor.procfs import is_stopped


class EngineProcess:
    """A process that is to become a generation, and the record of what it will be doing. Raises SystemFailure."""

    def __init__(self, context: Context, worker: str, early: Sequence[str] = ()) -> None:
        try:
            self.flight = flight_record.create()
        except OSError as refused:
            raise SystemFailure(f"can't make the flight record: {refused}") from refused
        try:
            self.child = Child(
                context,
                worker,
                lambda fd: context.commands.engine(fd, self.flight, early),
                pass_fds=(self.flight,),
            )
        except SystemFailure:
            os.close(self.flight)
            raise

    def dispose(self) -> None:
        self.child.dispose()
        os.close(self.flight)


class Spare:
    """At most one at a time. It takes part in nothing until it is taken: what it has imported serves any plan.

    It touches no device. A context made beforehand would save 0.3 to 0.5 s of the seconds that a start takes, and cost
    0.5 GB of the GPU all the time: the KV cache of 4,000 tokens of an 8B model.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._early: Sequence[str] = ()  # what it imports; empty: none is kept
        self._process: EngineProcess | None = None

    @property
    def child(self) -> Child | None:
        return self._process.child if self._process else None

    def owns(self, child: Child) -> bool:
        return self.child is child

    def plan_for(self, plan: Plan) -> None:
        self._early = self._context.commands.early(plan)

    def keep(self) -> None:
        """Called when a generation has become ready, or the setting changed: only then, so a spare that can't live
        isn't tried in a loop."""
        if not self._early or not self._context.config.supervisor.spare_engine:
            if self.child is not None and self.child.asked is None:
                self.child.terminate("no spare engine is wanted")
            return
        if self._process is not None:
            return
        try:
            self._process = EngineProcess(self._context, "spare", self._early)
        except SystemFailure as refused:
            self._context.log.own("warning", f"no spare engine: {refused.message}")

    def take(self) -> EngineProcess | None:
        """The spare, which is the caller's from now on, whatever its plan; None where there is none that lives."""
        process = self._process
        if process is None or process.child.asked is not None:
            return None
        if process.child.process.reap() is not None or process.child.channel.closed:
            return None  # what is dead or dying stays here until it is buried
        if is_stopped(process.child.pid):
            process.child.kill("stopped by a signal")
            return None
        self._process = None
        return process

    def died(self, ending: Ending) -> None:
        assert self._process is not None
        if self._process.child.asked is None:
            self._context.log.own("warning", f"the spare engine: {ending.cause}")
        self._process.dispose()
        self._process = None

    def end(self, why: str) -> None:
        """For good."""
        self._early = ()
        if self.child is not None:
            self.child.terminate(why)

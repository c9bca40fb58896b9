"""A second engine process, with its imports done, that waits for the next restart."""

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
    """At most one at a time. It touches no device and takes part in nothing until it is taken."""

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
        """Called when a generation has become ready: only then, so a spare that can't live isn't tried in a loop."""
        if self._process or not self._early or not self._context.config.supervisor.spare_engine:
            return
        try:
            self._process = EngineProcess(self._context, "spare", self._early)
        except SystemFailure as refused:
            self._context.log.own("warning", f"no spare engine: {refused.message}")

    def take(self) -> EngineProcess | None:
        """The spare, which is the caller's from now on; None where there is none that lives."""
        process = self._process
        if process is None or process.child.process.reap() is not None or process.child.channel.closed:
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

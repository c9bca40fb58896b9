"""A second engine process, with its imports done, that waits for the next restart or swap."""

from __future__ import annotations

import os
from collections.abc import Sequence

from lightllmd.config.plan import Plan
from lightllmd.errors import SystemFailure
from lightllmd.ipc import flight_record
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.host.procfs import is_stopped


class EngineProcess:
    """A process that is to become a generation, and the record of what it will be doing. Raises SystemFailure.

    `early`: modules that it imports at once. `context_bytes`: of a GPU, for a context that it makes there at once.
    """

    def __init__(self, context: Context, worker: str, early: Sequence[str] = (), context_bytes: int = 0) -> None:
        self.context_bytes = context_bytes
        context_on = "cuda" if context_bytes else None
        try:
            self.flight = flight_record.create()
        except OSError as refused:
            raise SystemFailure(f"can't make the flight record: {refused}") from refused
        try:
            self.child = Child(
                context,
                worker,
                lambda fd: context.commands.engine(fd, self.flight, early, context_on),
                pass_fds=(self.flight,),
            )
        except SystemFailure:
            os.close(self.flight)
            raise

    @property
    def begun(self) -> bool:
        """All is done that can be before it's configured."""
        return self.child.vitals.heard is not None

    def dispose(self) -> None:
        """After its death: lets go of its descriptors and its record."""
        self.child.dispose()
        os.close(self.flight)


class Spare:
    """At most one at a time. It takes part in nothing until it is taken: what it has imported serves any plan.

    Of a GPU it has a context and nothing else, where the plan has the bytes for that; a CPU it doesn't touch. One that
    can't make its context ends.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._early: Sequence[str] = ()  # what the next one imports; empty: none is kept
        self._bytes = 0  # what its context may take of a GPU; 0: it makes none
        self._process: EngineProcess | None = None
        self._ended = False  # the daemon stops; engines may still become ready meanwhile

    @property
    def child(self) -> Child | None:
        """Its process, if there is one."""
        return self._process.child if self._process else None

    @property
    def begun(self) -> bool:
        """It can be taken: all is done that can be before it's configured."""
        return self._process is not None and self._process.begun

    @property
    def context_bytes(self) -> int:
        """Of a GPU, as planned: what isn't free there because of it, and becomes its generation's own context."""
        return self._process.context_bytes if self._process is not None and self.begun else 0

    def owns(self, child: Child) -> bool:
        """Whether `child` is the spare's process."""
        return self.child is child

    def plan_for(self, plan: Plan) -> None:
        """What the next spare imports, and the bytes that it may take of a GPU, are this plan's."""
        self._early, self._bytes = self._context.commands.early(plan), plan.budget.spare

    def keep(self) -> None:
        """Called when the engine in force has become ready, or the setting changed: only then, so a spare that can't
        live isn't tried in a loop."""
        if self._ended:
            return
        if not self._early or not self._context.config.supervisor.spare_engine:
            if self.child is not None and self.child.asked is None:
                self.child.terminate("no spare engine is wanted")
            return
        if self._process is not None:
            return
        try:
            self._process = EngineProcess(self._context, "spare", self._early, self._bytes)
        except SystemFailure as refused:
            self._context.log.own("warning", f"no spare engine: {refused.message}")

    def take(self, plan: Plan) -> EngineProcess | None:
        """The spare, which is the caller's from now on; None where there is none that lives. Any plan's will do, but
        for one with a context that `plan` has no use for."""
        process = self._process
        if process is None or process.child.asked is not None:
            return None
        if process.child.process.reap() is not None or process.child.channel.closed:
            return None  # what is dead or dying stays here until its exit is handled
        if is_stopped(process.child.pid):
            process.child.kill("stopped by a signal")
            return None
        if process.context_bytes and plan.device.kind != "cuda":
            process.child.terminate("its device is out of use")
            return None
        self._process = None
        return process

    def died(self, ending: Ending) -> None:
        """Its process is dead. None follows until `keep` is called again."""
        assert self._process is not None
        if self._process.child.asked is None:
            self._context.log.own("warning", f"the spare engine: {ending.cause}")
        self._process.dispose()
        self._process = None

    def snapshot(self) -> snapshot.WorkerStatus | None:
        """As the control plane shows it; None without a process."""
        if self._process is None:
            return None
        child, begun = self._process.child, self.begun
        return snapshot.WorkerStatus(
            name=child.worker,
            kind="spare",
            index=0,
            rank=None,
            pid=child.pid,
            state="running" if begun and child.state == "starting" else child.state,
            phase="ready" if begun else "boot",
            progress=0,
            progress_total=0,
            restarts=0,
            generation=0,
            memory_bytes=child.memory,
            heartbeat_age_s=None,
            started=child.started,
            last_exit=None,
            next_try_at=None,
        )

    def end(self, why: str) -> None:
        """For good."""
        self._ended = True
        if self.child is not None:
            self.child.terminate(why)

"""Engine processes, with their imports done, that wait for the next restart or swap."""

from __future__ import annotations

import itertools
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


def rank_name(worker: str, rank: int) -> str:
    """Of one rank's process: "engine-0" leads "engine-0.1", "engine-0.2", …; spare ones are named alike."""
    return f"{worker}.{rank}" if rank else worker


class EngineProcess:
    """A process that is to become a rank of a generation, and the record of what it will be doing. Raises
    SystemFailure.

    `device`: the index of its GPU; what a CPU's is doesn't matter. `early`: modules that it imports at once.
    `context_bytes`: of the GPU, for a context that it makes there at once.
    """

    def __init__(
        self, context: Context, worker: str, device: int = 0, early: Sequence[str] = (), context_bytes: int = 0
    ) -> None:
        self.device, self.context_bytes = device, context_bytes
        context_on = f"cuda:{device}" if context_bytes else None
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

    def snapshot(self) -> snapshot.WorkerStatus:
        """As the control plane shows a spare one."""
        child, begun = self.child, self.begun
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


class Spares:
    """At most one for each rank of the plan in force, on each GPU of its engines. They take part in nothing until they
    are taken: what they have imported serves any plan.

    Of a GPU, its rank's, each has a context and nothing else, where the plan has the bytes for that; a CPU they don't
    touch. One that can't make its context ends.
    """

    def __init__(self, context: Context) -> None:
        self._context = context
        self._early: Sequence[str] = ()  # what the next ones import; empty: none is kept
        self._bytes = 0  # what the context of each may take of its GPU; 0: it makes none
        self._devices: list[int] = []  # of the ranks
        self._processes: list[EngineProcess] = []
        self._ended = False  # the daemon stops; engines may still become ready meanwhile

    def children(self) -> list[Child]:
        """Their processes."""
        return [process.child for process in self._processes]

    @property
    def holders(self) -> list[tuple[Child | None, bool]]:
        """What holds memory of a device, and whether that is all they will."""
        return [(process.child, process.begun) for process in self._processes]

    @property
    def context_bytes(self) -> dict[int, int]:
        """Of each GPU, as planned: what isn't free there because of one that can be taken, and becomes its rank's own
        context."""
        return {process.device: process.context_bytes for process in self._processes if process.begun}

    def owns(self, child: Child) -> bool:
        """Whether `child` is a spare process."""
        return child in self.children()

    def plan_for(self, plan: Plan) -> None:
        """What the next spares import, where, and the bytes that each may take of a GPU, are this plan's."""
        self._early, self._bytes = self._context.commands.early(plan), plan.budget.spare
        self._devices = list(plan.devices) or [0] * plan.ranks

    def keep(self) -> None:
        """Called when the engine in force has become ready, or the setting changed: only then, so a spare that can't
        live isn't tried in a loop."""
        if self._ended:
            return
        if not self._early or not self._context.config.supervisor.spare_engine:
            self._dismiss(self._processes, "no spare engine is wanted")
            return
        wanted = list(self._devices)
        for process in self._processes:
            if process.device in wanted:
                wanted.remove(process.device)
            else:
                self._dismiss([process], "its device is out of use")
        for device in wanted:
            taken = {child.worker for child in self.children()}
            name = next(name for rank in itertools.count() if (name := rank_name("spare", rank)) not in taken)
            try:
                self._processes.append(EngineProcess(self._context, name, device, self._early, self._bytes))
            except SystemFailure as refused:
                self._context.log.own("warning", f"no spare engine: {refused.message}")
                return

    def take(self, plan: Plan, device: int) -> EngineProcess | None:
        """One for a rank on this device, which is the caller's from now on; None where there is none that lives. Any
        plan's will do, but for one with a context that `plan` has no use for, or on another device."""
        for process in list(self._processes):
            if process.child.asked is not None or process.child.process.reap() is not None:
                continue  # what is dead or dying stays here until its exit is handled
            if process.child.channel.closed:
                continue
            if is_stopped(process.child.pid):
                process.child.kill("stopped by a signal")
                continue
            if process.context_bytes and plan.device.kind != "cuda":
                self._dismiss([process], "its device is out of use")
                continue
            if process.context_bytes and process.device != device:
                continue
            self._processes.remove(process)
            process.device = device
            return process
        return None

    def _dismiss(self, processes: Sequence[EngineProcess], why: str) -> None:
        for process in processes:
            if process.child.asked is None:
                process.child.terminate(why)

    def died(self, child: Child, ending: Ending) -> None:
        """That process is dead. None follows until `keep` is called again."""
        process = next(process for process in self._processes if process.child is child)
        if child.asked is None:
            number = "" if child.worker == "spare" else f" {child.worker}"
            self._context.log.own("warning", f"the spare engine{number}: {ending.cause}")
        process.dispose()
        self._processes.remove(process)

    def snapshots(self) -> list[snapshot.WorkerStatus]:
        """As the control plane shows them."""
        return [process.snapshot() for process in self._processes]

    def end(self, why: str) -> None:
        """For good."""
        self._ended = True
        self._dismiss(self._processes, why)

"""One generation of an engine: a process for each of its ranks, which end as one."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from lightllmd.errors import SystemFailure
from lightllmd.ipc import flight_record
from lightllmd.ipc.endpoints import meeting_path
from lightllmd.ipc.messages import EngineConfigure
from lightllmd.supervisor.children import hang_rule
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.host.procfs import is_stopped
from lightllmd.supervisor.workers.spare import EngineProcess, rank_name


@dataclass(frozen=True)
class FirstEnd:
    """The end of the rank that ended first, which is the cause of the generation's."""

    child: Child
    ending: Ending
    asked: bool  # it was told to end: nothing failed
    flight: flight_record.Flight  # what was computed then


class EngineGeneration:
    """One process for each rank, the endpoint of the one that leads, and the record of what that was doing.

    No rank can go on without the others. Once one is dead, dying, hung, or has said that it failed, the others are
    killed; what befell the first is the cause of the generation's end. It is gone when the last process is.
    """

    def __init__(
        self,
        context: Context,
        worker: str,
        number: int,
        replica: int,
        revision: int,
        plan: bytes,
        ranks: Sequence[EngineProcess],
        refused: SystemFailure | None = None,
    ) -> None:
        """`refused`: the host had no process for some rank, so the generation ends at once."""
        self.ranks = list(ranks)  # by rank
        self.number = number
        self.endpoint = f"ipc://{context.runtime.endpoint_path(number)}"
        self._context = context
        # Those that were ending by themselves when that was first seen of one; empty: all go on.
        self._suspects: list[Child] = []
        self._endings: dict[Child, Ending] = {}  # of the processes that are dead
        self.first: FirstEnd | None = None  # once it is known
        self._taken = False
        if refused is not None:
            self._suspects = [self.leader]
            self.first = FirstEnd(self.leader, Ending(refused.message, False), False, flight_record.Flight())
            for child in self.children:
                child.kill(refused.message)
            return
        for rank, process in enumerate(self.ranks):
            metrics_id = context.runtime.take_metrics_id("engine")
            first = EngineConfigure(
                plan=plan,
                generation=number,
                rank=rank,
                endpoint=self.endpoint,
                metrics_dir=str(context.runtime.metrics),
                metrics_id=metrics_id,
                ranks=len(self.ranks),
                device=process.device,
                replica=replica,
                revision=revision,
            )
            process.child.configure(rank_name(worker, rank), number, metrics_id, first)

    # --- its processes -------------------------------------------------------------------------------------------
    @property
    def leader(self) -> Child:
        """Rank 0: its word is the generation's, and what the generation is told it passes on."""
        return self.ranks[0].child

    @property
    def children(self) -> list[Child]:
        """The processes of all ranks, by rank; dead ones, too."""
        return [process.child for process in self.ranks]

    @property
    def living(self) -> list[Child]:
        """Those that are not dead."""
        return [child for child in self.children if not child.exited]

    @property
    def to_end(self) -> list[Child]:
        """Those of them that nothing ends yet."""
        return [child for child in self.living if child not in self._suspects and child.asked is None]

    def rename(self, worker: str) -> None:
        """What its worker is called from now on."""
        for rank, child in enumerate(self.children):
            child.worker = rank_name(worker, rank)

    @property
    def ready(self) -> bool:
        """In service: its leader said so, and no rank ends."""
        return self.leader.ready and not self.ending

    # --- its end -------------------------------------------------------------------------------------------------
    @property
    def ending(self) -> bool:
        """A rank is dead or will be by itself, so all are."""
        return bool(self._suspects)

    def take_first(self) -> FirstEnd | None:
        """What it ended by, once, when that process is dead."""
        if self.first is None or self.first.child not in self._endings or self._taken:
            return None
        self._taken = True
        return self.first

    @property
    def gone(self) -> bool:
        """No process is left."""
        return not self.living

    def check_hang(self) -> None:
        """At every tick. All ranks stand still when one hangs: that one is named and aborted, not those that wait."""
        if self.ending or len(self.ranks) == 1:
            for child in self._suspects or self.children:
                child.check_hang()
            return
        now, settings = self._context.clock.now, self._context.config.supervisor
        if not any(hang_rule.overdue(child.vitals, settings, now) for child in self.children):
            return
        for child in self.children:  # which is looked at once a second otherwise
            child.vitals.hold(is_stopped(child.pid), now)
        index, reason = hang_rule.slowest([child.vitals for child in self.children], settings, now)
        self.children[index].abort(reason, held=self.children[index].vitals.stopped is not None)

    def look(self) -> bool:
        """Whether it has just become known why it ends. After anything that happened to a rank: where one ends, so do
        the others from here on."""
        if self.first is not None or not any(map(_ends, self.children)):
            return False
        if not self._suspects:
            for child in self.living:
                child.receive()  # who was first may be heard second
            self._suspects = [child for child in self.children if _ends(child)]
            for child in self.to_end:
                child.kill("another rank has ended")
            for child in self._suspects:
                child.expect_end()
        hung = next((child for child in self._suspects if child.hung), None)
        if hung is not None:
            self._put_first(hung, self._endings.get(hung) or Ending(f"hung: {hung.hung}", False, outside=hung.held))
        elif all(child in self._endings for child in self._suspects):
            first = min(self._suspects, key=self._doubt)
            self._put_first(first, self._endings[first])
        return self.first is not None

    def _doubt(self, child: Child) -> int:
        """Of several that end at the same time: an error may well be the echo of what killed another."""
        ending = self._endings[child]
        by_signal = (child.process.reap() or 0) < 0
        return 2 if ending.follows else 0 if by_signal or ending.permanent else 1

    def _put_first(self, child: Child, ending: Ending) -> None:
        if len(self.ranks) > 1:
            cause = f"rank {self.children.index(child)} (pid {child.pid}): {ending.cause}"
            ending = dataclasses.replace(ending, cause=cause)
        self.first = FirstEnd(child, ending, child.asked is not None and child.hung is None, self._flight())

    def died(self, child: Child, ending: Ending) -> None:
        """That process is dead. `look` follows."""
        self._endings[child] = ending
        child.dispose()
        self._context.runtime.release_metrics_id(child.metrics_id)
        if self.first is not None and self.first.child is child and child.hung:
            self._put_first(child, ending)  # which tells how it was ended, too

    def _flight(self) -> flight_record.Flight:
        """What its leader was doing when it died, or was killed."""
        try:
            return flight_record.read(self.ranks[0].flight)
        except (msgspec.MsgspecError, OSError):
            return flight_record.Flight()  # it scribbled over its own record: nothing is known of its last step

    def dispose(self) -> None:
        """When it is gone: lets go of the records, removes the sockets."""
        for process in self.ranks:
            os.close(process.flight)
        for path in (self.endpoint.removeprefix("ipc://"), meeting_path(self.endpoint)):
            Path(path).unlink(missing_ok=True)


def _ends(child: Child) -> bool:
    return child.exited or child.dying or child.hung is not None or child.failed is not None

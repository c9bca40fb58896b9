"""Jobs: every mutation, from request to outcome."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from lightllmd.errors import NoSuchJob
from lightllmd.supervisor.journal.feed import Feed
from lightllmd.supervisor.snapshot import JobStatus

KEPT = 200  # finished jobs remembered


class RunningJob:
    """One mutation. Only the supervisor's loop moves it; readers get frozen `JobStatus` snapshots.

    phases: any words -> finished once, with an outcome that never changes again.
    """

    def __init__(
        self,
        number: int,
        verb: str,
        target: str,
        by_uid: int | None,
        by_pid: int | None,
        details: dict[str, Any] | None = None,
    ) -> None:
        """`details` grow while it runs; each snapshot shows what there is."""
        self.updates: Feed[JobStatus] = Feed(64)
        self._details = {} if details is None else details
        self.snapshot = JobStatus(
            id=number,
            verb=verb,
            target=target,
            phase="accepted",
            progress=None,
            outcome=None,
            message="",
            started=time.time(),
            ended=None,
            by_uid=by_uid,
            by_pid=by_pid,
        )

    @property
    def finished(self) -> bool:
        """Whether it has its outcome."""
        return self.snapshot.outcome is not None

    def advance(self, phase: str, progress: float | None = None) -> None:
        """Publishes where it has got to, if that changed. `progress`: 0..1, None where unknown."""
        if not self.finished and (phase, progress) != (self.snapshot.phase, self.snapshot.progress):
            self._publish(phase=phase, progress=progress)

    def finish(self, outcome: str, message: str = "", error: dict[str, Any] | None = None) -> None:
        """`error`: `LightllmdError.as_dict` of what went wrong."""
        if not self.finished:
            progress = 1.0 if outcome == "done" else self.snapshot.progress
            self._publish(
                phase=outcome, progress=progress, outcome=outcome, message=message, ended=time.time(), error=error
            )
            self.updates.close()

    def _publish(self, **changes: object) -> None:
        fields = {name: getattr(self.snapshot, name) for name in JobStatus.__struct_fields__}
        self.snapshot = JobStatus(**{**fields, "details": dict(self._details), **changes})
        self.updates.add(self.snapshot)

    async def follow(self, idle: float) -> AsyncIterator[list[JobStatus]]:
        """The job as it is, then each change until it is finished; an empty list as keep-alive."""
        updates = self.updates.follow(idle)  # before the first yield, so that nothing falls in between
        yield [self.snapshot]
        async for batch in updates:
            yield batch


class Jobs:
    """All jobs of this daemon's life, the oldest finished ones forgotten."""

    def __init__(self) -> None:
        self._jobs: dict[int, RunningJob] = {}
        self._last = 0

    def open(
        self,
        verb: str,
        target: str = "",
        by_uid: int | None = None,
        by_pid: int | None = None,
        details: dict[str, Any] | None = None,
    ) -> RunningJob:
        """A new job with the next number; `KEPT` finished ones are remembered."""
        self._last += 1
        job = RunningJob(self._last, verb, target, by_uid, by_pid, details)
        self._jobs[self._last] = job
        for number in [number for number, old in self._jobs.items() if old.finished][:-KEPT]:
            del self._jobs[number]
        return job

    def get(self, number: int) -> RunningJob:
        """Raises NoSuchJob."""
        try:
            return self._jobs[number]
        except KeyError:
            raise NoSuchJob(f"no job {number}", id=number) from None

    def running(self, *verbs: str) -> list[RunningJob]:
        """Those in progress, oldest first; of `verbs` only, where given."""
        return [job for job in self._jobs.values() if not job.finished and (not verbs or job.snapshot.verb in verbs)]

    def all(self) -> list[JobStatus]:
        """Oldest first."""
        return [job.snapshot for job in self._jobs.values()]

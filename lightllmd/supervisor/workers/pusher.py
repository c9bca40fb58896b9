"""The process that pushes metrics: there while a gateway is configured. Neither health nor requests depend on it."""

from __future__ import annotations

import os

from lightllmd.config import push
from lightllmd.ipc.messages import LAST_PUSH, PushConfigure, PushTarget
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context

NAME = "push"
MOST_WAIT = LAST_PUSH + 1  # seconds between its `Stop` and its death: what a stop of the daemon may wait for it


class Pusher:
    """Belongs to the single-writer loop."""

    def __init__(self, context: Context) -> None:
        self._context = context
        self.worker = Worker(context, NAME, 0, self._launch)
        self._target: PushTarget | None = None  # None: none is configured
        self._ended = False  # the daemon stops

    def _launch(self, number: int) -> Child:
        assert self._target is not None
        context = self._context
        child = Child(context, self.worker.name, context.commands.push)
        metrics_id = context.runtime.take_metrics_id(NAME)
        log_level = context.config.log.level
        first = PushConfigure(self._target, str(context.runtime.metrics), metrics_id, log_level)
        child.configure(self.worker.name, number, metrics_id, first)
        return child

    def children(self) -> list[Child]:
        """Its process, if there is one."""
        return [self.worker.child] if self.worker.child is not None else []

    def owns(self, child: Child) -> bool:
        """Whether `child` is its process."""
        return self.worker.child is child

    @property
    def _wanted(self) -> bool:
        return self._target is not None and not self._ended

    def in_force(self) -> None:
        """The configuration is another one, or the first."""
        before, self._target = self._target, _target(self._context)
        if self._target == before or self._ended:
            return
        child = self.worker.child
        if self._target is None:
            self._dismiss("no gateway is configured any more")
        elif child is None:
            self.worker.reset_failures()
        else:
            child.send(self._target)

    def restart(self) -> None:
        """Ends its process, if one lives; another follows."""
        self.worker.reset_failures()
        for child in self.children():
            child.terminate("restart requested")

    def tick(self) -> None:
        """Starts what is due."""
        if self._wanted:
            self.worker.start_if_due()

    def died(self, child: Child, ending: Ending, again: bool) -> None:
        """Its process is dead. `again`: policy may start another."""
        child.dispose()
        self._context.runtime.release_metrics_id(child.metrics_id)
        self.worker.died(ending, again and self._wanted)

    def stop(self, why: str, now: bool) -> None:
        """For good. Unless it is `now` it pushes a last time: all whose metrics are to be in that have ended before."""
        self._ended = True
        for child in self.children() if now else ():
            child.kill(why)  # not told to stop first: it would begin a push
        self._dismiss(why)

    def _dismiss(self, why: str) -> None:
        self.worker.due = self.worker.due_at = None
        if self.worker.child is not None and self.worker.child.asked is None:
            self.worker.child.stop(why, within=MOST_WAIT)

    def snapshot(self) -> snapshot.Push | None:
        """As the control plane shows it; None: no gateway is configured."""
        if self._target is None:
            return None
        stats = self.worker.child.stats if self.worker.child else {}
        return snapshot.Push(
            gateway=self._target.gateway,
            job=self._target.job,
            grouping_key=self._target.grouping_key,
            pushed_at=stats.get("pushed_at"),
            pushes=int(stats.get("pushes", 0)),
            failures=int(stats.get("push_failures", 0)),
            failing=bool(stats.get("failing")) or not self.worker.ready,
        )


def _target(context: Context) -> PushTarget | None:
    """As configured. Raises ValueError where the environment lacks what it needs, which is refused before."""
    params = context.config.params
    if params.metric_gateway is None:
        return None
    told = push.credentials(os.environ) if params.enable_monitor_auth else None
    return PushTarget(
        gateway=params.metric_gateway,
        job=params.job_name,
        grouping_key=push.group(params),
        interval=params.push_interval,
        user=told.user if told else None,
        password=told.password if told else None,
    )

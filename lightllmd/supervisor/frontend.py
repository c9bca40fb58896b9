"""The api workers: each kept alive on the listeners that they share, and replaced without refusing a connection."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator

from lightllmd.errors import SystemFailure
from lightllmd.ipc.messages import ApiConfigure, Down, Retire
from lightllmd.supervisor.child import Child
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.exits import Ending
from lightllmd.supervisor.worker import Worker

TOTALS = ("ok", "cancelled", "failed", "resumed")  # count since the start of the api worker's epoch
_BEATS_TO_BELIEVE = 2  # heartbeats after `Drain` until in_flight is known to count what came before it


class Api:
    """One api worker's place. Besides its process there may be a spare on its way in and some on their way out."""

    def __init__(self, context: Context, index: int, greet: Callable[[Child], None]) -> None:
        self._context = context
        self._greet = greet  # tells a new process how things stand
        self.index = index
        self.worker = Worker(context, "api", index, self._launch)
        self.spare: Child | None = None
        self.retiring: list[Child] = []
        self.roll_failure: str | None = None  # why the last replacement didn't come into service

    def _launch(self, epoch: int) -> Child:
        context = self._context
        fds = [sock.fileno() for sock in context.listeners]
        child = Child(context, self.worker.name, context.commands.api, pass_fds=fds)
        seat = context.runtime.take_seat("api")
        first = ApiConfigure(
            plan=context.plan,
            api=self.index,
            epoch=epoch,
            listener_fds=fds,
            metrics_dir=str(context.runtime.metrics),
            metrics_seat=seat,
        )
        child.configure(self.worker.name, epoch, seat, first)
        self._greet(child)
        return child

    def children(self) -> list[Child]:
        present = [self.worker.child, self.spare, *self.retiring]
        return [child for child in present if child is not None and not child.exited]

    def roll(self) -> None:
        """Starts a replacement; when that is ready it takes over and the old one retires."""
        self.roll_failure = None
        if self.worker.child is None:
            self.worker.forgive()
            return
        self.worker.number += 1
        self.worker.starts += 1
        try:
            self.spare = self._launch(self.worker.number)
        except SystemFailure as refused:
            self.roll_failure = refused.message

    @property
    def rolling(self) -> bool:
        return self.spare is not None or (self.roll_failure is None and not self.worker.ready)

    def became_ready(self, child: Child) -> None:
        if child is self.spare:
            old, self.worker.child, self.spare = self.worker.child, child, None
            if old is not None:
                old.send(Retire())
                old.retire("replaced")
                self.retiring.append(old)
        self.worker.became_ready()

    def died(self, child: Child, ending: Ending, again: bool) -> None:
        if child is self.spare:
            self.spare, self.roll_failure = None, ending.cause
            self._context.events.add("exit", f"replacement: {ending.cause}", self.worker.name, "warning")
        elif child in self.retiring:
            self.retiring.remove(child)
            self._context.log.own("debug", f"{self.worker.name}: epoch {child.number} retired")
        elif self.spare is not None:
            # Its replacement is on the way already.
            self.worker.died(ending, again=False)
            self.worker.child, self.spare = self.spare, None
        else:
            self.worker.died(ending, again)
            self.worker.start_if_due()


class FrontEnd:
    """All api workers."""

    def __init__(self, context: Context, workers: int, greet: Callable[[Child], None]) -> None:
        self._context = context
        self.apis = [Api(context, index, greet) for index in range(workers)]
        self._past: Counter[str] = Counter()  # totals of the processes that are gone
        self._beats_at_drain: dict[int, int] = {}  # pid -> heartbeats heard before `Drain` was sent

    def start(self) -> None:
        for api in self.apis:
            api.worker.start()

    def children(self) -> Iterator[Child]:
        for api in self.apis:
            yield from api.children()

    def owner(self, child: Child) -> Api | None:
        return next((api for api in self.apis if child in (api.worker.child, api.spare, *api.retiring)), None)

    def tell(self, message: Down) -> None:
        for child in self.children():
            child.send(message)

    def died(self, api: Api, child: Child, ending: Ending, again: bool) -> None:
        self._past.update({name: int(child.stats.get(name, 0)) for name in TOTALS})
        self._context.runtime.leave_seat(child.seat)
        api.died(child, ending, again)

    def tick(self) -> None:
        for api in self.apis:
            api.worker.start_if_due()

    # --- counts --------------------------------------------------------------------------------------------------
    def total(self, name: str) -> int:
        """Since the daemon's start."""
        return self._past[name] + self.now(name)

    def now(self, name: str) -> int:
        return int(sum(child.stats.get(name, 0) for child in self.children()))

    @property
    def ready(self) -> bool:
        return any(api.worker.ready for api in self.apis)

    def drained_since_now(self) -> None:
        """`Drain` has just been sent: what the workers said before doesn't count any more."""
        self._beats_at_drain = {child.pid: child.vitals.beats for child in self.children()}

    @property
    def idle(self) -> bool:
        """No api worker has a request in flight, by a heartbeat that followed the `Drain`."""
        for child in self.children():
            if child.ready_at is None:
                continue  # it has accepted nothing yet
            if child.stats.get("in_flight", 0) > 0:
                return False
            heard = child.vitals.beats - self._beats_at_drain.get(child.pid, 0)
            if heard < _BEATS_TO_BELIEVE and not child.stats.get("draining"):
                return False
        return True

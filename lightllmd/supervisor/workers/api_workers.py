"""The api workers: each kept alive on the listeners that they share, and replaced without refusing a connection."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator

from lightllmd.errors import SystemFailure
from lightllmd.ipc.messages import (
    ApiConfigure,
    Commit,
    Cut,
    Down,
    Forget,
    Hold,
    Prepare,
    Prepared,
    Probed,
    Release,
    Retire,
)
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.children.exits import Ending
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.replicas import Replicas

TOTALS = ("ok", "cancelled", "failed", "resumed")  # count since the start of the api worker's epoch
_BEATS_TO_BELIEVE = 2  # heartbeats after `Drain` until in_flight is known to count what came before it


class Api:
    """One api worker's place. Besides its process there may be a spare on its way in and some on their way out."""

    def __init__(
        self, context: Context, index: int, epochs: Iterator[int], send_state: Callable[[Child], None]
    ) -> None:
        self._context = context
        self._send_state = send_state  # tells a new process how things stand
        self.index = index
        self.worker = Worker(context, "api", index, self._launch, epochs)
        self.spare: Child | None = None
        self.retiring: list[Child] = []
        self.roll_failure: str | None = None  # why the last replacement didn't come into service
        # Its process has other settings than are in force: when (running clock) the next replacement is tried.
        self.outdated: float | None = None

    def _launch(self, epoch: int) -> Child:
        context = self._context
        fds = [sock.fileno() for sock in context.listeners]
        child = Child(context, self.worker.name, context.commands.api, pass_fds=(*fds, context.quota.fd))
        metrics_id = context.runtime.take_metrics_id("api")
        first = ApiConfigure(
            plan=context.plan,
            api=self.index,
            epoch=epoch,
            listener_fds=fds,
            metrics_dir=str(context.runtime.metrics),
            metrics_id=metrics_id,
            revision=context.revision,
            quota_fd=context.quota.fd,
            column=_column(metrics_id),
            store_dir=str(context.runtime.responses),
            tls=context.tls_message(),
            visual_dir=str(context.runtime.ipc),
        )
        child.configure(self.worker.name, epoch, metrics_id, first)
        self._send_state(child)
        return child

    def children(self) -> list[Child]:
        """Its living processes: in service, on the way in, on the way out."""
        present = [self.worker.child, self.spare, *self.retiring]
        return [child for child in present if child is not None and not child.exited]

    def roll(self) -> None:
        """Starts a replacement; when that is ready it takes over and the old one retires."""
        if self.spare is not None:
            return  # it is on its way
        self.roll_failure = None
        if self.worker.child is None:
            self.worker.reset_failures()
            return
        try:
            self.spare = self._launch(self.worker.next_number())
        except SystemFailure as refused:
            self.roll_failure = refused.message

    def keep_outdated(self) -> None:
        """No process of the settings in force comes up: the one that serves goes on, and others are tried."""
        self.outdated = self._context.clock.now + self._context.config.supervisor.retry_interval

    def tick(self) -> None:
        """Starts what is due."""
        self.worker.start_if_due()
        if self.outdated is not None and self._context.clock.now >= self.outdated:
            self.keep_outdated()
            self.roll()

    def renew(self) -> None:
        """As `roll`, where that failed: its process retires first, and connections wait until policy has another up."""
        self.roll_failure = None
        if self.worker.child is not None:
            self._retire(self.worker.child, "replaced")
            self.worker.child = None
        self.worker.reset_failures()

    @property
    def rolling(self) -> bool:
        """Whether a replacement is on its way."""
        return self.spare is not None or (self.roll_failure is None and not self.worker.ready)

    def became_ready(self, child: Child) -> None:
        """`child` is in service; where it is the replacement, the old process retires."""
        if child is self.spare:
            old, self.worker.child, self.spare, self.outdated = self.worker.child, child, None, None
            if old is not None:
                self._retire(old, "replaced")
        self.worker.became_ready()

    def dismiss(self) -> None:
        """No process is wanted here any more; the one that serves finishes what it has."""
        self.worker.due = self.worker.due_at = None
        if self.spare is not None:
            self.spare.kill("not wanted any more")
        if self.worker.child is not None:
            self._retire(self.worker.child, "not wanted any more")
            self.worker.child = None

    def _retire(self, child: Child, why: str) -> None:
        child.send(Retire())
        child.retire(why)
        self.retiring.append(child)

    def died(self, child: Child, ending: Ending, again: bool) -> None:
        """`child` is dead and disposed of. `again`: this place is wanted, so policy decides what follows."""
        if child is self.spare:
            self.spare, self.roll_failure = None, ending.cause
            self._context.events.add("exit", f"replacement: {ending.cause}", self.worker.name, "warning")
        elif child in self.retiring:
            self.retiring.remove(child)
            self._context.log.own("debug", f"{self.worker.name}: epoch {child.number} retired")
        elif self.spare is not None:
            # Its replacement is on the way already.
            self.worker.died(ending, again=False)
            self.worker.child, self.spare, self.outdated = self.spare, None, None
        else:
            self.outdated = None
            self.worker.died(ending, again)
            self.worker.start_if_due()


def _column(metrics_id: str) -> int:
    """Where a worker counts in `Quota`: the number in the name of its metrics files, which no other living one has."""
    return int(metrics_id.rpartition("-")[2])


class ApiWorkers:
    """All api workers."""

    def __init__(self, context: Context, workers: int, send_state: Callable[[Child], None]) -> None:
        self._context = context
        self._send_state = send_state
        # By index, over all places of that index: an engine takes two processes of one epoch for the same one.
        self._epochs: defaultdict[int, Iterator[int]] = defaultdict(lambda: itertools.count(1))
        self.apis = [self._place(index) for index in range(workers)]
        self.dismissed: list[Api] = []  # places that there are too many of; their processes finish what they have
        self._past: Counter[str] = Counter()  # totals of the processes that are gone
        self._candidate: Replicas | None = None
        self._answers: dict[Child, Prepared] = {}  # about the candidate
        self.holding = False  # new requests wait
        self._marks: dict[int | None, dict[Child, int]] = {}  # see `_mark`

    def _place(self, index: int) -> Api:
        return Api(self._context, index, self._epochs[index], self._welcome)

    def start(self) -> None:
        """Starts all, once the plan is made."""
        for api in self.apis:
            api.worker.start()

    def resize(self, workers: int) -> None:
        """Places are opened or closed at the end."""
        while len(self.apis) < workers:
            self.apis.append(self._place(len(self.apis)))
            self.apis[-1].worker.start()
        while len(self.apis) > workers:
            self.dismissed.append(self.apis.pop())
            self.dismissed[-1].dismiss()

    def children(self) -> Iterator[Child]:
        """All living processes, retiring ones too."""
        for api in (*self.apis, *self.dismissed):
            yield from api.children()

    def owner(self, child: Child) -> Api | None:
        """The place that `child` belongs to."""
        places = (*self.apis, *self.dismissed)
        return next((api for api in places if child in (api.worker.child, api.spare, *api.retiring)), None)

    def tell(self, message: Down) -> None:
        """Sends `message` to every living process."""
        for child in self.children():
            child.send(message)

    def _welcome(self, child: Child) -> None:
        if self.holding:
            child.send(Hold())
        if self._candidate is not None:
            # Before its state, which tells of its engine: of a revision unknown to it a worker takes nothing in.
            child.send(Prepare(self._candidate.revision, self._candidate.encoded))
        self._send_state(child)

    def heard(self, child: Child) -> None:
        """Takes in what it answered."""
        rest: list[Prepared | Probed] = []
        for answer in child.said:
            if isinstance(answer, Prepared):
                if self._candidate is not None and answer.revision == self._candidate.revision:
                    self._answers[child] = answer
            else:
                rest.append(answer)
        child.said = rest

    def died(self, api: Api, child: Child, ending: Ending, again: bool) -> None:
        """`child` of `api` is dead and disposed of; its totals are kept. `again`: as for `Api.died`."""
        self._past.update({name: int(child.stats.get(name, 0)) for name in TOTALS})
        self._context.runtime.release_metrics_id(child.metrics_id)
        self._context.quota.clear(_column(child.metrics_id))
        api.died(child, ending, again and api in self.apis)
        self.dismissed = [place for place in self.dismissed if any(place.children())]

    def tick(self) -> None:
        """Starts what is due."""
        for api in self.apis:
            api.tick()

    # --- revisions -----------------------------------------------------------------------------------------------
    def prepare(self, candidate: Replicas) -> None:
        """Every api worker, those to come too, gets ready to serve it beside the revision in force."""
        self._candidate, self._answers = candidate, {}
        self.tell(Prepare(candidate.revision, candidate.encoded))

    def prepared(self, revision: int) -> bool:
        """Whether every living api worker can serve it."""
        living = [child for child in self.children() if not child.dying]
        return bool(living) and all(child in self._answers for child in living) and not self.unprepared(revision)

    def unprepared(self, revision: int) -> str:
        """Why the api workers can't serve it: one said so, or none comes up. Empty: no reason is known."""
        if error := next((answer.error for answer in self._answers.values() if answer.error), ""):
            return error
        given_up = [api.worker for api in self.apis if api.worker.fatal or api.worker.limited]
        if len(given_up) < len(self.apis) or any(self.children()):
            return ""
        return f"{given_up[0].name} is down: {given_up[0].trouble}"

    def commit(self, revision: int, old: int, carry: bool) -> None:
        """Puts `revision` in force for new requests. `carry`: those in flight on `old` move to it."""
        self._candidate, self._answers = None, {}
        self.tell(Commit(revision, carry))
        self._mark(old)

    def forget(self, revision: int, reason: str) -> None:
        """Drops a revision; requests that it still has fail for `reason`."""
        if self._candidate is not None and self._candidate.revision == revision:
            self._candidate, self._answers = None, {}
        self._marks.pop(revision, None)
        self.tell(Forget(revision, reason))

    def cut(self, revision: int, reason: str) -> None:
        """Ends the requests that it has."""
        self.tell(Cut(revision, reason))

    def hold(self) -> None:
        """New requests wait from now on, bounded in number and time."""
        self.holding = True
        self.tell(Hold())
        self._mark(self._context.revision)

    def release(self) -> None:
        """Requests that wait, and new ones, go to the revision in force."""
        if self.holding:
            self.holding = False
            self.tell(Release())

    def in_flight_of(self, revision: int) -> int:
        """Requests on this revision, by the last heartbeats."""
        return self.now(f"in_flight@{revision}")

    def none_of(self, revision: int) -> bool:
        """No api worker has a request of this revision, which takes no new ones, by heartbeats that know of that."""
        return self.in_flight_of(revision) == 0 and self._heard_since(revision)

    def _mark(self, revision: int | None) -> None:
        """What the workers said before doesn't count any more: of a revision, or (None) of all."""
        self._marks[revision] = {child: child.vitals.beats for child in self.children() if child.ready_at is not None}

    def _heard_since(self, revision: int | None) -> bool:
        marks = self._marks.get(revision, {})
        return all(child.exited or child.vitals.beats - beats >= _BEATS_TO_BELIEVE for child, beats in marks.items())

    # --- counts --------------------------------------------------------------------------------------------------
    def total(self, name: str) -> int:
        """Since the daemon's start."""
        return self._past[name] + self.now(name)

    def now(self, name: str) -> int:
        """Sum of this count over the last heartbeats of the living processes."""
        return int(sum(child.stats.get(name, 0) for child in self.children()))

    @property
    def ready(self) -> bool:
        """Whether any api worker is in service."""
        return any(api.worker.ready for api in self.apis)

    def drained_since_now(self) -> None:
        """`Drain` has just been sent: what the workers said before doesn't count any more."""
        self._mark(None)

    @property
    def idle(self) -> bool:
        """No api worker has a request in flight, by a heartbeat that followed the `Drain`."""
        if self.now("in_flight") > 0:
            return False
        return self._heard_since(None) or all(child.stats.get("draining") for child in self.children())

"""What every way from one revision to the next does: waits for requests, sleep and starts, and keeps an account."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, TypeVar

from lightllmd.config.parameters import Config
from lightllmd.errors import ControlError, RolledBack
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.api_workers import ApiWorkers
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.generation import Engine
from lightllmd.supervisor.workers.replicas import Replicas

# A job in the making: yields (phase, progress or None) for as long as it has to wait, returns what it did.
Result = TypeVar("Result")
Waiting = Generator[tuple[str, float | None], None, Result]
Steps = Waiting[str]

_CUT_AGAIN = 1.0  # seconds; a request may have passed the gate and not be in flight yet


@dataclass(frozen=True)
class Terms:
    """What the operator asks of a switch."""

    drain_timeout: float | None = None  # seconds that requests on the old model may take; None: as long as they take
    force: bool = False  # then they are ended
    keep: bool = False  # a candidate that fails stays in force, by the restart policy, instead of the old one
    after: bool = False  # the old engine is given no chance to serve beside the candidate, which gets its requests


class Handover:
    """`details` tells how it went: it is the job's. `put_in_force` is called with the configuration that is
    committed."""

    def __init__(
        self,
        context: Context,
        engines: Engines,
        front: ApiWorkers,
        terms: Terms,
        details: dict[str, Any],
        put_in_force: Callable[[Config], None],
    ) -> None:
        self.context, self.engines, self.front, self.terms = context, engines, front, terms
        self.details = details
        self.put_in_force = put_in_force
        self.phases: list[tuple[str, float]] = []
        self._entered = time.monotonic()

    def passed(self, phase: str) -> None:
        """A phase is over: the job's account of times."""
        now = time.monotonic()
        self.phases.append((phase, round(now - self._entered, 3)))
        self._entered = now

    def wait_for_requests(self, old: Replicas) -> Waiting[None]:
        """Until `old` has none left that it can finish, or the terms' deadline; under force they are ended then."""
        clock, timeout = self.context.clock, self.terms.drain_timeout
        late = None if timeout is None else clock.now + timeout
        name = old.plan.model_name if old.plan else ""
        while not (self.front.none_of(old.revision) or old.permanently_failed):
            count = self.front.in_flight_of(old.revision)
            yield f"waiting for {count} requests on {name}" if count else "draining", None
            if late is not None and clock.now >= late:
                if not self.terms.force:
                    return
                late = clock.now + _CUT_AGAIN
                self.front.cut(old.revision, "the model was replaced")

    def drain(self, old: Replicas) -> Waiting[None]:
        """As `wait_for_requests`. Raises ControlError where there are some left at the deadline."""
        yield from self.wait_for_requests(old)
        if not (self.front.none_of(old.revision) or old.permanently_failed):
            raise ControlError(
                f"{self.front.in_flight_of(old.revision)} requests were still in flight after "
                f"{self.terms.drain_timeout:g} s; with force they are ended"
            )

    def sleep(self, engines: Sequence[Engine]) -> Waiting[None]:
        """Until they sleep, or are gone. Raises ControlError."""
        for engine in engines:
            engine.sleep()
        late = self.context.clock.now + self.context.config.supervisor.load_timeout
        while awake := [engine for engine in engines if engine.child is not None and not engine.asleep]:
            if self.context.clock.now >= late:
                for engine in awake:
                    engine.end("it did not fall asleep", now=True)
                raise ControlError("the old engine did not fall asleep")
            yield "putting the old engine to sleep", None

    def bring_up(self, engines: Sequence[Engine], new: Replicas, in_force: bool = False) -> Waiting[None]:
        """Until these of the `new` ones are ready and, unless they are `in_force` already, every api worker can serve
        them. Raises ControlError as soon as one fails that is on trial."""
        for engine in engines:
            engine.worker.start()
        while not (all(engine.worker.ready for engine in engines) and (in_force or self._prepared(new))):
            self.check_trial(new)
            if not in_force and (fault := self.front.unprepared(new.revision)):
                raise ControlError(f"the HTTP front end can't serve it: {fault}")
            late = next((engine.worker for engine in engines if not engine.worker.ready), new.visual)
            if late is None or late.ready:
                late = engines[0].worker
            yield f"{name_of(engines[0])}: {describe(late)}", fraction(late)

    def _prepared(self, new: Replicas) -> bool:
        """Whether all beside its engines can serve it."""
        sees = new.plan is not None and new.plan.vision is not None
        return self.front.prepared(new.revision) and (not sees or (new.visual is not None and new.visual.ready))

    def wait_for_front_end(self, new: Replicas) -> Waiting[None]:
        """Until the api workers can serve it, or one says that it can't."""
        while not (self.front.prepared(new.revision) or self.front.unprepared(new.revision)):
            yield "preparing the HTTP front end", None

    def commit(self, new: Replicas, old: Replicas, carry: bool) -> None:
        """New requests go to `new` from now on, which is in force already; those in flight too, if `carry`."""
        assert new.plan is not None
        self.front.commit(new.revision, old.revision, carry)
        self.put_in_force(new.plan.config)
        self.context.events.add("swap", f"{new.plan.model_name} is in force (revision {new.revision})")

    def tell_failure(self, new: Replicas, cause: str) -> None:
        """What follows is the way back."""
        name = name_of(new.first)
        self.context.events.add("swap", f"{name} failed: {cause}; rolling back", level="warning")

    def come_back(self, engines: Sequence[Engine], cause: str) -> Waiting[None]:
        """Until these, which were told to wake, are up. Raises ControlError."""
        while missing := [engine for engine in engines if engine.up() is None]:
            worker = missing[0].worker
            if worker.fatal is not None or worker.limited:
                last = worker.last_exit
                raise ControlError(f"{cause}; and the old model does not come back: {last.cause if last else ''}")
            yield f"rolling back: {describe(worker)}", fraction(worker)

    def rolled_back(self, old: Replicas, cause: str) -> NoReturn:
        """All is as before. Raises RolledBack."""
        self.passed("roll back")
        self.details["phases"] = self.phases
        name = old.plan.model_name if old.plan else "the old model"
        raise RolledBack(f"{cause}; {name} serves on", cause=cause)

    def check_trial(self, new: Replicas) -> None:
        """Raises ControlError if one that was started and is on trial has died."""
        for engine in new.engines:
            if engine.on_trial and engine.worker.starts and engine.child is None:
                last = engine.worker.last_exit
                raise ControlError(last.cause if last else "the candidate did not start")
        visual = new.visual
        if visual is not None and visual.starts and visual.down and any(engine.on_trial for engine in new.engines):
            raise ControlError(f"its visual worker failed: {visual.trouble}")


def name_of(engine: Engine) -> str:
    """Of an engine's model, for people."""
    return engine.plan.model_name if engine.plan else engine.worker.name


def fraction(worker: Worker) -> float | None:
    """How far a loading worker has come, 0..1."""
    vitals = worker.child.vitals if worker.child else None
    if vitals is None or vitals.phase != "load" or not vitals.total:
        return None
    return min(vitals.progress / vitals.total, 1.0)


def describe(worker: Worker) -> str:
    """Where a worker's start has got to, for people."""
    if worker.child is None:
        return "down" if worker.due is None else "waiting for the next try"
    vitals = worker.child.vitals
    if vitals.phase == "load":
        if vitals.total:
            done = f"{vitals.progress / 1e9:.1f}/{vitals.total / 1e9:.1f} GB"
            return f"Loading weights {vitals.progress / vitals.total:.0%} ({done})"
        return "Loading weights"
    words = {"boot": "Starting", "warmup": "Warming up", "ready": "Ready", "asleep": "Asleep"}
    return words.get(vitals.phase, vitals.phase)

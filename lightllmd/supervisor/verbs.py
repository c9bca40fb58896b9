"""The mutations: restart, drain, resume and stop, each as a job that the single-writer loop steps."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass

from lightllmd.errors import Busy, ControlError, LightllmdError, NoSuchWorker, StaleGeneration, TryAgain
from lightllmd.ipc.messages import Drain, Resume
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.frontend import Api, FrontEnd
from lightllmd.supervisor.generation import Engine
from lightllmd.supervisor.jobs import Jobs, RunningJob
from lightllmd.supervisor.worker import Worker

# A job in the making: yields (phase, progress or None) for as long as it has to wait, returns what it did.
Steps = Generator[tuple[str, float | None], None, str]


@dataclass(frozen=True)
class Asked:
    """Who asks for a mutation, and on which premise."""

    uid: int | None = None  # None: the daemon itself, because of a signal
    pid: int | None = None
    if_match: int | None = None  # the engine generation that the asker saw


class Verbs:
    """What gates a mutation is decided here, inside the loop: at most one of them runs, and a stop overrides all."""

    def __init__(self, context: Context, engine: Engine, front: FrontEnd) -> None:
        self._context, self._engine, self._front = context, engine, front
        self.jobs = Jobs()
        self._steps: dict[int, Steps] = {}  # by job number
        self.draining = False  # new requests are refused; also while stopping
        self.drained = False  # ... and none is left
        self.stopping: RunningJob | None = None
        self.ending = False  # the drain of a stop is over: the workers are to end now
        self._stop_now = False

    # --- verbs ---------------------------------------------------------------------------------------------------
    def restart(self, asked: Asked, target: str = "") -> RunningJob:
        self._gate(asked)
        if not self._context.plan:
            raise TryAgain("the plan is not made yet: nothing has been started")
        engine, apis = self._targets(target)
        return self._open("restart", asked, self._restart(engine, apis), target)

    def drain(self, asked: Asked) -> RunningJob:
        self._gate(asked)
        return self._open("drain", asked, self._drain())

    def resume(self, asked: Asked) -> RunningJob:
        self._gate(asked, overrides=("drain",))
        for job in self.jobs.running("drain"):
            self._cancel(job, "resumed")
        return self._open("resume", asked, self._resume())

    def stop(self, asked: Asked, now: bool = False) -> RunningJob:
        """A second stop changes the first: `now` ends its drain."""
        self._check_premise(asked)
        self._stop_now = self._stop_now or now
        if self.stopping is None:
            for job in self.jobs.running():
                self._cancel(job, "the daemon stops")
            self.stopping = self._open("stop", asked, self._stop())
        return self.stopping

    def step(self) -> None:
        """After every event: each running job goes on as far as it can."""
        for number in list(self._steps):
            if number in self._steps:
                self._step(self.jobs.get(number))

    # --- what they do ------------------------------------------------------------------------------------------
    def _restart(self, engine: bool, apis: list[Api]) -> Steps:
        done = []
        if engine:
            number = self._engine.restart()
            worker = self._engine.worker
            while worker.number < number:
                yield f"ending generation {worker.number}", None
            while not worker.ready:
                self._fail_if_given_up(worker)
                yield f"starting generation {worker.number}: {describe(worker)}", fraction(worker)
            done.append(f"generation {worker.number} is ready")
        for api in apis:
            api.roll()
            while api.rolling:
                self._fail_if_given_up(api.worker)
                yield f"replacing {api.worker.name}", None
            if api.roll_failure:
                raise ControlError(
                    f"the replacement of {api.worker.name} failed, the old one goes on: {api.roll_failure}"
                )
            done.append(f"{api.worker.name} was replaced")
        return "; ".join(done)

    def _drain(self) -> Steps:
        self._refuse_requests()
        while not self._front.idle:
            yield f"draining ({self._front.now('in_flight')} in flight)", None
        self.drained = True
        return "no request is in flight; new ones are refused until resume"

    def _resume(self) -> Steps:
        self.draining = self.drained = False
        self._front.tell(Resume())
        return "new requests are accepted"
        yield  # makes this a generator like the others

    def _stop(self) -> Steps:
        deadline = self._context.clock.now + self._context.config.supervisor.drain_timeout
        self._refuse_requests()
        while not (self._stop_now or self._front.idle or self._context.clock.now >= deadline):
            yield f"draining ({self._front.now('in_flight')} in flight)", None
        self.ending = True
        for child in self._front.children():
            child.stop("stopped")
        if self._engine.generation is not None:
            self._engine.generation.child.stop("stopped")
        self._engine.spare.end("stopped")
        while True:
            yield "ending the workers", None

    def _refuse_requests(self) -> None:
        self.draining = True
        self._front.tell(Drain())
        self._front.drained_since_now()

    # --- bookkeeping ---------------------------------------------------------------------------------------------
    def _open(self, verb: str, asked: Asked, steps: Steps, target: str = "") -> RunningJob:
        job = self.jobs.open(verb, target, asked.uid, asked.pid)
        by = "" if asked.uid is None else f" by uid {asked.uid}, pid {asked.pid}"
        self._context.events.add("job", f"job {job.snapshot.id}: {verb}{' ' + target if target else ''} asked{by}")
        self._steps[job.snapshot.id] = steps
        self._step(job)
        return job

    def _step(self, job: RunningJob) -> None:
        steps = self._steps[job.snapshot.id]
        try:
            job.advance(*next(steps))
        except StopIteration as end:
            self._finish(job, "done", str(end.value))
        except LightllmdError as failure:
            self._finish(job, "failed", failure.message)

    def _cancel(self, job: RunningJob, why: str) -> None:
        self._steps[job.snapshot.id].close()
        self._finish(job, "cancelled", why)

    def _finish(self, job: RunningJob, outcome: str, message: str) -> None:
        del self._steps[job.snapshot.id]
        job.finish(outcome, message)
        level = "info" if outcome != "failed" else "error"
        text = f"job {job.snapshot.id}: {job.snapshot.verb} {outcome}: {message}"
        self._context.events.add("job", text, level=level)

    def _gate(self, asked: Asked, overrides: tuple[str, ...] = ()) -> None:
        self._check_premise(asked)
        for job in self.jobs.running():
            if job.snapshot.verb not in overrides:
                number, verb = job.snapshot.id, job.snapshot.verb
                raise Busy(f"job {number} ({verb}: {job.snapshot.phase}) is not finished", job=number)

    def _check_premise(self, asked: Asked) -> None:
        number = self._engine.worker.number
        if asked.if_match is not None and asked.if_match != number:
            raise StaleGeneration(f"generation {number} is in force, not {asked.if_match}", generation=number)

    def _targets(self, target: str) -> tuple[bool, list[Api]]:
        apis = self._front.apis
        if target == "":
            return True, apis
        if target in ("engine", self._engine.worker.name):
            return True, []
        chosen = [api for api in apis if target in ("api", api.worker.name)]
        if chosen:
            return False, chosen
        names = [self._engine.worker.name, *(api.worker.name for api in apis)]
        raise NoSuchWorker(f"no worker {target!r}: there are {', '.join(names)}", worker=target, candidates=names)

    @staticmethod
    def _fail_if_given_up(worker: Worker) -> None:
        if worker.fatal is not None or worker.limited:
            raise ControlError(f"{worker.name} does not come up: {worker.last_exit.cause if worker.last_exit else ''}")


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
    return {"boot": "Starting", "warmup": "Warming up", "ready": "Ready"}.get(vitals.phase, vitals.phase)

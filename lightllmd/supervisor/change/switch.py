"""From the revision in force to the next one, for a swap or a reload: planned, prepared, proven, then committed; or
rolled back, with the old one serving on.

*Beside*: the candidate starts next to the old engine, which serves until the commit and then finishes what it has.
*After*: new requests wait, the old engine finishes what it has and sleeps, its weights in host memory; then the
candidate starts. It is woken if the candidate fails.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Coroutine, Generator
from dataclasses import dataclass
from typing import Any, TypeVar

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Facts, Plan
from lightllmd.config.report import report
from lightllmd.errors import ControlError, DoesNotFit, LightllmdError, RolledBack
from lightllmd.supervisor.background import BackgroundTask
from lightllmd.supervisor.change import planning
from lightllmd.supervisor.change.placement import Placement
from lightllmd.supervisor.children.read_ahead import ReadAheadChild
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.api_workers import ApiWorkers
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.generation import Engine

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


def await_background(context: Context, work: Coroutine[Any, Any, Result], phase: str) -> Waiting[Result]:
    """Waits for work beside the loop; raises what it raises."""
    task = BackgroundTask(context, work)
    try:
        while not task.done:
            yield phase, None
        return task.result()
    finally:
        task.cancel()


class Switch:
    """`details` tells how it went: it is the job's. `in_force` is called with the configuration that is committed."""

    def __init__(
        self,
        context: Context,
        engines: Engines,
        front: ApiWorkers,
        config: Config,
        config_file: str | None,
        terms: Terms,
        details: dict[str, Any],
        in_force: Callable[[Config], None],
    ) -> None:
        self._context, self._engines, self._front = context, engines, front
        self._config, self._config_file, self._terms = config, config_file, terms
        self.details = details
        self._in_force = in_force
        self._carry = False  # what is in flight moves to the candidate
        self._placement = Placement(engines, config, config_file)
        self._reading: BackgroundTask[None] | None = None
        self._slept = False  # the old engine was told to
        self._phases: list[tuple[str, float]] = []
        self._entered = time.monotonic()

    # --- the way ---------------------------------------------------------------------------------------------------
    def plan(self) -> Waiting[tuple[Plan, Facts]]:
        """Raises ConfigInvalid, DoesNotFit; nothing has been touched then."""
        made = yield from self._planned()
        self.details |= {"how": "beside" if self._placement.beside else "after", "plan": report(made[0])}
        self._passed("plan")
        return made

    def _planned(self) -> Waiting[tuple[Plan, Facts]]:
        """From facts under which no engine changed. If the model needs the old engine's memory, engines that are
        starting or dying are waited for, since what they hold, and give back, is known then; for one start at most."""
        waited = False
        while True:
            facts = yield from self._read_facts()
            unsettled = [] if waited else self._engines.unsettled
            try:
                made = self._placement.decide(facts)
            except DoesNotFit:
                if not unsettled:
                    raise
            else:
                if self._placement.beside or not unsettled:
                    return made
            waited = not all(child.dying for child in unsettled)
            while left := [child for child in unsettled if child in self._engines.unsettled]:
                yield f"waiting until {left[0].worker} is up or down", None

    def _read_facts(self) -> Waiting[Facts]:
        """Read again if an engine started, became ready or ended meanwhile: what was free then says nothing now."""
        while True:
            before = self._engines.holders
            facts = yield from await_background(
                self._context,
                planning.facts_of(self._context, self._config, self._config_file),
                "reading the model's headers",
            )
            if self._engines.holders == before:
                return facts

    def steps(self) -> Steps:
        """The whole switch. Raises ConfigInvalid and DoesNotFit with nothing touched, RolledBack with the old revision
        serving as before, ControlError where it can't."""
        old = self._engines.serving
        early = self._stage_early(old)
        try:
            plan, facts = yield from self.plan()
        except BaseException:
            if early:
                old.unstage()
            raise
        if early and self._placement.beside:
            old.unstage()
        self._carry = not self._placement.beside and goes_on(old.plan, plan)
        candidate = self._engines.propose(plan, facts)
        try:
            yield from self._prove(candidate, old)
        except LightllmdError:
            raise  # and all is as it was
        except BaseException:  # cancelled, or a fault of ours
            self._undo(candidate, "given up")
            self._front.release()
            raise
        finally:
            if self._reading is not None:
                self._reading.cancel()
        self._commit(plan)
        yield from self._wait_for_old(old)
        self.details["phases"] = self._phases
        taken = sum(seconds for _, seconds in self._phases)
        return f"{plan.model_name} is in force, {self.details['how']} the old one, after {taken:.1f} s"

    def _stage_early(self, old: Engine) -> bool:
        """While the plan is made: an engine that took what its GPU had is all but sure to have to sleep."""
        if old.plan is None or old.plan.device.kind != "cuda" or self._config.supervisor.swap == "beside":
            return False
        if old.plan.config.params.max_total_token_num != "auto":
            return False
        old.stage()
        return True

    def _prove(self, candidate: Engine, old: Engine) -> Waiting[None]:
        """Until the candidate can be committed. Raises RolledBack, or ControlError if that failed too."""
        try:
            if not self._placement.beside:
                yield from self._make_room(old, candidate)
            self._front.prepare(candidate)
        except LightllmdError as failure:
            yield from self._roll_back(candidate, failure)
        try:
            yield from self._bring_up(candidate)
        except LightllmdError as failure:
            if self._terms.keep:
                yield from self._wait_for_front_end(candidate)
            if not self._terms.keep or self._front.unprepared(candidate.revision):
                yield from self._roll_back(candidate, failure)
            self.details["kept"] = failure.message

    def _make_room(self, old: Engine, candidate: Engine) -> Waiting[None]:
        old.stage()
        if candidate.plan is not None and candidate.plan.model is not None:
            self._reading = BackgroundTask(self._context, ReadAheadChild(self._context).run(candidate.plan.model.files))
        self._front.hold()
        if not self._carry:
            yield from self._wait_for_requests(old)
            if not (self._front.none_of(old.revision) or old.permanently_failed):
                raise ControlError(
                    f"{self._front.in_flight_of(old.revision)} requests were still in flight after "
                    f"{self._terms.drain_timeout:g} s; with force they are ended"
                )
        self._passed("drain")
        self._slept = True
        old.sleep()
        late = self._context.clock.now + self._context.config.supervisor.load_timeout
        while old.child is not None and not old.asleep:
            if self._context.clock.now >= late:
                old.child.kill("it did not fall asleep")
                raise ControlError("the old engine did not fall asleep")
            yield "putting the old engine to sleep", None
        self._passed("sleep")

    def _wait_for_requests(self, old: Engine) -> Waiting[None]:
        """Until `old` has none left that it can finish, or the terms' deadline; under force they are ended then."""
        clock, timeout = self._context.clock, self._terms.drain_timeout
        late = None if timeout is None else clock.now + timeout
        name = old.plan.model_name if old.plan else ""
        while not (self._front.none_of(old.revision) or old.permanently_failed):
            count = self._front.in_flight_of(old.revision)
            yield f"waiting for {count} requests on {name}" if count else "draining", None
            if late is not None and clock.now >= late:
                if not self._terms.force:
                    return
                late = clock.now + _CUT_AGAIN
                self._front.cut(old.revision, "the model was replaced")

    def _bring_up(self, candidate: Engine) -> Waiting[None]:
        candidate.worker.start()
        while not (candidate.worker.ready and self._front.prepared(candidate.revision)):
            if candidate.child is None:
                last = candidate.worker.last_exit
                raise ControlError(last.cause if last else "the candidate did not start")
            if fault := self._front.unprepared(candidate.revision):
                raise ControlError(f"the HTTP front end can't serve it: {fault}")
            yield f"{self._name(candidate)}: {describe(candidate.worker)}", fraction(candidate.worker)
        self._passed("start")

    def _wait_for_front_end(self, candidate: Engine) -> Waiting[None]:
        while not (self._front.prepared(candidate.revision) or self._front.unprepared(candidate.revision)):
            yield "preparing the HTTP front end", None

    def _commit(self, plan: Plan) -> None:
        old = self._engines.commit()
        if self._engines.serving.child is None:
            self._engines.serving.worker.reset_failures()
        self._front.commit(self._engines.serving.revision, old.revision, self._carry)
        self._front.release()
        self._in_force(plan.config)
        self._context.events.add("swap", f"{plan.model_name} is in force (revision {self._engines.serving.revision})")
        for warning in plan.warnings:
            self._context.events.add("warning", warning, level="warning")
        if not self._placement.beside:
            old.end("replaced", now=True)
            self._front.forget(old.revision, "the model was replaced")

    def _wait_for_old(self, old: Engine) -> Waiting[None]:
        """Beside: until the old engine has finished and ended, or the terms' deadline; it goes on without us then."""
        if self._placement.beside:
            yield from self._wait_for_requests(old)
        while old in self._engines.leaving and (not self._placement.beside or self._front.none_of(old.revision)):
            yield "ending the old engine", None
        self._passed("retire")

    def _roll_back(self, candidate: Engine, failure: LightllmdError) -> Waiting[None]:
        """Raises RolledBack once the old revision serves as before; ControlError if it can't."""
        cause, old = failure.message, self._engines.serving
        self._context.events.add("swap", f"{self._name(candidate)} failed: {cause}; rolling back", level="warning")
        self._undo(candidate, "rolled back")
        while self._slept and old.up() is None:
            if old.worker.fatal is not None or old.worker.limited:
                self._front.release()
                last = old.worker.last_exit
                raise ControlError(f"{cause}; and the old model does not come back: {last.cause if last else ''}")
            yield f"rolling back: {describe(old.worker)}", fraction(old.worker)
        self._front.release()
        self._passed("roll back")
        self.details["phases"] = self._phases
        name = old.plan.model_name if old.plan else "the old model"
        raise RolledBack(f"{cause}; {name} serves on", cause=cause)

    def _undo(self, candidate: Engine, why: str) -> None:
        """All but the release of held requests; the old engine is on its way back then."""
        self._engines.drop_candidate(why)
        self._front.forget(candidate.revision, why)
        if not self._placement.beside:
            self._engines.serving.wake(after=candidate)

    def _name(self, engine: Engine) -> str:
        return engine.plan.model_name if engine.plan else engine.worker.name

    def _passed(self, phase: str) -> None:
        now = time.monotonic()
        self._phases.append((phase, round(now - self._entered, 3)))
        self._entered = now


def goes_on(old: Plan | None, new: Plan) -> bool:
    """Whether requests of the old plan can be replayed on the new one: the same model, and none is too long or has too
    many branches. How many slots there are doesn't matter: each holds the longest request, and the rest waits."""
    if old is None:
        return False
    before, now = old.config.params, new.config.params
    if before.beam_mode and old.max_total_token_num > new.max_total_token_num:
        return False  # the beams of a request need slots together
    return (
        _identity(old) == _identity(new)
        and before.max_req_total_len <= now.max_req_total_len
        and before.running_max_req_size <= now.running_max_req_size
    )


def _identity(plan: Plan) -> tuple[Any, ...]:
    """What makes tokens, or scores, mean the same."""
    model = plan.model
    where = (model.path, *(stamp.content for stamp in model.stamps)) if model else plan.config.params.model_dir
    return (
        where,
        plan.eos_id,
        plan.vocab_size,
        plan.tokenizer_mode,
        plan.config.params.beam_mode,
        plan.scoring,
        plan.schemes,
        plan.kv_scheme,
    )


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

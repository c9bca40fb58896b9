"""From the revision in force to the next one, for a swap or a reload: planned, prepared, proven, then committed; or
rolled back, with the old one serving on.

*Beside*: the candidate starts next to the old engines, which serve until the commit and then finish what they have.
*After*: new requests wait, the old engine finishes what it has and sleeps, its weights in host memory; then the
candidate starts. It is woken if the candidate fails. Where several engines serve this goes one by one, and no request
waits: see `rolling`.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from lightllmd.config.parameters import Config
from lightllmd.config.plan import Facts, Plan
from lightllmd.config.report import report
from lightllmd.errors import DoesNotFit, LightllmdError
from lightllmd.supervisor.background import BackgroundTask
from lightllmd.supervisor.change import planning
from lightllmd.supervisor.change.carrying import goes_on
from lightllmd.supervisor.change.handover import Handover, Result, Steps, Terms, Waiting
from lightllmd.supervisor.change.placement import Placement
from lightllmd.supervisor.change.rolling import Roll
from lightllmd.supervisor.children.read_ahead import ReadAheadChild
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.workers.api_workers import ApiWorkers
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.replicas import Replicas


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
        self._config, self._config_file = config, config_file
        self._hand = Handover(context, engines, front, terms, details, in_force)
        self.details = details
        self._carry = False  # what is in flight moves to the candidate
        self._placement = Placement(engines, config, config_file, terms.after)
        self._reading: BackgroundTask[None] | None = None
        self._slept = False  # the old engine was told to

    # --- the way ---------------------------------------------------------------------------------------------------
    def plan(self) -> Waiting[tuple[Plan, Facts]]:
        """Raises ConfigInvalid, DoesNotFit; nothing has been touched then."""
        made = yield from self._planned()
        self.details |= {"how": "beside" if self._placement.beside else "after", "plan": report(made[0])}
        if self._rolls:
            order = Roll.order(self._engines.serving, made[0])
            self.details["order"] = order
            self.details["plan"] += "".join(
                ["\nwhile the others serve, one after the other:", *(f"\n  {one}" for one in order)]
            )
        self._hand.passed("plan")
        return made

    @property
    def _rolls(self) -> bool:
        """Whether engines are replaced one by one."""
        return not self._placement.beside and len(self._engines.serving.engines) > 1

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
            waited = not all(generation.ending for generation in unsettled)
            while left := [generation for generation in unsettled if generation in self._engines.unsettled]:
                yield f"waiting until {left[0].leader.worker} is up or down", None

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
            if self._rolls:
                self._read_ahead(plan)
                yield from Roll(self._hand, old, candidate, self._carry).steps()
                return self._done(plan)
            yield from self._prove(candidate, old)
        except LightllmdError:
            raise  # and all is as it was
        except BaseException:  # cancelled, or a fault of ours
            if self._engines.candidate is candidate:
                self._undo(candidate, "given up")
                self._front.release()
            raise
        finally:
            if self._reading is not None:
                self._reading.cancel()
        self._commit(plan)
        yield from self._wait_for_old(old)
        return self._done(plan)

    def _done(self, plan: Plan) -> str:
        self.details["phases"] = self._hand.phases
        taken = sum(seconds for _, seconds in self._hand.phases)
        return f"{plan.model_name} is in force, {self.details['how']} the old one, after {taken:.1f} s"

    def _stage_early(self, old: Replicas) -> bool:
        """While the plan is made: an engine that took what its GPU had is all but sure to have to sleep."""
        if old.plan is None or old.plan.device.kind != "cuda" or self._config.supervisor.swap == "beside":
            return False
        if old.plan.config.params.max_total_token_num != "auto":
            return False
        old.stage()
        return True

    def _prove(self, candidate: Replicas, old: Replicas) -> Waiting[None]:
        """Until the candidate can be committed. Raises RolledBack, or ControlError if that failed too."""
        hand = self._hand
        try:
            if not self._placement.beside:
                yield from self._make_room(old, candidate)
            self._front.prepare(candidate)
        except LightllmdError as failure:
            yield from self._roll_back(candidate, failure)
        try:
            yield from hand.bring_up(candidate.engines, candidate)
            hand.passed("start")
        except LightllmdError as failure:
            if hand.terms.keep:
                yield from hand.wait_for_front_end(candidate)
            if not hand.terms.keep or self._front.unprepared(candidate.revision):
                yield from self._roll_back(candidate, failure)
            self.details["kept"] = failure.message

    def _make_room(self, old: Replicas, candidate: Replicas) -> Waiting[None]:
        old.stage()
        assert candidate.plan is not None
        self._read_ahead(candidate.plan)
        self._front.hold()
        if not self._carry:
            yield from self._hand.drain(old)
        self._hand.passed("drain")
        self._slept = True
        yield from self._hand.sleep(old.engines)
        self._hand.passed("sleep")

    def _read_ahead(self, plan: Plan) -> None:
        """The candidate's files are read while the old engine still has the device."""
        if plan.model is not None:
            self._reading = BackgroundTask(self._context, ReadAheadChild(self._context).run(plan.model.files))

    def _commit(self, plan: Plan) -> None:
        old = self._engines.commit()
        for engine in self._engines.serving.engines:
            if engine.child is None:
                engine.worker.reset_failures()
        self._hand.commit(self._engines.serving, old, self._carry)
        self._front.release()
        for warning in plan.warnings:
            self._context.events.add("warning", warning, level="warning")
        if not self._placement.beside:
            old.end("replaced", now=True)
            self._front.forget(old.revision, "the model was replaced")

    def _wait_for_old(self, old: Replicas) -> Waiting[None]:
        """Beside: until the old engine has finished and ended, or the terms' deadline; it goes on without us then."""
        if self._placement.beside:
            yield from self._hand.wait_for_requests(old)
        while old in self._engines.leaving and (not self._placement.beside or self._front.none_of(old.revision)):
            yield "ending the old engine", None
        self._hand.passed("retire")

    def _roll_back(self, candidate: Replicas, failure: LightllmdError) -> Waiting[None]:
        """Raises RolledBack once the old revision serves as before; ControlError if it can't."""
        cause, old = failure.message, self._engines.serving
        self._hand.tell_failure(candidate, cause)
        self._undo(candidate, "rolled back")
        if self._slept:
            try:
                yield from self._hand.come_back(old.engines, cause)
            except LightllmdError:
                self._front.release()
                raise
        self._front.release()
        self._hand.rolled_back(old, cause)

    def _undo(self, candidate: Replicas, why: str) -> None:
        """All but the release of held requests; the old engine is on its way back then."""
        self._engines.drop_candidate(why)
        self._front.forget(candidate.revision, why)
        if not self._placement.beside:
            self._engines.serving.wake(after=candidate)

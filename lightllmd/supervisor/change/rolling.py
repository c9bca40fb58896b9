"""From one revision to the next where several engines serve and both don't fit: one place after the other, so that no
request waits and never fewer than half of the engines (rounded down) answer new ones.

Before the commit: an old engine sleeps, what it had in flight moves to the other old ones, and the new engine in its
place comes up. At the commit half of the new ones are up, and take the new requests; the old ones that are left finish
what is in flight, and give way one by one, too. The engines that were replaced sleep until all is done. If any new one
fails, before the commit or after it, the same way is gone backwards: the old ones wake, new requests go to them again,
the new ones finish what they have and end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightllmd.config.plan import Plan
from lightllmd.errors import LightllmdError
from lightllmd.supervisor.change.carrying import goes_on
from lightllmd.supervisor.change.handover import Handover, Waiting
from lightllmd.supervisor.workers.generation import Engine
from lightllmd.supervisor.workers.replicas import Replicas


class Roll:
    """`carry`: requests in flight go on with the new engines at the commit, since they serve the same model."""

    def __init__(self, hand: Handover, old: Replicas, new: Replicas, carry: bool) -> None:
        assert old.plan is not None
        assert new.plan is not None
        self._hand, self._old, self._new, self._carry = hand, old, new, carry
        self._old_plan, self._new_plan = old.plan, new.plan
        self._committed = False

    @staticmethod
    def order(old: Replicas, plan: Plan) -> list[str]:
        """What a roll to `plan` does, in words, one place a line."""
        assert old.plan is not None
        lines = []
        for count, place in enumerate(places(old, plan), 1):
            names = ", ".join(engine.worker.name for engine in in_the_way(old, plan, place))
            lines.append(f"{names or 'no engine'} gives way to engine-{place} of the new model")
            if count == half(plan.replicas):
                lines.append("new requests go to the new model")
        return lines

    # --- forwards --------------------------------------------------------------------------------------------------
    def steps(self) -> Waiting[None]:
        """Raises RolledBack, or ControlError where the way back failed, too."""
        hand, old, new = self._hand, self._old, self._new
        old.stage()
        try:
            hand.front.prepare(new)
            for count, place in enumerate(places(old, self._new_plan), 1):
                yield from self._make_room(place)
                yield from self._start(new.engines[place])
                hand.passed(f"place {place}")
                if count >= half(self._new_plan.replicas) and not self._committed:
                    self._commit()
            yield from self._drained()
        except LightllmdError as failure:
            hand.tell_failure(new, failure.message)
            yield from self._go_back(failure.message)
        except BaseException:  # cancelled, or a fault of ours
            if self._committed:
                self._leave_as_it_is()
            raise
        hand.engines.dismiss_candidate()
        old.end("replaced", now=True)
        hand.front.forget(old.revision, "the model was replaced")
        while old in hand.engines.leaving:
            yield "ending the old engines", None
        hand.passed("retire")

    def _make_room(self, place: int) -> Waiting[None]:
        way = [engine for engine in in_the_way(self._old, self._new_plan, place) if engine.wanted]
        if not way:
            return
        if not self._committed:
            yield from self._wait_for_others(way)
        if not self._others_up(way):
            if not self._committed and self._new.up:
                self._commit()
            elif not self._committed:  # as a single engine gives way
                self._hand.front.hold()
            if not self._carry:
                yield from self._hand.drain(self._old)
        yield from self._hand.sleep(way)

    def _others_up(self, way: Sequence[Engine]) -> bool:
        return any(engine not in way for engine in self._old.up)

    def _wait_for_others(self, way: Sequence[Engine]) -> Waiting[None]:
        """Until another old engine serves, if one is on its way up."""
        late = self._hand.context.clock.now + self._hand.context.config.supervisor.load_timeout
        while not self._others_up(way) and self._hand.context.clock.now < late:
            coming = [engine for engine in self._old.engines if engine not in way and engine.restarts]
            if not coming or all(engine.worker.limited for engine in coming):
                return
            yield f"waiting until {coming[0].worker.name} serves", None

    def _start(self, engine: Engine) -> Waiting[None]:
        """Raises ControlError unless it may stay in force, failed."""
        hand = self._hand
        try:
            yield from hand.bring_up([engine], self._new, in_force=self._committed)
        except LightllmdError as failure:
            if not hand.terms.keep:
                raise
            if not self._committed:
                yield from hand.wait_for_front_end(self._new)
                if hand.front.unprepared(self._new.revision):
                    raise
            hand.details["kept"] = failure.message
            engine.on_trial = False
            if engine.child is None:
                engine.worker.reset_failures()
            return
        if self._committed:
            engine.on_trial = False

    def _commit(self) -> None:
        hand = self._hand
        hand.engines.exchange()
        hand.commit(self._new, self._old, self._carry)
        hand.front.prepare(self._old)  # it may come back: api workers that start now get ready for it, too
        hand.front.release()
        for warning in self._new_plan.warnings:
            hand.context.events.add("warning", warning, level="warning")
        self._committed = True
        hand.passed("commit")

    def _drained(self) -> Waiting[None]:
        """Old engines that no new one replaced finish what they have."""
        if not self._committed:
            self._commit()
        if not self._carry:
            yield from self._hand.drain(self._old)

    # --- backwards -------------------------------------------------------------------------------------------------
    def _go_back(self, cause: str) -> Waiting[None]:
        """Raises RolledBack once all old engines serve as before; ControlError if one can't."""
        hand, old, new = self._hand, self._old, self._new
        try:
            if self._committed:
                yield from self._commit_back(cause)
            hand.engines.drop_candidate("rolled back")
            hand.front.forget(new.revision, "rolled back")
            slept = [engine for engine in old.engines if not engine.wanted]
            while any(engine.generation is not None for engine in new.engines):
                yield "ending the new engines", None
            for engine in old.engines:
                engine.wake(after=new.engines[0])
            yield from hand.come_back(slept, cause)
        finally:
            hand.front.release()
        hand.rolled_back(old, cause)

    def _commit_back(self, cause: str) -> Waiting[None]:
        """New requests go to old engines again; the new ones have finished what they had."""
        hand, old, new = self._hand, self._old, self._new
        for engine in new.engines:
            if not engine.ready:
                engine.end("rolled back", now=True)
        waking = []
        for place, engine in enumerate(new.engines):
            if engine.ready:
                continue
            while engine.generation is not None:
                yield "ending the new engine that failed", None
            for sleeper in in_the_way(old, self._new_plan, place):
                if not any(other.ready for other in self._over(sleeper)):
                    sleeper.wake(after=engine)
                    waking.append(sleeper)
        if not old.up:
            yield from hand.come_back(waking[:1] or old.engines, cause)
        while not hand.front.prepared(old.revision):
            yield "preparing the HTTP front end", None
        hand.engines.exchange()
        back = goes_on(self._new_plan, self._old_plan)
        hand.commit(old, new, back)
        if not back:
            while not (hand.front.none_of(new.revision) or new.permanently_failed):
                yield f"waiting for {hand.front.in_flight_of(new.revision)} requests on the new model", None

    def _over(self, sleeper: Engine) -> Iterator[Engine]:
        """The new engines that took its place."""
        for place, engine in enumerate(self._new.engines):
            if sleeper in in_the_way(self._old, self._new_plan, place):
                yield engine

    def _leave_as_it_is(self) -> None:
        """The new model is in force: what of it isn't up follows by the restart policy."""
        self._hand.engines.dismiss_candidate()
        for engine in self._new.engines:
            engine.on_trial = False
            if engine.child is None:
                engine.worker.reset_failures()


def half(replicas: int) -> int:
    """How many new engines are up at the commit."""
    return (replicas + 1) // 2


def places(old: Replicas, plan: Plan) -> list[int]:
    """The places of the new engines in the order in which they are taken: first those where no old engine serves now,
    last those where there never was one."""

    def rank(place: int) -> tuple[int, int]:
        way = in_the_way(old, plan, place)
        return (2 if not way else int(any(engine.ready for engine in way)), place)

    return sorted(range(plan.replicas), key=rank)


def in_the_way(old: Replicas, plan: Plan, place: int) -> list[Engine]:
    """The old engines on the devices of the new engine `place`; on a CPU the one of the same number."""
    before = old.plan
    if before is None or not (before.devices and plan.devices):
        return old.engines[place : place + 1]
    wanted = set(plan.devices[place * plan.ranks : (place + 1) * plan.ranks])
    return [
        engine
        for engine in old.engines
        if wanted & set(before.devices[engine.replica * before.ranks : (engine.replica + 1) * before.ranks])
    ]

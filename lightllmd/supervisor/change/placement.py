"""Where a candidate starts: beside the old engine or after it, by what its plan needs and what is free."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import msgspec

from lightllmd.config import resolve
from lightllmd.config.parameters import Config
from lightllmd.config.plan import Device, Facts, Plan
from lightllmd.errors import ConfigInvalid, DoesNotFit
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.replicas import Replicas

Bytes = Mapping[int, int]  # by the number of a GPU; 0 is a CPU


class Placement:
    """Of one candidate with this configuration."""

    def __init__(self, engines: Engines, config: Config, config_file: str | None, after: bool = False) -> None:
        """`after`: never beside."""
        self._engines = engines
        self._how = "after" if after else config.supervisor.swap
        self._config, self._config_file = config, config_file
        self.beside = True  # as last decided

    def decide(self, facts: Facts) -> tuple[Plan, Facts]:
        """The plan, and the facts that it was made from: beside where that costs no KV slots (or is asked for), else
        after. Raises ConfigInvalid, DoesNotFit."""
        how, old = self._how, self._engines.serving
        facts = _with_more(facts, self._held_by_spare(facts))
        for replicas in self._engines.leaving:
            facts = _with_less(facts, self._yet_to_be_taken(replicas, facts))
        alone = _with_more(facts, _given_back(old, facts))
        facts = _with_less(facts, self._yet_to_be_taken(old, facts))
        if how == "beside" and facts.others:
            undivided = self._undivided(alone)
            beside = self._try(undivided)
            if isinstance(beside, Plan) and _fits(beside, facts):
                self.beside = True
                return beside, undivided
            how = "after"
        beside = self._try(facts)
        after = self._try(alone)
        if isinstance(after, ConfigInvalid):
            if after.short_of is None:
                raise after
            needed, free = after.short_of
            raise DoesNotFit(after.message, needed=needed, free=free)
        if isinstance(beside, Plan) and how != "after":
            self.beside = how == "beside" or beside.max_total_token_num >= after.max_total_token_num
            if self.beside:
                return beside, facts
        self.beside = False
        return after, alone

    def _undivided(self, alone: Facts) -> Facts:
        """As if the old engine had never been, so that a model has the same slots after any swaps."""
        before = self._engines.serving.facts
        if before is None or before.device.kind != alone.device.kind:
            return alone
        had = {device.index: device.memory_free for device in before.device.usable}
        return _with_free(alone, lambda device: max(device.memory_free, had.get(device.index, 0)))

    def _held_by_spare(self, facts: Facts) -> Bytes:
        """What isn't free because of contexts that the candidate takes over, and its plan counts. They are told as the
        plan's own row for the next spare tells them: whatever a context takes, the two cancel each other."""
        if facts.device.kind != "cuda" or not self._config.supervisor.spare_engine:
            return {}
        return self._engines.spares.context_bytes

    def _yet_to_be_taken(self, replicas: Replicas, facts: Facts) -> Bytes:
        """What is free only until their next generations have started, or the present ones have: what they have of it
        by now can't be told. When one is ready a spare follows, which is the candidate's as well if that plans one."""
        plan = replicas.plan
        if plan is None or plan.device.kind != facts.device.kind:
            return {}
        starting = [engine for engine in replicas.engines if engine.restarts and not engine.ready]
        unkept = not self._config.supervisor.spare_engine
        if plan.device.kind != "cuda":
            return {0: plan.budget.taken * len(starting) // plan.replicas}
        taken = {}
        for engine in starting:
            for rank in range(plan.ranks):
                budget = plan.budget_of(engine.replica, rank)
                taken[plan.device_of(engine.replica, rank)] = budget.taken + (budget.spare if unkept else 0)
        return taken

    def _try(self, facts: Facts) -> Plan | ConfigInvalid:
        try:
            return resolve.resolve(self._config, facts, self._config_file)
        except ConfigInvalid as invalid:
            return invalid


def _fits(plan: Plan, facts: Facts) -> bool:
    """Whether what it takes is free now: the room that the old engine's plan kept, if no other process has it."""
    fraction = plan.config.engine.memory_fraction
    free = {device.index: device.memory_free for device in facts.device.usable}
    places = zip(plan.devices or [0], plan.device_budgets or [plan.budget], strict=True)
    return all(budget.needed - budget.reserve <= int(free.get(index, 0) * fraction) for index, budget in places)


def _with_free(facts: Facts, free: Callable[[Device], int]) -> Facts:
    return msgspec.structs.replace(facts, device=facts.device.with_free(free))


def _with_more(facts: Facts, more: Bytes) -> Facts:
    return _with_free(facts, lambda device: device.memory_free + more.get(device.index, 0))


def _with_less(facts: Facts, less: Bytes) -> Facts:
    return _with_free(facts, lambda device: device.memory_free - less.get(device.index, 0))


def _given_back(replicas: Replicas, facts: Facts) -> Bytes:
    """What becomes free when they sleep; nothing of one that starts, since its account is older or newer than the
    facts."""
    plan = replicas.plan
    if plan is None or plan.device.kind != facts.device.kind:
        return {}
    given: dict[int, int] = {}
    for engine in (engine for engine in replicas.engines if engine.ready):
        for rank, child in enumerate(engine.children):
            if plan.device.kind != "cuda":
                # The weights stay in the same memory; of slots that were never used nothing was taken.
                cache = plan.budget.row("kv cache") // (plan.ranks * plan.replicas)
                given[0] = given.get(0, 0) + min(cache, child.memory)
            else:
                # torch's account, all of which comes back: a sleeping process keeps its context, which isn't in it.
                given[plan.device_of(engine.replica, rank)] = int(child.stats.get("memory_used", 0))
    return given

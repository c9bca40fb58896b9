"""Where a candidate starts: beside the old engine or after it, by what its plan needs and what is free."""

from __future__ import annotations

import msgspec

from lightllmd.config import resolve
from lightllmd.config.parameters import Config
from lightllmd.config.plan import Facts, Plan
from lightllmd.errors import ConfigInvalid, DoesNotFit
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.replicas import Replicas


class Placement:
    """Of one candidate with this configuration."""

    def __init__(self, engines: Engines, config: Config, config_file: str | None) -> None:
        self._engines = engines
        self._config, self._config_file = config, config_file
        self.beside = True  # as last decided

    def decide(self, facts: Facts) -> tuple[Plan, Facts]:
        """The plan, and the facts that it was made from: beside where that costs no KV slots (or is asked for), else
        after. Raises ConfigInvalid, DoesNotFit."""
        how, old = self._config.supervisor.swap, self._engines.serving
        leaving = sum(self._yet_to_be_taken(replicas, facts) for replicas in self._engines.leaving)
        facts = _with_free(facts, self._held_by_spare(facts) - leaving)
        alone = _with_free(facts, _given_back(old))
        facts = _with_free(facts, -self._yet_to_be_taken(old, facts))
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
        return _with_free(alone, max(before.device.memory_free - alone.device.memory_free, 0))

    def _held_by_spare(self, facts: Facts) -> int:
        """Bytes that aren't free because of a context that the candidate takes over, and its plan counts. They are told
        as the plan's own row for the next spare tells them: whatever a context takes, the two cancel each other."""
        if facts.device.kind != "cuda" or not self._config.supervisor.spare_engine:
            return 0
        return self._engines.spare.context_bytes

    def _yet_to_be_taken(self, replicas: Replicas, facts: Facts) -> int:
        """Bytes that are free only until their next generations have started, or the present ones have: what they have
        of them by now can't be told. When one is ready a spare follows, which is the candidate's as well if that plans
        one. Of GPUs, each of which has one engine of a revision: the most that it is of any."""
        starting = [engine for engine in replicas.engines if engine.restarts and not engine.ready]
        if replicas.plan is None or not starting:
            return 0
        budget = replicas.plan.budget
        each = budget.taken if self._config.supervisor.spare_engine else budget.taken + budget.spare
        return each if facts.device.kind == "cuda" else each * len(starting)

    def _try(self, facts: Facts) -> Plan | ConfigInvalid:
        try:
            return resolve.resolve(self._config, facts, self._config_file)
        except ConfigInvalid as invalid:
            return invalid


def _fits(plan: Plan, facts: Facts) -> bool:
    """Whether what it takes is free now: the room that the old engine's plan kept, if no other process has it."""
    may_use = int(facts.device.memory_free * plan.config.engine.memory_fraction)
    return plan.budget.needed - plan.budget.reserve <= may_use


def _with_free(facts: Facts, more: int) -> Facts:
    device = msgspec.structs.replace(facts.device, memory_free=max(facts.device.memory_free + more, 0))
    return msgspec.structs.replace(facts, device=device)


def _given_back(replicas: Replicas) -> int:
    """Bytes that become free when they sleep: of a CPU all that do, of GPUs the least that do of any. 0 for one that
    starts, since its account is older or newer than the facts."""
    if replicas.plan is None:
        return 0
    if replicas.plan.device.kind != "cuda":
        # The weights stay in the same memory; of slots that were never used nothing was taken.
        cache, ready = replicas.plan.budget.row("kv cache"), [e.child for e in replicas.engines if e.ready]
        return sum(min(cache, child.memory) for child in ready if child is not None)
    # torch's account, all of which comes back: a sleeping process keeps its context, which isn't in it.
    stats = [engine.child.stats if engine.child is not None and engine.ready else {} for engine in replicas.engines]
    return int(min(one.get("memory_used", 0) for one in stats))

"""The groups of ranks that serve one revision now, as one api worker sees them: a link to each, how busy it is, and
which prompts it has seen.

What an engine says of its load is up to a quarter of a second old, and counts all api workers' requests; what this
worker did since is added. Of the other workers' prompts nothing is known.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from typing import Protocol

from lightllmd.api.inflight import routing
from lightllmd.api.inflight.routing import POLICY, GroupView, Policy, PrefixIndex
from lightllmd.ipc import messages
from lightllmd.ipc.messages import Load, RequestParams


class Link(Protocol):
    """The way to one engine generation."""

    def send(self, message: messages.ToEngine) -> None:
        """Never blocks."""

    def receive(self) -> Iterable[messages.ToApi]:
        """What came since the last call."""

    def close(self) -> None:
        """Drops what was sent and what was received but not read."""


class EngineGroup:
    """One generation that is up. Changed by its ledger alone."""

    def __init__(self, replica: int, generation: int, link: Link) -> None:
        self.replica = replica  # its number among the groups; the next generation in its place has the same
        self.generation = generation
        self.link = link
        self.load: Load | None = None  # the scheduler's last word
        self.prefixes = PrefixIndex()
        self.suspects = 0  # requests here that engines may have died of
        self._sequences = 0.0  # that run or wait
        self._own = 0  # of them, this worker's: so many are there whatever the last word was
        self._tokens = 0.0  # of prompts, still to be computed

    def heard(self, load: Load) -> None:
        """It tells how busy it is."""
        self.load = load
        self._sequences = load.running + load.waiting + load.paused
        self._tokens = load.queued_tokens
        self.prefixes.room = max(1, min(load.slots_total // routing.BLOCK, routing.MOST_KEPT))

    def sent(self, sequences: int, tokens: int, suspect: bool) -> None:
        """A request went there."""
        self._sequences += sequences
        self._own += sequences
        self._tokens += tokens
        self.suspects += suspect

    def began(self, tokens: int) -> None:
        """So many tokens of a prompt are not to be computed any more."""
        self._tokens = max(0.0, self._tokens - tokens)

    def left(self, sequences: int, suspect: bool) -> None:
        """A request has ended."""
        self._sequences -= sequences
        self._own -= sequences
        self.suspects -= suspect

    @property
    def busy(self) -> float:
        """In requests."""
        return routing.load_of(max(self._sequences, self._own), self._tokens)


class EngineGroups:
    """Those that are up, by their numbers. `cached`: they have prompt caches."""

    def __init__(self, cached: bool, policy: Policy = POLICY) -> None:
        self._cached, self._policy = cached, policy
        self._groups: dict[int, EngineGroup] = {}

    def __iter__(self) -> Iterator[EngineGroup]:
        return iter(self._groups.values())

    def __len__(self) -> int:
        return len(self._groups)

    def at(self, replica: int) -> EngineGroup | None:
        """The generation in that place."""
        return self._groups.get(replica)

    def of(self, generation: int) -> EngineGroup | None:
        """The group that this generation is."""
        return next((group for group in self if group.generation == generation), None)

    def add(self, group: EngineGroup) -> None:
        """It is up."""
        self._groups[group.replica] = group
        self._groups = dict(sorted(self._groups.items()))

    def remove(self, group: EngineGroup) -> None:
        """It is gone."""
        del self._groups[group.replica]

    def route(
        self, prompt: list[int], params: RequestParams, passed_over: Collection[int] = (), suspect: bool = False
    ) -> EngineGroup | None:
        """Where a request goes, which is noted; None: no group is up but those generations that are `passed_over`.

        Requests that engines may have died of (`suspect`) go where such are, all others where none are, if they can.
        """
        groups = [group for group in self if group.generation not in passed_over]
        groups = [group for group in groups if bool(group.suspects) == suspect] or groups
        if len(self) == 1 or not groups:
            return groups[0] if groups else None
        cached = self._cached and params.use_cache
        hashes = routing.block_hashes(prompt) if cached else []
        views = [GroupView(group.replica, group.busy, group.prefixes.match(hashes)) for group in groups]
        chosen = self._groups[routing.choose(views, routing.first_hash(prompt), self._policy).group]
        chosen.prefixes.add(hashes)
        return chosen

    @property
    def load(self) -> Load | None:
        """Of all together; None where none has told of itself."""
        loads = [group.load for group in self if group.load is not None]
        if len(loads) <= 1:
            return loads[0] if loads else None
        total = sum(load.slots_total for load in loads)
        return Load(
            generation=loads[0].generation,
            slots_total=total,
            slots_used=sum(load.slots_used for load in loads),
            running=sum(load.running for load in loads),
            waiting=sum(load.waiting for load in loads),
            paused=sum(load.paused for load in loads),
            estimated_peak=sum(load.estimated_peak * load.slots_total for load in loads) / total if total else 0.0,
            queued_tokens=sum(load.queued_tokens for load in loads),
        )

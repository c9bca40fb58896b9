"""The waiting line: in order of arrival within a tenant, fair between tenants, without a clock.

Fair queueing by finish times (Demers, Keshav and Shenker, SIGCOMM 1989), in tokens and weighted. The queue's virtual
time is what each tenant of weight 1 that waits would have been served, had all tokens been shared by weight. A tenant
has a virtual time, too: what it was served since it joined, over its weight, from the queue's on. The next is the
tenant whose virtual time will be least once its oldest sequence is admitted, so a short prompt passes long ones; while
a prompt waits, each other tenant of the same weight is served about as many tokens as the prompt has, at most. Idling
saves nothing up.

Within a tenant a priority moves a sequence's turn, see `sequences_of`. Between tenants a step of it is worth
`PRIORITY_STEP` tokens: a tenant's urgent sequence goes before others' as if it had been served so many less, and is
charged as any other, so that a priority buys an earlier turn and not a larger share.

Costs are O(log n) in tenants and sequences in line, but for moves of memory.
"""

from __future__ import annotations

from bisect import insort
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from heapq import heapify, heappop, heappush

from lightllmd.engine.scheduling.sequence import Sequence

_Key = tuple[float, tuple[int, int, int]]  # (virtual time once it is admitted, the sequence's order)
PRIORITY_STEP = 4096  # tokens
_SPARE = 64  # entries that are kept beyond what is needed, before anything is cleaned up


@dataclass(slots=True, eq=False)
class _Tenant:
    """One that has something in line."""

    time: float  # virtual
    weight: float  # its share, in units of the others'
    line: list[Sequence] = field(default_factory=list)  # ascending by order, never empty

    @property
    def key(self) -> _Key:
        """Least is next."""
        first = self.line[0]
        return self.time + (_cost(first) + first.priority * PRIORITY_STEP) / self.weight, first.order


def _cost(sequence: Sequence) -> int:
    """Tokens that its admission makes the engine compute, as far as they are known."""
    return sequence.length if sequence.first or not sequence.forks else 1


def _age(sequence: Sequence) -> tuple[int, int, int]:
    return sequence.order


class FairQueue:
    """The sequences that wait and never ran."""

    def __init__(self) -> None:
        self._tenants: dict[int, _Tenant] = {}
        self._left: dict[int, float] = {}  # virtual times of tenants that have nothing in line any more
        self._heap: list[tuple[_Key, int]] = []  # (key, tenant); has each tenant's key, and some that are outdated
        self._time = 0.0  # virtual
        self._weight = 0.0  # of all tenants that wait
        self._count = 0  # sequences
        self._fresh = False  # several tenants wait, and `charge` has not been called since there was one

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sequence]:
        for tenant in self._tenants.values():
            yield from tenant.line

    def has(self, tenant: int) -> bool:
        """Whether a sequence of the tenant waits."""
        return tenant in self._tenants

    @property
    def contested(self) -> bool:
        """Several tenants wait, so that it matters what each is served."""
        return len(self._tenants) > 1

    @property
    def head(self) -> Sequence | None:
        """The next; None if none waits."""
        while self._heap:
            key, number = self._heap[0]
            tenant = self._tenants.get(number)
            if tenant is not None and tenant.key == key:
                return tenant.line[0]
            heappop(self._heap)
        return None

    def add(self, sequence: Sequence) -> None:
        """At its place among those of its tenant."""
        tenant = self._tenants.get(sequence.tenant)
        if tenant is None:
            time = max(self._time, self._left.pop(sequence.tenant, 0.0))
            tenant = self._tenants[sequence.tenant] = _Tenant(time, sequence.weight)
            self._weight += tenant.weight
            self._fresh |= len(self._tenants) == 2
        insort(tenant.line, sequence, key=_age)
        self._count += 1
        if tenant.line[0] is sequence:
            self._push(sequence.tenant, tenant)

    def remove(self, sequence: Sequence) -> None:
        """It leaves the line without being admitted."""
        tenant = self._tenants[sequence.tenant]
        tenant.line.remove(sequence)
        self._count -= 1
        if tenant.line:
            self._push(sequence.tenant, tenant)
        else:
            del self._tenants[sequence.tenant]
            self._weight -= tenant.weight
            self._leave(sequence.tenant, tenant.time)

    def admit(self, sequence: Sequence) -> None:
        """The head is admitted, or one that goes with it."""
        self._serve(self._tenants[sequence.tenant], _cost(sequence))
        self.remove(sequence)

    def charge(self, tokens: Mapping[int, int]) -> None:
        """Tokens that sequences were given, by tenant, since the last call. What was given before several tenants
        waited doesn't count, nor what is given to those that don't wait."""
        if self._fresh:
            self._fresh = False
            return
        for number, count in tokens.items():
            tenant = self._tenants.get(number)
            if tenant is not None and count > 0:
                self._serve(tenant, count)
                self._push(number, tenant)

    def _serve(self, tenant: _Tenant, tokens: int) -> None:
        tenant.time += tokens / tenant.weight
        self._time += tokens / self._weight

    def _leave(self, number: int, time: float) -> None:
        """What it was served beyond its share is remembered until the queue's time has come there, or none waits."""
        if not self._tenants:
            self._left.clear()
            self._time = self._weight = 0.0
        elif time > self._time:
            self._left[number] = time
            if len(self._left) > 2 * len(self._tenants) + _SPARE:
                self._left = {number: time for number, time in self._left.items() if time > self._time}

    def _push(self, number: int, tenant: _Tenant) -> None:
        heappush(self._heap, (tenant.key, number))
        if len(self._heap) > 4 * len(self._tenants) + _SPARE:
            self._heap = [(tenant.key, number) for number, tenant in self._tenants.items()]
            heapify(self._heap)

"""Requests whose clients said how long an answer is of use to them."""

from __future__ import annotations

from collections.abc import Container, Iterator, Mapping
from heapq import heapify, heappop, heappush

from lightllmd.api.inflight.entry import Entry
from lightllmd.errors import DeadlineExceeded

_SPARE = 64  # entries that are kept beyond what is needed, before anything is cleaned up


def late(entry: Entry) -> DeadlineExceeded:
    """What the client of an entry past its deadline is told."""
    assert entry.deadline is not None
    return DeadlineExceeded(f"timeout: the {entry.deadline - entry.arrived_at:g} s that the request may take are over")


class Deadlines:
    """Those of one ledger, the soonest first; O(log n) each. Of requests that ended before, none is kept for long."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int]] = []  # (seconds, number)
        self._bound = _SPARE

    def __len__(self) -> int:
        return len(self._heap)

    def add(self, entry: Entry) -> None:
        """Nothing happens to an entry without a deadline."""
        if entry.deadline is not None:
            heappush(self._heap, (entry.deadline, entry.request))

    def passed(self, now: float, entries: Mapping[int, Entry]) -> Iterator[Entry]:
        """Takes out those of `entries`, which are in flight by their numbers, that should have ended by `now`."""
        self._forget(entries)
        while self._heap and self._heap[0][0] <= now:
            entry = entries.get(heappop(self._heap)[1])
            if entry is not None:
                yield entry

    def _forget(self, entries: Container[int]) -> None:
        if len(self._heap) > self._bound:
            self._heap = [(deadline, number) for deadline, number in self._heap if number in entries]
            heapify(self._heap)
            self._bound = 2 * len(self._heap) + _SPARE

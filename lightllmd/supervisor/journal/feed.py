"""A bounded history that can be followed: log lines, events."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Feed(Generic[T]):
    """The last `keep` items, for readers that may wait for the next.

    Belongs to the loop's thread. A follower that is slower than the feed loses the oldest items: a feed never grows
    with its readers.
    """

    def __init__(self, keep: int) -> None:
        self._items: deque[T] = deque(maxlen=keep)
        self._end = 0  # number of items ever added; items[-1] is number _end - 1
        self._added = asyncio.Event()
        self.closed = False

    def add(self, item: T) -> None:
        """Appends `item`, in place of the oldest where `keep` are there, and wakes the followers."""
        self._items.append(item)
        self._end += 1
        self._wake()

    def last(self, count: int) -> list[T]:
        """At most `count` of the newest items, oldest first."""
        return list(self._items)[-count:] if count > 0 else []

    def close(self) -> None:
        """Ends every follower once it has read what is there."""
        self.closed = True
        self._wake()

    def _wake(self) -> None:
        # Present followers hold the old event; later ones wait on a new one.
        self._added.set()
        self._added = asyncio.Event()

    def follow(self, idle: float) -> AsyncIterator[list[T]]:
        """What is added from this call on, in batches; an empty batch after each `idle` seconds without an item."""
        return self._follow(self._end, idle)

    async def _follow(self, cursor: int, idle: float) -> AsyncIterator[list[T]]:
        while True:
            while cursor == self._end and not self.closed:
                added = self._added
                try:
                    await asyncio.wait_for(added.wait(), idle)
                except TimeoutError:
                    yield []
            new = min(self._end - cursor, len(self._items))
            cursor = self._end
            if new:
                yield self.last(new)
            elif self.closed:
                return

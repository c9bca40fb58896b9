"""One HTTP request's entries, the signal that wakes who waits for them, and the watch over its connection."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from lightllmd.api.inflight.entry import Entry
from lightllmd.errors import ClientClosed, RequestError


class Signal:
    """Wakes the one task that waits on it; a `set` before the wait is not lost."""

    __slots__ = ("_future", "_set")

    def __init__(self) -> None:
        self._set = False
        self._future: asyncio.Future[None] | None = None

    def set(self) -> None:
        """Wakes the waiting task, or the next one that waits."""
        self._set = True
        if self._future is not None and not self._future.done():
            self._future.set_result(None)

    async def wait(self) -> None:
        """Until the next `set`, or one that came since the last wait."""
        if not self._set:
            self._future = asyncio.get_running_loop().create_future()
            await self._future
            self._future = None
        self._set = False


class Pending:
    """The entries of one HTTP request, at least one, their signal, and the watch over its connection."""

    def __init__(self, entries: list[Entry], signal: Signal) -> None:
        self.entries = entries
        self.signal = signal

    @property
    def error(self) -> RequestError | None:
        """The first, or that of a client that is gone."""
        if all(entry.outcome != "cancelled" for entry in self.entries):
            return next((entry.error for entry in self.entries if entry.error is not None), None)
        return ClientClosed("the client closed the connection")

    @property
    def held(self) -> bool:
        """Whether one of them waits for an engine now."""
        return any(entry.held_since is not None for entry in self.entries)

    @property
    def aborted(self) -> bool:
        """Broken off from our side; the branches say so themselves."""
        return any(branch.finish == "abort" for entry in self.entries for branch in entry.branches)

    @property
    def generated(self) -> int:
        """Tokens of all entries."""
        return sum(entry.generated for entry in self.entries)

    @property
    def done(self) -> bool:
        """Whether all have ended, however."""
        return all(entry.outcome is not None for entry in self.entries)

    def cancel(self) -> None:
        """Ends what has not ended."""
        for entry in self.entries:
            entry.ledger.cancel(entry)
        self.signal.set()

    async def watch(self, receive: Receive) -> None:
        """Ends the entries when the client closes its connection."""
        while (await receive())["type"] != "http.disconnect":
            pass
        self.cancel()

    async def finish(self, receive: Receive) -> None:
        """Waits until every entry is done. Raises the first error; the others are cancelled then."""
        watcher = asyncio.create_task(self.watch(receive))
        try:
            while True:
                if (error := self.error) is not None:
                    raise error
                if self.done:
                    return
                await self.signal.wait()
        finally:
            watcher.cancel()
            self.cancel()

"""Where new requests wait while it is open which revision will answer them."""

from __future__ import annotations

import asyncio

from starlette.types import Receive

from lightllmd.errors import ClientClosed, DeadlineExceeded, NotReady, QueueFull, RequestError


class Gate:
    """Open at first. All calls come from one event loop."""

    def __init__(self) -> None:
        self.shut = False
        self.refusal: str | None = None  # the reason while no request is let in, open or shut
        self._waiting: set[asyncio.Future[None]] = set()

    @property
    def waiting(self) -> int:
        """Requests that wait before it."""
        return len(self._waiting)

    def hold(self) -> None:
        """Shuts it."""
        self.shut = True

    def release(self) -> None:
        """Opens it; those that wait go through."""
        self.shut = False
        for turn in self._waiting:
            if not turn.done():
                turn.set_result(None)

    def refuse(self, reason: str | None) -> None:
        """From now on requests are told `reason`, those that wait too; None takes them again."""
        self.refusal = reason
        if reason is not None:
            for turn in self._waiting:
                _fail(turn, NotReady(reason))

    async def enter(self, receive: Receive, most: int, timeout: float) -> None:
        """Comes back when the gate is open. `receive` is the request's, whose body has been read.

        Raises NotReady while refusing, QueueFull when `most` requests wait already, DeadlineExceeded after `timeout`
        seconds, ClientClosed when the client goes away.
        """
        if self.refusal is not None:
            raise NotReady(self.refusal)
        if not self.shut:
            return
        try:
            async with asyncio.timeout(timeout):
                while self.shut:  # again, if it was shut again before this task had its turn
                    if len(self._waiting) >= most:
                        raise QueueFull(f"{most} requests are waiting for the model to be replaced", retry_after=5.0)
                    await self._wait(receive)
        except TimeoutError:
            message = f"the model was not replaced within the {timeout:g} s that this request may be held"
            raise DeadlineExceeded(message) from None

    async def _wait(self, receive: Receive) -> None:
        turn = asyncio.get_running_loop().create_future()
        watcher = asyncio.create_task(_watch(receive, turn))
        self._waiting.add(turn)
        try:
            await turn
        finally:
            self._waiting.discard(turn)
            watcher.cancel()


async def _watch(receive: Receive, turn: asyncio.Future[None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    _fail(turn, ClientClosed("the client closed the connection"))


def _fail(turn: asyncio.Future[None], error: RequestError) -> None:
    if not turn.done():
        turn.set_exception(error)

"""All connections of one server: how many, how much of their bodies is in memory, and what was done about too many."""

from __future__ import annotations

import asyncio
import logging
from collections import Counter, deque
from collections.abc import Callable
from typing import Protocol

from lightllmd.errors import LightllmdError
from lightllmd.http.bounds import Bounds

log = logging.getLogger(__name__)

SMALL_BODY = 64 << 10  # bytes; an eighth of the memory for bodies is kept for those that are no larger
_SLOW_BODY = 1e6  # bytes per second: where memory is short, a slower body gives way to others
_SLOW_AFTER = 2.0  # seconds from which a body's pace can be told
_SAID_EVERY = 10.0  # seconds between two log lines about the same bound
_RECENTLY = 10.0  # seconds for which `full` remembers
_READ = 64 << 10  # bytes at a time
_TURN = 0.004  # seconds of one turn of the loop for bodies in many pieces


class OpenConnection(Protocol):
    """A connection as all of them are seen together."""

    transport: asyncio.Transport
    guest: bool  # beyond the cap: only reserved paths are answered

    def hasten(self, seconds: float) -> None:
        """Ends in `seconds` if it is idle until then."""

    def give_way(self) -> None:
        """Closes at once, as others need its place."""

    def shutdown(self) -> None:
        """Closes, at once where no answer is under way."""

    def check(self, now: float) -> None:
        """Ends what has taken too long. `now`: loop time."""


class BodyOwner(Protocol):
    """A request whose body takes memory."""

    received: int  # bytes of the body
    held: int  # of them, those that count against the bound

    def pace(self, now: float) -> float:
        """Bytes per second at which its body comes. `now`: loop time."""

    def crowd_out(self) -> None:
        """Refuses the request, as others need the memory."""


class Traffic:
    """Changed by the connections of one server, in its event loop.

    `render`: the body of an error for a path, in JSON. `is_reserved`: paths that are answered when all else is refused.
    """

    def __init__(
        self,
        bounds: Bounds,
        render: Callable[[LightllmdError, str], bytes],
        is_reserved: Callable[[str], bool],
    ) -> None:
        self.bounds = bounds
        self.render = render
        self.is_reserved = is_reserved
        self.connections: set[OpenConnection] = set()
        self.handshakes = 0  # accepted, not among the connections yet
        self.waiting: dict[OpenConnection, None] = {}  # those of which no request has come yet, longest first
        self.retired = False  # each answer closes its connection
        self.idle_timeout = bounds.keep_alive_timeout
        self.bodies = Bodies(bounds.body_bytes)
        self.turns = Turns()
        # Of whichever connection reads now. A view: asyncio's TLS reads into slices of it.
        self.buffer = memoryview(bytearray(_READ))
        self.bites: Counter[str] = Counter()  # how often each bound was reached
        self._said: dict[str, float] = {}
        self._full_at = float("-inf")

    def admit(self) -> bool | None:
        """Whether one more connection may come; None: as a guest.

        Where all are taken, the one that has let us wait for a request for the longest time gives way.
        """
        bounds, held = self.bounds, len(self.connections) + self.handshakes
        if held < bounds.connections:
            return True
        self._full_at = asyncio.get_running_loop().time()
        most = bounds.connections + bounds.guests
        oldest = next(iter(self.waiting), None)
        if oldest is not None and (held >= most or not oldest.guest):
            self.bite("connections closed on which no request came, as all are in use")
            oldest.give_way()
            held -= 1
        if held >= most:
            self.bite("connections refused, as all are in use")
            return False
        return True if held < bounds.connections else None

    def retire(self, idle_timeout: float) -> None:
        """From now on each answer says that its connection ends; an idle one ends after `idle_timeout` seconds."""
        self.retired, self.idle_timeout = True, idle_timeout
        for connection in self.connections:
            connection.hasten(idle_timeout)

    @property
    def crowded(self) -> bool:
        """Whether there are more connections than the cap: the rest are guests."""
        return len(self.connections) > self.bounds.connections

    def stats(self) -> dict[str, float]:
        """How many connections there are and may be; whether the latter was reached within the last seconds."""
        full = asyncio.get_running_loop().time() - self._full_at < _RECENTLY
        return {
            "connections": len(self.connections),
            "connections_most": self.bounds.connections,
            "connections_full": float(full),
        }

    def bite(self, what: str) -> None:
        """Counts and logs that a bound was reached, each at most every few seconds."""
        self.bites[what] += 1
        now = asyncio.get_running_loop().time()
        if now - self._said.get(what, float("-inf")) >= _SAID_EVERY:
            self._said[what] = now
            log.warning("%s: %d so far (%d connections)", what, self.bites[what], len(self.connections))


class Bodies:
    """The memory that requests' bodies take, from their first byte until they are decoded."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.held = 0
        self._coming: dict[BodyOwner, None] = {}  # not complete yet

    def take(self, exchange: BodyOwner, size: int, now: float) -> bool:
        """Room for `size` more bytes of its body; False: there is none, even if a slow one is given up."""
        limit = self.limit if exchange.received <= SMALL_BODY else self.limit - self.limit // 8
        while self.held + size > limit:
            slowest = min(self._coming, key=lambda one: one.pace(now), default=None)
            if slowest is None or slowest is exchange or slowest.pace(now) >= _SLOW_BODY:
                return False
            slowest.crowd_out()
        self._coming[exchange] = None
        exchange.held += size
        self.held += size
        return True

    def complete(self, exchange: BodyOwner) -> None:
        """All of this body has come: it can't be given up for others any more."""
        self._coming.pop(exchange, None)

    def release(self, exchange: BodyOwner) -> None:
        """None of this body is kept any more."""
        self._coming.pop(exchange, None)
        self.held -= exchange.held
        exchange.held = 0


def pace(received: int, seconds: float) -> float:
    """Bytes per second of a body; without bound while it is too young to tell."""
    return received / seconds if seconds >= _SLOW_AFTER else float("inf")


class Turns:
    """What is parsed piece by piece, so that the loop serves others meanwhile. All connections share one budget."""

    def __init__(self) -> None:
        self._waiting: deque[Callable[[], bool]] = deque()

    def add(self, step: Callable[[], bool]) -> None:
        """`step` is called until it returns False."""
        self._waiting.append(step)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._run)

    def _run(self) -> None:
        loop = asyncio.get_running_loop()
        until = loop.time() + _TURN
        while self._waiting:
            step = self._waiting[0]
            again = step()
            self._waiting.popleft()
            if again:
                self._waiting.append(step)
            if loop.time() >= until:
                break
        if self._waiting:
            loop.call_soon(self._run)

"""What this worker can answer with: a front for each revision, the one in force, and the gate before it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive

from lightllmd.api.inflight.accounts import Accounts
from lightllmd.api.inflight.frontend import FrontEnd
from lightllmd.api.inflight.gate import Gate
from lightllmd.api.inflight.ledger import Tally
from lightllmd.api.inflight.reply import EventStream, LateStream
from lightllmd.api.web.errors import shown
from lightllmd.config.plan import Plan, decode_plan
from lightllmd.errors import NotFound, NotReady, RequestError
from lightllmd.ipc.messages import EngineDown, EngineUp, Health

log = logging.getLogger(__name__)


class Revisions:
    """A request belongs to the revision that is in force when it passes the gate. Changed by the supervisor's messages
    only, all in one event loop.

    `build` makes a plan's front. It reads the tokenizer's files, so that it takes up to seconds and may raise anything;
    it runs in a thread for all revisions but the first.
    """

    def __init__(
        self, number: int, plan: Plan, build: Callable[[Plan], FrontEnd], tally: Tally, accounts: Accounts
    ) -> None:
        self.number = number  # of the revision in force
        self.gate = Gate()
        self.accounts = accounts
        self.health = Health(False, "the engine is starting")
        self.names = list(plan.config.models)  # of [models]
        self.streams: set[EventStream] = set()  # those that are open
        self._tally = tally
        self._build = build
        self._fronts = {number: build(plan)}
        self._coming: dict[int, EngineUp | None] = {}  # revisions that are being prepared, each with its engine

    @property
    def front(self) -> FrontEnd:
        """The one in force."""
        return self._fronts[self.number]

    # --- requests -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def entered(self, receive: Receive) -> AsyncIterator[FrontEnd]:
        """Waits at the gate, then gives the front in force. Until the block ends, by which time the request is in that
        front's ledger or refused, it counts as in flight there, so that nobody ends the revision meanwhile.

        Raises what `Gate.enter` raises.
        """
        http = self.front.http
        await self.gate.enter(receive, http.max_held, http.hold_timeout)
        front = self.front
        front.entering += 1
        try:
            yield front
        finally:
            front.entering -= 1

    async def stream(
        self, make: Callable[[], Awaitable[Response]], error_frame: Callable[[RequestError], bytes]
    ) -> Response:
        """What `make` makes of a request for a stream, or what keeps its connection open while the gate is shut."""
        return LateStream(make, error_frame, self.front.http.hold_keepalive) if self.gate.shut else await make()

    def tick(self, now: float) -> None:
        """Ends what was held too long, keeps quiet streams alive. Called a few times a second."""
        for front in self._fronts.values():
            front.ledger.expire()
        for stream in self.streams:
            stream.keep_alive(now, self.front.http.hold_keepalive)

    def refuse(self, reason: str | None) -> None:
        """From now on new requests are told `reason`; None takes them again."""
        self.gate.refuse(reason)
        for front in self._fronts.values():
            front.ledger.refuse(reason)

    def stop_helpers(self) -> None:
        """When the worker ends."""
        for front in self._fronts.values():
            front.helpers.stop()

    def fail_all(self, error: RequestError) -> None:
        for front in self._fronts.values():
            front.ledger.fail_all(error)

    @property
    def trouble(self) -> str | None:
        """Why this worker is not ready; None when it is."""
        if self.gate.refusal is not None:
            return self.gate.refusal
        if not self.health.ready:
            return self.health.reason
        if not self.front.ledger.connected:
            return "the engine is being restarted"
        return None

    def stats(self) -> dict[str, float]:
        """Totals are those of the process, whatever became of the revisions."""
        fronts, gated = self._fronts, self.gate.waiting
        return {
            "in_flight": sum(front.in_flight for front in fronts.values()) + gated,
            "held": sum(front.ledger.held for front in fronts.values()) + gated,
            "gated": gated,
            **self._tally.counts,
            **{f"in_flight@{number}": front.in_flight for number, front in fronts.items()},
        }

    # --- names ----------------------------------------------------------------------------------------------------

    def others(self) -> Iterator[str]:
        """Models that are named but not served now."""
        return (name for name in self.names if name != self.front.model_name)

    def check_name(self, front: FrontEnd, name: str | None) -> None:
        """Any will do where [models] names none. Raises NotFound, NotReady."""
        if name is None or not self.names or name == front.model_name:
            return
        if name in self.names:
            message = f"model: {shown(name)} is not served now; {front.model_name!r} is"
            raise NotReady(message, param="model", code="model_not_served")
        known = dict.fromkeys([front.model_name, *self.names])
        raise NotFound(f"model: {shown(name)} is not one of {', '.join(known)}", param="model", code="model_not_found")

    # --- revisions come and go ------------------------------------------------------------------------------------

    def expect(self, number: int) -> None:
        """`prepare` follows; what is said of the revision from now on is for it."""
        if number not in self._fronts:
            self._coming.setdefault(number, None)

    async def prepare(self, number: int, plan: bytes) -> str:
        """Why it can't be served; empty: it can."""
        if number in self._fronts:
            return ""
        try:
            front = await asyncio.get_running_loop().run_in_executor(None, lambda: self._build(decode_plan(plan)))
        except Exception as failure:  # whatever a tokenizer's files make its library raise: the present one serves on
            log.exception("revision %d can't be prepared", number)
            self._coming.pop(number, None)
            return f"{type(failure).__name__}: {failure}"
        if number in self._fronts:
            return ""  # it was asked for twice
        if number not in self._coming:
            return "it was given up meanwhile"
        up = self._coming.pop(number)
        front.ledger.refuse(self.gate.refusal)
        self._fronts[number] = front
        if up is not None:
            front.ledger.engine_up(up.generation, up.endpoint)
        return ""

    def commit(self, number: int, carry: bool) -> None:
        if number not in self._fronts:
            log.error("revision %d was never prepared; revision %d stays in force", number, self.number)
            return
        before, self.number = self.front, number
        self.front.heir = None
        with contextlib.suppress(OSError):  # then the first request tries again
            self.front.helpers.start()
        if carry and self.front is not before:
            before.bequeath(self.front)

    def cut(self, number: int, reason: str) -> None:
        if number in self._fronts:
            self._fronts[number].ledger.cut(reason)

    def forget(self, number: int, reason: str) -> None:
        if number == self.number:
            log.error("revision %d is in force and can't be forgotten", number)
            return
        self._coming.pop(number, None)
        front = self._fronts.pop(number, None)
        if front is not None:
            front.ledger.abandon(reason)
            front.helpers.stop()

    def engine_up(self, message: EngineUp) -> None:
        front = self._fronts.get(message.revision)
        if front is not None:
            front.ledger.engine_up(message.generation, message.endpoint)
        elif message.revision in self._coming:
            self._coming[message.revision] = message

    def engine_down(self, message: EngineDown) -> None:
        front = self._fronts.get(message.revision)
        if front is not None:
            front.ledger.engine_down(message.generation, message.unproven, message.quarantined, message.outside)
            return
        up = self._coming.get(message.revision)
        if up is not None and up.generation == message.generation:
            self._coming[message.revision] = None

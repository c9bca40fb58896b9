"""What this worker can answer with: a revision for each revision, the one in force, and the gate before it."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager

from starlette.responses import Response
from starlette.types import Receive

from lightllmd.api.inflight.accounts import Accounts
from lightllmd.api.inflight.event_stream import EventStream, LateStream
from lightllmd.api.inflight.gate import Gate
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.tally import Tally
from lightllmd.api.web.errors import Unhealthy
from lightllmd.config.plan import Plan, decode_plan
from lightllmd.errors import NotFound, NotReady, RequestError
from lightllmd.ipc.messages import EngineDown, EngineUp, Health, Overview
from lightllmd.requests.faults import shown
from lightllmd.requests.fields import Body

log = logging.getLogger(__name__)

TGI_MODEL = "tgi"  # what clients of Text Generation Inference call the model, whichever it is


class Revisions:
    """A request belongs to the revision that is in force when it passes the gate. Changed by the supervisor's messages
    only, all in one event loop.

    `build` makes the revision of a number and a plan. It reads the tokenizer's files, so that it takes up to seconds
    and may raise anything; it runs in a thread for all revisions but the first.
    """

    def __init__(
        self, number: int, plan: Plan, build: Callable[[int, Plan], Revision], tally: Tally, accounts: Accounts
    ) -> None:
        self.number = number  # of the revision in force
        self.gate = Gate()
        self.accounts = accounts
        self.health = Health(False, "the engine is starting")
        self.overview: Overview | None = None  # what the supervisor last told of the whole daemon, for the page
        self.names = list(plan.config.models)  # of [models]
        self.streams: set[EventStream] = set()  # those that are open
        self._tally = tally
        self._build = build
        self._revisions = {number: build(number, plan)}
        # Revisions that are being prepared, each with its engines that are up, by replica.
        self._coming: dict[int, dict[int, EngineUp]] = {}

    @property
    def current(self) -> Revision:
        """The one in force."""
        return self._revisions[self.number]

    # --- requests -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def entered(self, receive: Receive, deadline: float | None = None) -> AsyncIterator[Revision]:
        """Waits at the gate, until `deadline` (monotonic seconds) at the longest, then gives the revision in force.
        Until the block ends, by which time the request is in that revision's ledger or refused, it counts as in flight
        there, so that the supervisor lets the revision be.

        Raises what `Gate.enter` raises.
        """
        http = self.current.http
        longest = http.hold_timeout
        if deadline is not None:
            longest = min(longest, max(0.0, deadline - time.monotonic()))
        await self.gate.enter(receive, http.max_held, longest)
        revision = self.current
        revision.entering += 1
        try:
            yield revision
        finally:
            revision.entering -= 1

    async def decode(self, raw: bytes, model: type[Body], noting: bool) -> tuple[Body, set[str]]:
        """See TextHelpers."""
        return await self.current.texts.decode(raw, model, noting)

    async def stream(
        self, make: Callable[[], Awaitable[Response]], error_frame: Callable[[RequestError], bytes], *, late: bool
    ) -> Response:
        """What `make` makes of a request for a stream, or what keeps its connection open while that takes its time:
        where it is `late`, as with images, and while the gate is shut."""
        if late or self.gate.shut:
            return LateStream(make, error_frame, self.current.http.hold_keepalive)
        return await make()

    def tick(self, now: float) -> None:
        """Ends what was held too long, keeps quiet streams alive. Called a few times a second."""
        for revision in self._revisions.values():
            revision.ledger.expire()
        for stream in self.streams:
            stream.keep_alive(now, self.current.http.hold_keepalive)

    def refuse(self, reason: str | None) -> None:
        """From now on new requests are told `reason`; None takes them again."""
        self.gate.refuse(reason)
        for revision in self._revisions.values():
            revision.ledger.refuse(reason)

    def stop_helpers(self) -> None:
        """When the worker ends."""
        for revision in self._revisions.values():
            revision.stop()

    def fail_all(self, error: RequestError) -> None:
        """Ends all requests in flight with `error`."""
        for revision in self._revisions.values():
            revision.ledger.fail_all(error)

    @property
    def trouble(self) -> str | None:
        """Why this worker is not ready; None when it is."""
        if self.gate.refusal is not None:
            return self.gate.refusal
        if not self.health.ready:
            return self.health.reason
        if not self.current.ledger.connected:
            return "the engine is being restarted"
        return None

    def check_health(self) -> None:
        """Raises Unhealthy, see `trouble`."""
        if (trouble := self.trouble) is not None:
            raise Unhealthy(trouble, retry_after=self.health.retry_after)

    def stats(self) -> dict[str, float]:
        """Totals are those of the process, whatever became of the revisions."""
        revisions, gated = self._revisions, self.gate.waiting
        return {
            "in_flight": sum(revision.in_flight for revision in revisions.values()) + gated,
            "held": sum(revision.ledger.held for revision in revisions.values()) + gated,
            "gated": gated,
            **self._tally.counts,
            **{f"in_flight@{number}": revision.in_flight for number, revision in revisions.items()},
        }

    # --- names ----------------------------------------------------------------------------------------------------

    def others(self) -> Iterator[str]:
        """Models that are named but not served now."""
        return (name for name in self.names if name != self.current.model_name)

    def check_name(self, revision: Revision, name: str | None) -> None:
        """Any will do where [models] names none. Raises NotFound, NotReady."""
        if name is None or not self.names or name == revision.model_name:
            return
        if name == TGI_MODEL and revision.plan.config.params.use_tgi_api:
            return
        if name in self.names:
            message = f"model: {shown(name)} is not served now; {revision.model_name!r} is"
            raise NotReady(message, param="model", code="model_not_served")
        known = dict.fromkeys([revision.model_name, *self.names])
        raise NotFound(f"model: {shown(name)} is not one of {', '.join(known)}", param="model", code="model_not_found")

    # --- revisions come and go ------------------------------------------------------------------------------------

    def expect(self, number: int) -> None:
        """`prepare` follows; what is said of the revision from now on is for it."""
        if number not in self._revisions:
            self._coming.setdefault(number, {})

    async def prepare(self, number: int, plan: bytes) -> str:
        """Why it can't be served; empty: it can."""
        if number in self._revisions:
            return ""
        try:
            revision = await asyncio.get_running_loop().run_in_executor(
                None, lambda: self._build(number, decode_plan(plan))
            )
        except Exception as failure:  # whatever a tokenizer's files make its library raise: the present one serves on
            log.exception("revision %d can't be prepared", number)
            self._coming.pop(number, None)
            return f"{type(failure).__name__}: {failure}"
        if number in self._revisions:
            revision.stop()
            return ""  # it was asked for twice
        if number not in self._coming:
            revision.stop()
            return "it was given up meanwhile"
        ups = self._coming.pop(number)
        revision.ledger.refuse(self.gate.refusal)
        self._revisions[number] = revision
        for up in ups.values():
            revision.ledger.engine_up(up.generation, up.endpoint, up.replica)
        return ""

    def commit(self, number: int, carry: bool) -> None:
        """Puts a prepared revision in force. `carry`: it goes on with what is in flight in the one before."""
        if number not in self._revisions:
            log.error("revision %d was never prepared; revision %d stays in force", number, self.number)
            return
        before, self.number = self.current, number
        self.current.successor = None
        with contextlib.suppress(OSError):  # then the first request tries again
            self.current.texts.processes.start()
        if carry and self.current is not before:
            before.migrate(self.current)

    def cut(self, number: int, reason: str) -> None:
        """Ends a revision's requests where they are; see `Ledger.cut`."""
        if number in self._revisions:
            self._revisions[number].ledger.cut(reason)

    def forget(self, number: int, reason: str) -> None:
        """A revision that is not in force will never be again."""
        if number == self.number:
            log.error("revision %d is in force and can't be forgotten", number)
            return
        self._coming.pop(number, None)
        revision = self._revisions.pop(number, None)
        if revision is not None:
            revision.ledger.abandon(reason)
            revision.stop()

    def engine_up(self, message: EngineUp) -> None:
        """A generation of its revision's engine is ready."""
        revision = self._revisions.get(message.revision)
        if revision is not None:
            revision.ledger.engine_up(message.generation, message.endpoint, message.replica)
        elif message.revision in self._coming:
            self._coming[message.revision][message.replica] = message

    def engine_down(self, message: EngineDown) -> None:
        """A generation of its revision's engine is gone."""
        revision = self._revisions.get(message.revision)
        if revision is not None:
            revision.ledger.engine_down(message.generation, message.unproven, message.quarantined, message.outside)
            return
        ups = self._coming.get(message.revision, {})
        for replica in [replica for replica, up in ups.items() if up.generation == message.generation]:
            del ups[replica]

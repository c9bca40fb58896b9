"""What makes a dialect: its routes, and the two translations around the one way from a body to its answer."""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.helpers.texts import off_loop
from lightllmd.api.inflight.event_stream import EventStream, Frames
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision, let_go_if_refused
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies, limits
from lightllmd.api.web.errors import ErrorBody, ErrorShape, ErrorStatus, own_status
from lightllmd.api.web.responses import encoded_response, json_in_parts
from lightllmd.errors import RequestError
from lightllmd.requests.asked import Asked
from lightllmd.requests.fields import Body
from lightllmd.requests.scoring import ScoresAsked
from lightllmd.requests.urgency import Urgency, urgency_of

Kind = TypeVar("Kind", bound=Body)


@dataclass(frozen=True)
class Dialect:
    """One API."""

    paths: tuple[str, ...]  # that its routes begin with; the longest that fits says which dialect an error is told in
    error_body: ErrorBody
    bodies: tuple[type[Body], ...]  # for the OpenAPI document
    router: Callable[[Revisions], APIRouter]
    error_status: ErrorStatus = own_status
    header: bytes = b""  # a request with this one is told errors in this dialect, whatever its path
    names_requests: bool = False  # see ErrorShape
    close: Callable[[], None] | None = None  # when the worker ends
    name: str = ""  # in tables

    @property
    def errors(self) -> ErrorShape:
        """How they are told."""
        return ErrorShape(self.error_body, self.error_status, self.names_requests)


class WholeReply(Protocol):
    """How a dialect tells what became of a body's jobs."""

    def whole(self, pending: Pending) -> Any:
        """In one piece, once all have ended; what JSON is made of. Called in a thread where it is large."""


@runtime_checkable
class Reply(WholeReply, Protocol):
    """Of a route that may stream."""

    def frames(self, pending: Pending) -> Frames:
        """As they come."""


def _nothing(body: Body) -> int:
    return 0


@dataclass(frozen=True)
class Translation(Generic[Kind]):
    """How a route that has the engine work translates: a checked body into what is asked, jobs into their answer."""

    body: type[Kind]
    asked: Callable[[Kind], Asked | ScoresAsked]  # raises InvalidRequest for what the dialect alone can't do
    reply: Callable[[Revision, Kind, Sequence[Any]], Awaitable[WholeReply]]  # gets the jobs of what was asked
    streamed: Callable[[Kind], bool]  # then the reply is a `Reply`
    error_frame: Callable[[RequestError], bytes]  # the end of a stream that has begun and can't go on
    # Of an answer in one piece, beside what its entries have: characters, as `off_loop` counts them.
    answer_size: Callable[[Kind], int] = _nothing
    # Of the answer, beside the usual ones; called when all have ended or, for a stream, before it begins.
    headers: Callable[[Any, Pending], Mapping[str, str]] = lambda reply, pending: {}
    # Awaited when the answer is complete, before the client has its end.
    before_end: Callable[[], Awaitable[None]] | None = None


class Responder:
    """The way of a request that the engine works on, whatever its dialect."""

    def __init__(self, revisions: Revisions) -> None:
        self._revisions = revisions
        self._parse = bodies.parser(revisions.current.http, revisions.decode)

    async def respond(self, request: Request, translation: Translation[Kind]) -> Response:
        """Raises InvalidRequest, NotReady, QueueFull, and whatever ends the request before its answer has begun."""
        arrived_at = time.monotonic()
        return await self.answer(request, translation, await self.read(request, translation.body), arrived_at)

    async def read(self, request: Request, kind: type[Kind]) -> Kind:
        """The checked body. Raises what `respond` raises."""
        with self._revisions.accounts.admission():
            return await self._parse(request, kind)

    async def answer(self, request: Request, translation: Translation[Kind], body: Kind, arrived_at: float) -> Response:
        """To a body that was read; `arrived_at`: seconds of the monotonic clock. Raises what `respond` raises."""
        with self._revisions.accounts.admission():
            asked = translation.asked(body)
            urgency = urgency_of(request.headers, body.urgency)
        make = partial(self._respond, request, translation, body, asked, arrived_at, urgency)
        if translation.streamed(body):
            late = isinstance(asked, Asked) and asked.brings_images
            return await self._revisions.stream(make, translation.error_frame, late=late)
        return await make()

    async def _respond(
        self,
        request: Request,
        translation: Translation[Kind],
        body: Kind,
        asked: Asked | ScoresAsked,
        arrived_at: float,
        urgency: Urgency,
    ) -> Response:
        revisions = self._revisions
        with revisions.accounts.admission():
            async with revisions.entered(request.receive, urgency.deadline(arrived_at)) as revision:
                revisions.check_name(revision, asked.model)
                jobs = await revision.intake.of(asked)
                with let_go_if_refused(jobs):
                    limits.take_prompts(request.scope, sum(len(job.given_ids) for job in jobs))
                    reply = await translation.reply(revision, body, jobs)
                pending = await revision.open(jobs, arrived_at, revision.tenants.turn(request.scope, urgency))
                limits.follow(request.scope, pending.entries)
        if translation.streamed(body):
            assert isinstance(reply, Reply)
            headers = translation.headers(reply, pending)
            return EventStream(pending, reply.frames(pending), revisions.streams, headers, translation.before_end)
        await pending.finish(request.receive)
        size = sum(entry.answer_size for entry in pending.entries) + translation.answer_size(body)
        response = encoded_response(await off_loop(size, lambda: json_in_parts(reply.whole(pending))))
        if translation.before_end is not None:
            await translation.before_end()
        response.headers.update(translation.headers(reply, pending))
        return response

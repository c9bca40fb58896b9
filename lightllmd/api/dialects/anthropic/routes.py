"""Anthropic's routes."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.anthropic.answer import MessageEvents, MessageHead, blocks, usage
from lightllmd.api.dialects.anthropic.bodies import CountTokensBody, MessagesBody
from lightllmd.api.dialects.anthropic.errors import anthropic_error, anthropic_status, error_frame
from lightllmd.api.dialects.anthropic.models import VERSION_HEADER, ModelList, VersionedRoute
from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.inflight.pending import Pending
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import json_response
from lightllmd.dialogue.parser import Parser, PlainParser
from lightllmd.dialogue.transcript import Transcript
from lightllmd.http.exchange import id_of
from lightllmd.requests.intake import AdmittedJob


class NamedRoute(NamingRoute):
    """A route whose answers tell the request's id as Anthropic's do."""

    def get_route_handler(self):  # type: ignore[no-untyped-def]
        """FastAPI's."""
        handle = super().get_route_handler()

        async def handle_and_name(request: Request) -> Response:
            response = await handle(request)
            response.headers["request-id"] = id_of(request.scope)
            return response

        return handle_and_name


class ModelRoute(VersionedRoute, NamedRoute):
    """Of /v1/models."""


@dataclass(frozen=True)
class MessageReply:
    """Of /v1/messages."""

    head: MessageHead
    parsers: Callable[[], Parser]

    def _transcript(self, pending: Pending) -> Transcript:
        (entry,) = pending.entries
        return Transcript(entry.branches[0], self.parsers())

    def whole(self, pending: Pending) -> dict[str, Any]:
        """See `Reply`."""
        (entry,) = pending.entries
        transcript = self._transcript(pending)
        content = blocks(transcript.take(), self.head.shows_thinking)
        return self.head.message(content, self.head.stop(entry, transcript), usage(entry, transcript))

    def frames(self, pending: Pending) -> MessageEvents:
        """See `Reply`."""
        return MessageEvents(pending, self.head, self._transcript(pending))


async def message_reply(revision: Revision, body: MessagesBody, jobs: Sequence[AdmittedJob]) -> MessageReply:
    """See `Translation`."""
    omitted = body.thinking is not None and body.thinking.display == "omitted"
    head = MessageHead(f"msg_{uuid.uuid4().hex}", revision.model_name, body.max_tokens, not omitted)
    return MessageReply(head, jobs[0].parsers or PlainParser)


MESSAGES = Translation(MessagesBody, MessagesBody.asked, message_reply, lambda body: body.stream, error_frame)


def router(revisions: Revisions) -> APIRouter:
    """Anthropic's routes."""
    routes = APIRouter(prefix="/v1", tags=["anthropic"], route_class=NamedRoute)
    responder = Responder(revisions)
    parse = bodies.parser(revisions.current.http, revisions.decode)
    models = ModelList(revisions)

    @routes.post("/messages", openapi_extra=bodies.documented(MessagesBody))
    async def messages(request: Request) -> Response:
        """Answers a conversation."""
        return await responder.respond(request, MESSAGES)

    @routes.post("/messages/count_tokens", openapi_extra=bodies.documented(CountTokensBody))
    async def count_tokens(request: Request) -> Response:
        """How many tokens the prompt of a conversation has."""
        body = await parse(request, CountTokensBody)
        revision = revisions.current
        revisions.check_name(revision, body.model)
        return json_response({"input_tokens": await revision.count_chat(body.chat(), body.dialogue)})

    async def model_page(request: Request) -> Response:
        """Models, in Anthropic's form."""
        return json_response(models.page(request.query_params))

    async def model(request: Request) -> Response:
        """One of them."""
        return json_response(models.one(request.path_params["name"]))

    # OpenAI's routes of the same paths stand in the OpenAPI document.
    for path, handler in (("/models", model_page), ("/models/{name:path}", model)):
        routes.add_api_route(path, handler, include_in_schema=False, route_class_override=ModelRoute)
    return routes


DIALECT = Dialect(
    ("/v1/messages",),
    anthropic_error,
    (MessagesBody, CountTokensBody),
    router,
    anthropic_status,
    header=VERSION_HEADER,
    names_requests=True,
    name="Anthropic",
)

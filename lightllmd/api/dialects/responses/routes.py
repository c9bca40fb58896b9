"""The routes of the Responses API."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from lightllmd.api.dialects.dialect import Dialect, Responder, Translation
from lightllmd.api.dialects.responses.answering import Answering, conversation, error_frame, input_of, size_of
from lightllmd.api.dialects.responses.bodies import ResponsesBody
from lightllmd.api.dialects.responses.items import Item
from lightllmd.api.dialects.responses.store import Limits, ResponseStore
from lightllmd.api.helpers.texts import off_loop
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.web import bodies
from lightllmd.api.web.errors import openai_error
from lightllmd.api.web.ignored_fields import NamingRoute
from lightllmd.api.web.responses import encoded_response, json_in_parts, json_response
from lightllmd.api.web.tenants import KEY
from lightllmd.config.keys import ApiKey
from lightllmd.config.parameters import HttpSettings
from lightllmd.errors import InvalidRequest, NotFound
from lightllmd.requests.faults import shown

MAX_LISTED = 100
_READING = 12 << 10  # of `off_loop`: a parser reads four tokens while one is copied


def _owner(request: Request) -> bytes:
    """Its API key's holder; all clients are one where there are no keys."""
    key: ApiKey | None = request.scope.get(KEY)
    return b"" if key is None else key.identity.encode()


def _not_found(response: str) -> NotFound:
    return NotFound(f"Response with id {response[:128]!r} not found.", param="response_id")


def router(revisions: Revisions, store: ResponseStore) -> APIRouter:
    """The routes of the Responses API."""
    routes = APIRouter(prefix="/v1/responses", tags=["openai"], route_class=NamingRoute)
    responder = Responder(revisions)
    parse = bodies.parser(revisions.current.http, revisions.decode)

    async def begun(request: Request, body: ResponsesBody) -> Answering:
        return await Answering.begun(body, _owner(request), store, revisions.current.http.max_body_bytes)

    @routes.post("", openapi_extra=bodies.documented(ResponsesBody))
    async def create(request: Request) -> Response:
        """Answers a conversation: its input, behind what the response before it knew."""
        arrived_at = time.monotonic()
        body = await responder.read(request, ResponsesBody)
        with revisions.accounts.admission():
            answering = await begun(request, body)
        translation = Translation(
            ResponsesBody,
            answering.asked,
            answering.reply,
            lambda body: bool(body.stream),
            error_frame,
            answer_size=lambda body: _READING,
            before_end=answering.keep,
        )
        return await responder.answer(request, translation, body, arrived_at)

    @routes.post("/input_tokens", openapi_extra=bodies.documented(ResponsesBody, streams="never"))
    async def input_tokens(request: Request) -> Response:
        """How many tokens the prompt of a response would have."""
        body = await parse(request, ResponsesBody)
        revision = revisions.current
        revisions.check_name(revision, body.model)
        answering = await begun(request, body)
        count = await revision.count_chat(answering.chat, body.dialogue)
        return json_response({"object": "response.input_tokens", "input_tokens": count})

    @routes.get("/{response_id}")
    async def retrieve(request: Request, response_id: str) -> Response:
        """A response that is kept, once it has ended."""
        if request.query_params.get("stream", "false").lower() not in ("false", "0"):
            raise InvalidRequest("stream: a response that is kept is told in one piece", param="stream")
        answer = await store.answer(_owner(request), response_id)
        if answer is None:
            raise _not_found(response_id)
        return encoded_response(answer)

    @routes.delete("/{response_id}")
    async def delete(request: Request, response_id: str) -> Response:
        """Forgets it; what continued it can't be continued any more."""
        if not await store.delete(_owner(request), response_id):
            raise _not_found(response_id)
        return json_response({"id": response_id, "object": "response", "deleted": True})

    @routes.post("/{response_id}/cancel")
    async def cancel(request: Request, response_id: str) -> Response:
        """Refused: it is for responses that are made in the background, of which there are none."""
        if await store.answer(_owner(request), response_id) is None:
            raise _not_found(response_id)
        raise InvalidRequest("Cannot cancel a synchronous response.", param="response_id")

    @routes.get("/{response_id}/input_items")
    async def input_items(
        request: Request,
        response_id: str,
    ) -> Response:
        """What the response was made of: the items of its input, and those of the conversation before it. Of the URL:
        `limit` (1 to 100, 20 unless it says), `order` (desc or asc), `after` (an item's id)."""
        limit, ascending, after = _page_asked(request.query_params)
        links = await store.chain(_owner(request), response_id, revisions.current.http.max_body_bytes)
        if not links:
            raise _not_found(response_id)

        def page() -> bytes:
            items = [*conversation(links[:-1]), *input_of(links[-1])]
            return json_in_parts(listed(items if ascending else items[::-1], after, limit))

        return encoded_response(await off_loop(size_of(links), page))

    return routes


def _page_asked(query: Mapping[str, str]) -> tuple[int, bool, str | None]:
    limit, order = query.get("limit", "20"), query.get("order", "desc")
    if not (limit.isascii() and limit.isdecimal() and len(limit) < 4 and 1 <= int(limit) <= MAX_LISTED):
        raise InvalidRequest(f"limit: should be 1 to {MAX_LISTED}; got {shown(limit)}", param="limit")
    if order not in ("asc", "desc"):
        raise InvalidRequest(f"order: should be 'asc' or 'desc'; got {shown(order)}", param="order")
    return int(limit), order == "asc", query.get("after")


def listed(items: list[Item], after: str | None, limit: int) -> dict[str, Any]:
    """A page of them. Raises InvalidRequest for an `after` that is not among them."""
    first = 0
    if after is not None:
        first = 1 + next((index for index, item in enumerate(items) if item["id"] == after), len(items))
        if first > len(items):
            raise InvalidRequest(f"after: no item has the id {after[:128]!r}", param="after")
    page = items[first : first + limit]
    return {
        "object": "list",
        "data": page,
        "first_id": page[0]["id"] if page else "",
        "last_id": page[-1]["id"] if page else "",
        "has_more": first + limit < len(items),
    }


def dialect(http: HttpSettings, directory: str) -> Dialect:
    """Of a worker that keeps responses in `directory`, see `ResponseStore`."""
    limits = Limits(http.stored_responses, http.stored_responses_bytes, http.stored_responses_ttl)
    store = ResponseStore(directory, limits)
    return Dialect(
        ("/v1/responses",),
        openai_error,
        (ResponsesBody,),
        lambda revisions: router(revisions, store),
        close=store.close,
        name="OpenAI",
    )

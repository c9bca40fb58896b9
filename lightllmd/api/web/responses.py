"""What routes of both dialects share: JSON answers, and one handler for several methods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

_json = msgspec.json.Encoder()
_DEEP = 4  # levels of an answer: choices, one of them, its logprobs, their list
_AT_ONCE = 64  # elements of a list below them, or numbers


def json_response(body: Any, status: int = 200) -> Response:
    """Of a small body."""
    return encoded_response(_json.encode(body), status)


def encoded_response(body: bytes, status: int = 200) -> Response:
    """Of JSON that is ready."""
    return Response(body, status, media_type="application/json")


def json_in_parts(body: Any) -> bytes:
    """The same JSON as in one call, for a thread: no call encodes so much that the others wait long for their turn."""
    return b"".join(_parts(body, 0))


def _parts(value: Any, depth: int) -> Iterator[bytes]:
    if depth < _DEEP and isinstance(value, dict) and value:
        before = b"{"
        for key, item in value.items():
            yield before + _json.encode(key) + b":"
            yield from _parts(item, depth + 1)
            before = b","
        yield b"}"
    elif depth < _DEEP and isinstance(value, list) and value and not isinstance(value[0], (int, float)):
        before = b"["
        for item in value:
            yield before
            yield from _parts(item, depth + 1)
            before = b","
        yield b"]"
    elif isinstance(value, list) and len(value) > _AT_ONCE:
        before = b"["
        for first in range(0, len(value), _AT_ONCE):
            yield before + _json.encode(value[first : first + _AT_ONCE])[1:-1]
            before = b","
        yield b"]"
    else:
        yield _json.encode(value)


def on_each(routes: APIRouter, path: str, methods: list[str], **options: Any) -> Callable[..., Any]:
    """Decorator: a route for each method, so that OpenAPI's operation ids stay unique."""

    def add(handler: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        for method in methods:
            shown = method != "HEAD"
            routes.add_api_route(path, handler, methods=[method], include_in_schema=shown, **options)
        return handler

    return add

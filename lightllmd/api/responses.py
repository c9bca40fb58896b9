"""What routes of both dialects share: JSON answers, and one handler for several methods."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any

import msgspec
from fastapi import APIRouter
from starlette.responses import Response

_json = msgspec.json.Encoder()


def json_response(body: Any, status: int = 200) -> Response:
    return encoded_response(_json.encode(body), status)


def encoded_response(body: bytes, status: int = 200) -> Response:
    """Of JSON that is ready."""
    return Response(body, status, media_type="application/json")


def on_each(routes: APIRouter, path: str, methods: list[str], **options: Any) -> Callable[..., Any]:
    """Decorator: a route for each method, so that OpenAPI's operation ids stay unique."""

    def add(handler: Callable[..., Awaitable[Response]]) -> Callable[..., Awaitable[Response]]:
        for method in methods:
            shown = method != "HEAD"
            routes.add_api_route(path, handler, methods=[method], include_in_schema=shown, **options)
        return handler

    return add

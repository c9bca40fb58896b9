"""The OpenAPI document: what FastAPI knows of the routes, and every status, header and stream that it doesn't."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from fastapi import FastAPI

from lightllmd.api.dialects.dialect import Dialect
from lightllmd.api.documentation.errors import forms, sample
from lightllmd.api.documentation.routes import DocumentedRoute, routes_of
from lightllmd.api.page.routes import STATE_PATH
from lightllmd.api.web.auth import OPEN_PATHS
from lightllmd.api.web.bodies import STREAMS, Streams, schemas
from lightllmd.api.web.errors import ErrorShape, InternalError, Unhealthy, native_error
from lightllmd.api.web.ignored_fields import HEADER as IGNORED_HEADER
from lightllmd.api.web.limits import HEADERS as RATE_HEADERS
from lightllmd.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    HeaderTooLarge,
    InvalidRequest,
    NotFound,
    NotReady,
    QueueFull,
    RateLimited,
    RequestError,
    RequestFailed,
    RequestTimeout,
    Unauthorized,
    UrlTooLong,
)

Errors = tuple[type[RequestError], ...]
# What may go wrong with any request, one that needs a key, one with a body, one whose path or body names something, and
# one that the engine works on.
ANY: Errors = (InvalidRequest, RequestTimeout, UrlTooLong, HeaderTooLarge, InternalError)
KEYED: Errors = (Unauthorized, Forbidden, RateLimited)
WITH_BODY: Errors = (InvalidRequest, BodyTooLarge)
NAMING: Errors = (NotFound,)
COMPUTED: Errors = (QueueFull, RequestFailed, NotReady, DeadlineExceeded)
HEALTH: Errors = (Unhealthy,)

_PAGE = "page"  # tag
_LIVENESS = "/liveness"  # always 200
_OWN = ErrorShape(native_error)  # of the daemon's own routes
_STREAM = "text/event-stream"
HEADERS: dict[str, str] = {
    "X-Request-Id": "The client's own X-Request-Id, or one that was made; the log names it.",
    IGNORED_HEADER: "Fields of the body that are unknown here and were passed over, comma-separated.",
    "Retry-After": "Seconds after which the same request may pass.",
    "WWW-Authenticate": "Bearer.",
    "x-should-retry": "false: the same request will never pass.",
    "request-id": "The same as X-Request-Id, under the name that Anthropic's clients look for.",
    **dict.fromkeys(RATE_HEADERS, "Of the API key, where it has such a limit."),
}


def document(app: FastAPI, dialects: Sequence[Dialect]) -> dict[str, Any]:
    """The whole. `app` need not serve it."""
    made = app.openapi()
    components = made.setdefault("components", {})
    known = components.setdefault("schemas", {})
    known |= schemas([body for dialect in dialects for body in dialect.bodies])
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own, which no route answers with
        known.pop(name, None)
    names = {shape: f"{_camel(name)}Error" for name, shape in forms(dialects).items()}
    names.setdefault(_OWN, "Error")
    known |= {name: _schema_of(sample(shape, InvalidRequest)) for shape, name in names.items()}
    components["headers"] = {
        name: {"description": text, "schema": {"type": "string"}} for name, text in HEADERS.items()
    }
    components["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    for route in routes_of(made["paths"], dialects):
        _complete(route, names)
    return made


def _complete(route: DocumentedRoute, names: dict[ErrorShape, str]) -> None:
    operation = route.operation
    shape = _OWN if route.dialect is None else route.dialect.errors
    streams: Streams = operation.pop(STREAMS, "never")
    keyed = not _is_open(route)
    if keyed:
        operation["security"] = [{}, {"key": []}]
    common = ["X-Request-Id", *(["request-id"] if shape.names_request else [])]
    common += [IGNORED_HEADER] if route.body is not None else []
    answer = operation["responses"]["200"]
    answer["description"] = "The answer."
    answer["headers"] = _headers([*common, *(RATE_HEADERS if keyed else [])])
    if streams != "never":
        stream = {_STREAM: {"schema": {"type": "string", "description": "Server-sent events with JSON as their data."}}}
        answer["content"] = stream if streams == "always" else {**answer.get("content", {}), **stream}
        answer["description"] = (
            "A stream. What goes wrong once it has begun is its last event, in the form of the errors below."
            if streams == "always"
            else "The answer, or a stream where the body asks for one; what goes wrong once that has begun is its last "
            "event, in the form of the errors below."
        )
    operation["responses"].pop("422", None)
    by_status: dict[int, list[type[RequestError]]] = {}
    for kind in dict.fromkeys(_errors(route)):
        by_status.setdefault(shape.status(kind("")), []).append(kind)
    for status, kinds in sorted(by_status.items()):
        told = operation["responses"].setdefault(str(status), {})  # the route itself may say what it answers with
        told["headers"] = _headers([*common, *dict.fromkeys(name for kind in kinds for name in _of_error(kind))])
        if "content" not in told:
            told["description"] = "; ".join(
                f"{kind.__name__}: {' '.join((kind.__doc__ or '').split())}" for kind in kinds
            )
            told["content"] = {
                "application/json": {
                    "schema": {"$ref": f"#/components/schemas/{names[shape]}"},
                    "examples": {kind.__name__: {"value": sample(shape, kind)} for kind in kinds},
                }
            }


def _is_open(route: DocumentedRoute) -> bool:
    """It takes no key."""
    page = _PAGE in route.operation.get("tags", ()) and route.path != STATE_PATH
    return route.path in OPEN_PATHS or page


def _errors(route: DocumentedRoute) -> Iterator[type[RequestError]]:
    yield from ANY
    if route.path in OPEN_PATHS and route.path != _LIVENESS:
        yield from HEALTH
    if not _is_open(route):
        yield from KEYED
    if route.body is not None:
        yield from WITH_BODY
        yield from COMPUTED
    if route.body is not None or "{" in route.path:
        yield from NAMING


def _of_error(kind: type[RequestError]) -> Iterator[str]:
    """The headers that such an answer has, or may have."""
    if issubclass(kind, Unauthorized):
        yield "WWW-Authenticate"
    if issubclass(kind, (RateLimited, DeadlineExceeded)) or kind.retry_after is not None:
        yield "Retry-After"
    if issubclass(kind, RateLimited):
        yield from ("x-should-retry", *RATE_HEADERS)


def _headers(names: Sequence[str]) -> dict[str, Any]:
    return {name: {"$ref": f"#/components/headers/{name}"} for name in names}


def _schema_of(value: Any) -> dict[str, Any]:
    """Of a body that is such a sample, with whatever texts; null stands for a text that may be missing."""
    if isinstance(value, dict):
        properties = {name: _schema_of(inner) for name, inner in value.items()}
        return {"type": "object", "properties": properties, "required": list(value)}
    return {"type": ["string", "null"]} if value is None else {"type": "string"}


def _camel(name: str) -> str:
    return "".join(part for part in name.title() if part.isalnum())

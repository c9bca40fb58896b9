"""What a client is told when something is wrong: each dialect has a shape of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.responses import Response
from starlette.types import Scope

from lightllmd.errors import (
    BodyTooLarge,
    ClientClosed,
    DeadlineExceeded,
    Forbidden,
    InvalidRequest,
    LightllmdError,
    NotFound,
    NotReady,
    QueueFull,
    RateLimited,
    RequestFailed,
    Unauthorized,
)
from lightllmd.http.exchange import id_of

ErrorBody = Callable[[LightllmdError], dict[str, Any]]
ErrorStatus = Callable[[LightllmdError], int]
_OPENAI_TYPES: dict[type[LightllmdError], str] = {
    InvalidRequest: "invalid_request_error",
    BodyTooLarge: "invalid_request_error",
    NotFound: "not_found_error",
    Unauthorized: "authentication_error",
    Forbidden: "permission_error",
    RateLimited: "rate_limit_error",
    QueueFull: "rate_limit_error",
    NotReady: "service_unavailable_error",
    DeadlineExceeded: "timeout_error",
    ClientClosed: "client_closed_error",
}


class MethodNotAllowed(InvalidRequest):
    """The path is there, but not for this method."""

    status = 405


class InternalError(RequestFailed):
    """The front end's own fault."""


class Unhealthy(NotReady):
    """What /health says while no request would be answered."""


def own_status(error: LightllmdError) -> int:
    """The error's."""
    return error.status


def openai_error(error: LightllmdError) -> dict[str, Any]:
    """OpenAI's envelope."""
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(type(error), "server_error" if error.status >= 500 else "invalid_request_error"),
            "param": error.parameters.get("param"),
            "code": error.parameters.get("code"),
        }
    }


def native_error(error: LightllmdError) -> dict[str, Any]:
    """As LightLLM's own API tells it."""
    return {"message": error.message}


@dataclass(frozen=True)
class ErrorShape:
    """How a dialect tells an error."""

    body: ErrorBody
    status: ErrorStatus = own_status
    names_request: bool = False  # by its id: `request_id` in the body, and a header `request-id`


class ErrorAnswers:
    """What is answered instead of what was asked for, in the dialect of the request."""

    def __init__(self, by_path: Mapping[str, ErrorShape], by_header: Mapping[bytes, ErrorShape] | None = None) -> None:
        """By what paths begin with: the longest that fits counts, and "/" where there is no path. `by_header`: by the
        name of a header that tells what the client speaks, whatever the path."""
        self._by_path = sorted(by_path.items(), key=lambda item: -len(item[0]))
        self._by_header = by_header or {}
        self._default = by_path.get("/", ErrorShape(native_error))

    def _at(self, path: str) -> ErrorShape:
        fitting = (shape for beginning, shape in self._by_path if path.startswith(beginning))
        return next(fitting, self._default)

    def _of(self, scope: Scope) -> ErrorShape:
        spoken = (self._by_header[name] for name, _ in scope["headers"] if name in self._by_header)
        return next(spoken, None) or self._at(scope["path"])

    def body(self, error: LightllmdError, path: str) -> bytes:
        """JSON. Of a request of which no more than its path is known."""
        return msgspec.json.encode(self._at(path).body(error))

    def response(self, error: LightllmdError, scope: Scope) -> Response:
        """The whole answer to the request of `scope`."""
        shape = self._of(scope)
        body, headers = shape.body(error), {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
        if isinstance(error, RateLimited) and error.retry_after is None:
            headers["x-should-retry"] = "false"  # OpenAI's and Anthropic's clients try again else
        if shape.names_request:
            headers["request-id"] = body["request_id"] = id_of(scope)
        return Response(msgspec.json.encode(body), shape.status(error), headers, media_type="application/json")

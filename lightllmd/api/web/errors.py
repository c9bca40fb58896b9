"""What a client is told when something is wrong: each dialect has a shape of its own."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import msgspec
from starlette.responses import Response

from lightllmd.errors import (
    BodyTooLarge,
    ClientClosed,
    DeadlineExceeded,
    InvalidRequest,
    LightllmdError,
    NotFound,
    NotReady,
    QueueFull,
    RequestFailed,
    Unauthorized,
)

ErrorBody = Callable[[LightllmdError], dict[str, Any]]
ErrorStatus = Callable[[LightllmdError], int]
_OPENAI_TYPES: dict[type[LightllmdError], str] = {
    InvalidRequest: "invalid_request_error",
    BodyTooLarge: "invalid_request_error",
    NotFound: "not_found_error",
    Unauthorized: "authentication_error",
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


class ErrorAnswers:
    """What is answered instead of what was asked for, in the dialect of the path."""

    def __init__(self, by_path: Mapping[str, tuple[ErrorBody, ErrorStatus]]) -> None:
        """By what paths begin with. The longest that fits counts, and "/" where there is no path."""
        self._by_path = sorted(by_path.items(), key=lambda item: -len(item[0]))
        self._default = by_path.get("/", (native_error, own_status))

    def _shape(self, path: str) -> tuple[ErrorBody, ErrorStatus]:
        fitting = (shape for beginning, shape in self._by_path if path.startswith(beginning))
        return next(fitting, self._default)

    def body(self, error: LightllmdError, path: str) -> bytes:
        """JSON."""
        return msgspec.json.encode(self._shape(path)[0](error))

    def response(self, error: LightllmdError, path: str) -> Response:
        """The whole answer."""
        headers = {}
        if error.retry_after is not None:
            headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
        if isinstance(error, Unauthorized):
            headers["WWW-Authenticate"] = "Bearer"
        status = self._shape(path)[1](error)
        return Response(self.body(error, path), status, headers, media_type="application/json")

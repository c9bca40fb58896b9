"""What a client is told when something is wrong: ``{"message": …}`` on native routes, OpenAI's envelope below /v1."""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable
from typing import Any

import msgspec
from pydantic import ValidationError
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
    Unauthorized,
)

OPENAI_PREFIX = "/v1/"
_SHOWN = 80  # characters of a refused value that a message repeats

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
    status = 405


def openai_error(error: LightllmdError) -> dict[str, Any]:
    return {
        "error": {
            "message": error.message,
            "type": _OPENAI_TYPES.get(type(error), "server_error" if error.status >= 500 else "invalid_request_error"),
            "param": error.parameters.get("param"),
            "code": error.parameters.get("code"),
        }
    }


def error_response(error: LightllmdError, path: str) -> Response:
    body = openai_error(error) if path.startswith(OPENAI_PREFIX) else {"message": error.message}
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    if isinstance(error, Unauthorized):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(msgspec.json.encode(body), error.status, headers, media_type="application/json")


def shown(value: Any) -> str:
    """A refused value as a message may repeat it."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 256:
        return "an integer of more than 77 digits"
    text = repr(value if not isinstance(value, (list, dict)) or len(value) < 100 else type(value).__name__)
    return text if len(text) <= _SHOWN else text[: _SHOWN - 1] + "…"


def nearest(name: str, known: Iterable[str]) -> str:
    """``; did you mean 'x'?``, or the list of what is known."""
    known = sorted(known)
    close = difflib.get_close_matches(name, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"known are {', '.join(known)}"


def from_validation(failure: ValidationError, known: dict[str, Iterable[str]]) -> InvalidRequest:
    """One message that names each field, its value and the bound.

    `known` has the field names of each object by its dotted path ("" is the body).
    """
    messages = []
    first: str | None = None
    for problem in failure.errors(include_url=False, include_context=False)[:8]:
        path = ".".join(str(part) for part in problem["loc"])
        first = first or path
        if problem["type"] == "extra_forbidden":
            parent, _, name = path.rpartition(".")
            messages.append(f"{path}: unknown field; {nearest(name, known.get(parent, ()))}")
        elif problem["type"] == "missing":
            messages.append(f"{path}: required")
        else:
            words = problem["msg"].removeprefix("Value error, ").replace("Input should be", "should be")
            messages.append(f"{path}: {words}; got {shown(problem['input'])}")
    return InvalidRequest("; ".join(messages), param=first)

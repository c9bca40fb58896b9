"""What a client of Text Generation Inference is told when something is wrong: `error` and `error_type`, which its
clients make their exceptions of, and the status that goes with them."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from lightllmd.api.web.errors import InternalError, Unhealthy
from lightllmd.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    Forbidden,
    HeaderTooLarge,
    InvalidRequest,
    LightllmdError,
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

INCOMPLETE = "incomplete_generation"


class _Kind(NamedTuple):
    name: str  # the `error_type`
    status: int | None = None  # None: the error's own, which TGI has no word for
    before: str = ""  # what the message begins with


_VALIDATION = "validation"
_OVERLOADED = "overloaded"
# The most special class first. 422, 424, 429 and 500 are the statuses that TGI documents.
_KINDS: dict[type[LightllmdError], _Kind] = {
    Unhealthy: _Kind("healthcheck", before="unhealthy: "),
    InternalError: _Kind(INCOMPLETE, 500),
    RequestFailed: _Kind("generation", 424, "Request failed during generation: "),
    QueueFull: _Kind(_OVERLOADED, 429, "Model is overloaded: "),
    NotReady: _Kind(_OVERLOADED, before="Model is overloaded: "),
    DeadlineExceeded: _Kind("timeout"),
    RequestTimeout: _Kind("timeout"),
    RateLimited: _Kind(_OVERLOADED, 429),
    Unauthorized: _Kind("unauthorized"),
    Forbidden: _Kind("forbidden"),
    NotFound: _Kind("not_found"),
    BodyTooLarge: _Kind(_VALIDATION),
    UrlTooLong: _Kind(_VALIDATION),
    HeaderTooLarge: _Kind(_VALIDATION),
    InvalidRequest: _Kind(_VALIDATION, 422, "Input validation error: "),
}
_OTHER = _Kind(INCOMPLETE, 500)


def _kind(error: LightllmdError) -> _Kind:
    if type(error).status == 405:
        return _Kind(_VALIDATION)
    return next((kind for known, kind in _KINDS.items() if isinstance(error, known)), _OTHER)


def tgi_error(error: LightllmdError) -> dict[str, Any]:
    """TGI's ErrorResponse."""
    kind = _kind(error)
    return {"error": kind.before + error.message, "error_type": kind.name}


def tgi_status(error: LightllmdError) -> int:
    """As TGI documents it, where it does."""
    return _kind(error).status or error.status


def error_frame(error: RequestError) -> bytes:
    """The end of a stream that has begun and can't go on."""
    return b"data:%b\n\n" % msgspec.json.encode(tgi_error(error))


def broken_off(error: RequestError | None) -> bytes:
    """The end of a stream whose answer is broken off from our side, with some of its tokens told."""
    reason = f": {error.message}" if error is not None else ""
    return b"data:%b\n\n" % msgspec.json.encode({"error": f"Incomplete generation{reason}", "error_type": INCOMPLETE})

"""What Anthropic's clients are told when something is wrong: the type that they make their exceptions of, and the
status that goes with it."""

from __future__ import annotations

from typing import Any, NamedTuple

import msgspec

from lightllmd.errors import (
    BodyTooLarge,
    DeadlineExceeded,
    LightllmdError,
    NotFound,
    NotReady,
    QueueFull,
    RequestError,
    RequestTimeout,
    Unauthorized,
)

_TOO_LONG = "prompt is too long"  # by these words clients know that they have to shorten a conversation
OVERLOADED = 529  # what Anthropic's servers answer instead of 503


class _Kind(NamedTuple):
    name: str
    status: int | None = None  # None: the error's own


_KINDS: dict[type[LightllmdError], _Kind] = {
    Unauthorized: _Kind("authentication_error"),
    NotFound: _Kind("not_found_error"),
    BodyTooLarge: _Kind("request_too_large"),
    QueueFull: _Kind("rate_limit_error"),
    NotReady: _Kind("overloaded_error", OVERLOADED),
    DeadlineExceeded: _Kind("timeout_error"),
    RequestTimeout: _Kind("timeout_error"),
}
_BY_STATUS = {403: _Kind("permission_error"), 503: _Kind("overloaded_error", OVERLOADED)}


def _kind(error: LightllmdError) -> _Kind:
    known = next((kind for cls, kind in _KINDS.items() if isinstance(error, cls)), None) or _BY_STATUS.get(error.status)
    if known is not None:
        return known
    return _Kind("invalid_request_error" if 400 <= error.status < 500 else "api_error")


def anthropic_error(error: LightllmdError) -> dict[str, Any]:
    """Anthropic's ErrorResponse."""
    too_long = error.parameters.get("code") == "context_length_exceeded"
    message = f"{_TOO_LONG}: {error.message}" if too_long else error.message
    return {"type": "error", "error": {"type": _kind(error).name, "message": message}}


def anthropic_status(error: LightllmdError) -> int:
    """As Anthropic documents it, where it does."""
    return _kind(error).status or error.status


def error_frame(error: RequestError) -> bytes:
    """The end of a stream that has begun and can't go on."""
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(anthropic_error(error))

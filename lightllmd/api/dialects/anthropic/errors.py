"""What Anthropic's clients are told when something is wrong: the type that they make their exceptions of, and the
status that goes with it."""

from __future__ import annotations

from typing import Any

import msgspec

from lightllmd.errors import LightllmdError, RequestError

_TOO_LONG = "prompt is too long"  # by these words clients know that they have to shorten a conversation
_STATUS = {503: 529}  # what Anthropic's servers answer instead
_TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    413: "request_too_large",
    429: "rate_limit_error",
    504: "timeout_error",
    529: "overloaded_error",
}


def anthropic_error(error: LightllmdError) -> dict[str, Any]:
    """Anthropic's ErrorResponse."""
    too_long = error.parameters.get("code") == "context_length_exceeded"
    message = f"{_TOO_LONG}: {error.message}" if too_long else error.message
    return {"type": "error", "error": {"type": _type(anthropic_status(error)), "message": message}}


def anthropic_status(error: LightllmdError) -> int:
    """As Anthropic documents it, where it does."""
    return _STATUS.get(error.status, error.status)


def _type(status: int) -> str:
    return _TYPES.get(status, "invalid_request_error" if status < 500 else "api_error")


def error_frame(error: RequestError) -> bytes:
    """The end of a stream that has begun and can't go on."""
    return b"event: error\ndata: %b\n\n" % msgspec.json.encode(anthropic_error(error))

"""What a control request says: its body, its query and its path, checked. Everything here raises Usage."""

from __future__ import annotations

from typing import Any

import msgspec
from starlette.requests import Request

from lightllmd.config.tables import YEAR
from lightllmd.errors import BodyTooLarge, Usage

LONGEST_BODY = 1 << 20  # bytes
LONGEST_TEXT = 4096  # bytes of a name or path


async def body(request: Request, known: set[str]) -> dict[str, Any]:
    """The JSON object of a request; no body is an empty one. Raises BodyTooLarge, Usage."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > LONGEST_BODY:
            raise BodyTooLarge(f"the body is larger than {LONGEST_BODY} bytes", limit=LONGEST_BODY)
    try:
        parsed = msgspec.json.decode(body, type=dict[str, Any]) if body.strip() else {}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as wrong:
        raise Usage(f"the body is not a JSON object: {wrong}") from None
    if unknown := sorted(set(parsed) - known):
        raise Usage(f"unknown {', '.join(unknown)}; known: {', '.join(sorted(known)) or 'nothing'}")
    return parsed


def boolean(body: dict[str, Any], name: str) -> bool:
    """That field of a body; False where it is missing."""
    value = body.get(name, False)
    if not isinstance(value, bool):
        raise Usage(f"{name} is true or false")
    return value


def text(body: dict[str, Any], name: str) -> str | None:
    """That field of a body, at most LONGEST_TEXT bytes; None where it is missing."""
    value = body.get(name)
    if value is not None and not isinstance(value, str):
        raise Usage(f"{name} is a string")
    if value is not None and len(value.encode()) > LONGEST_TEXT:
        raise Usage(f"{name} has {len(value.encode())} bytes: at most {LONGEST_TEXT}")
    return value


def seconds(body: dict[str, Any], name: str) -> float | None:
    """That field of a body, 0 to a year; None where it is missing."""
    value = body.get(name)
    if value is not None and (type(value) not in (int, float) or not 0 <= value <= YEAR):
        raise Usage(f"{name} is a number of seconds from 0 to {YEAR:.0f}")
    return value


async def worker(request: Request) -> str:
    """The body's only field; empty: all workers."""
    return text(await body(request, {"worker"}), "worker") or ""


def switch(request: Request, name: str) -> bool:
    """Whether that query parameter is on; it is off where it is missing."""
    value = request.query_params.get(name, "")
    if value.lower() in ("", "0", "false", "no"):
        return False
    if value.lower() in ("1", "true", "yes"):
        return True
    raise Usage(f"{name}={value}: 1 or 0")


def number(request: Request) -> int:
    """The id in the path; -1, which nothing has, where it is no number."""
    number = digits(request.path_params["id"])
    return -1 if number is None else number


def digits(text: str) -> int | None:
    """A number from 0 up that isn't absurdly long; None: it is none."""
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 16 else None


def count(request: Request, name: str, default: int) -> int:
    """That query parameter, a number of lines."""
    value = request.query_params.get(name, str(default))
    count = digits(value)
    if count is None:
        raise Usage(f"{name}={value}: a number of lines from 0 up")
    return count

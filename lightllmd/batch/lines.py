"""The lines of a batch: what comes in, what goes out, and which are done."""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import msgspec

from lightllmd.errors import InvalidRequest

MAX_LINE = 64 << 20  # bytes
_CHUNK = 1 << 20

_json = msgspec.json.Encoder()


class Line(msgspec.Struct, frozen=True):
    """One request of an input file, as OpenAI documents it. `body` is looked at later."""

    custom_id: str
    url: str
    body: msgspec.Raw
    method: str = "POST"


class _Done(msgspec.Struct, frozen=True):
    custom_id: str | None = None


def read(file: BinaryIO) -> Iterator[tuple[int, Line | InvalidRequest]]:
    """Each line with its number from 1 on; empty ones are passed over. One at a time is held."""
    for number in _counting():
        raw = file.readline(MAX_LINE + 1)
        if not raw:
            return
        if len(raw) > MAX_LINE:
            while raw and not raw.endswith(b"\n"):
                raw = file.readline(_CHUNK)
            yield number, InvalidRequest(f"line {number}: more than {MAX_LINE} bytes")
        elif raw.strip():
            yield number, _line(raw, number)


def _counting() -> Iterator[int]:
    number = 0
    while True:
        number += 1
        yield number


def _line(raw: bytes, number: int) -> Line | InvalidRequest:
    try:
        return msgspec.json.decode(raw, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as fault:
        return InvalidRequest(f"line {number}: {fault}")


def count(path: Path) -> int:
    """Lines, about: of a progress bar."""
    with path.open("rb") as file:
        return sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(_CHUNK), b""))


class Results:
    """The output file. What an earlier run wrote stays; a line that it left incomplete is cut off."""

    def __init__(self, path: Path) -> None:
        """Raises OSError."""
        self._done: set[bytes] = set()  # digests of the requests' ids
        self._file = path.open("ab+")
        self._file.seek(0)
        end = 0
        for raw in iter(lambda: self._file.readline(), b""):
            if not raw.endswith(b"\n"):
                break
            end += len(raw)
            self._note(raw)
        self._file.truncate(end)
        self._file.seek(0, os.SEEK_END)

    def _note(self, raw: bytes) -> None:
        try:
            known = msgspec.json.decode(raw, type=_Done).custom_id
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
            return
        if known is not None:
            self._done.add(_digest(known))

    def add(self, custom_id: str) -> bool:
        """False: one of this id is there already, or on its way."""
        digest = _digest(custom_id)
        if digest in self._done:
            return False
        self._done.add(digest)
        return True

    def answer(self, custom_id: str, status: int, body: Any) -> None:
        """What an HTTP route would have answered."""
        response = {"status_code": status, "request_id": uuid.uuid4().hex, "body": body}
        self._write(custom_id, response, None)

    def refuse(self, custom_id: str | None, code: str, message: str) -> None:
        """A line that is no request."""
        self._write(custom_id, None, {"code": code, "message": message})

    def _write(self, custom_id: str | None, response: dict[str, Any] | None, error: dict[str, str] | None) -> None:
        line = {
            "id": f"batch_req_{uuid.uuid4().hex}",
            "custom_id": custom_id,
            "response": response,
            "error": error,
        }
        self._file.write(_json.encode(line) + b"\n")

    def flush(self) -> None:
        """What was written survives this process."""
        self._file.flush()

    def close(self) -> None:
        """And the machine."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _digest(custom_id: str) -> bytes:
    return hashlib.blake2b(custom_id.encode(errors="surrogatepass"), digest_size=16).digest()

"""Reads one HTTP/1.1 answer as it arrives: a stream of server-sent events, or an error with its body.

Written for a client that holds hundreds of streams: no task, no copy and one JSON decoding per event.
"""

from __future__ import annotations

from typing import Any

import msgspec

MAX_HEAD = 64 << 10  # bytes
DONE = b"[DONE]"


class Record(msgspec.Struct):
    """What became of one request. Times in seconds of the monotonic clock."""

    asked: int  # new tokens
    start: float  # when it was due
    end: float = 0.0
    times: list[float] = []  # one per event that carried tokens; those that were read together share a time
    tokens: int = 0  # new ones, as the server counts them where it does
    prompt_tokens: int = 0
    failure: str = ""  # its kind: "connect", "http 429", …; empty: the answer is complete
    detail: str = ""  # of the failure


class _Token(msgspec.Struct):
    prompt_tokens: int = 0


class _Choice(msgspec.Struct):
    finish_reason: str | None = None


class _Usage(msgspec.Struct):
    completion_tokens: int = 0
    prompt_tokens: int = 0


class _Event(msgspec.Struct):
    """The fields of interest, of OpenAI's chunks and of the native frames."""

    choices: list[_Choice] | None = None
    usage: _Usage | None = None
    token: _Token | None = None
    finish_reason: str | None = None
    error: Any = None
    message: Any = None


_event = msgspec.json.Decoder(_Event).decode


class MalformedAnswer(Exception):
    """What came is no HTTP, or no events."""


class StreamAnswer:
    """Fills `record`. `reusable` says, once it is complete, whether the connection may carry another request."""

    def __init__(self, record: Record) -> None:
        self.record = record
        self.reusable = False
        self._status = 0  # 0: the head is not complete
        self._chunked = False
        self._left: int | None = None  # bytes of a body of known length; None: of any
        self._waiting = b""  # an incomplete head or chunk
        self._line = b""  # an incomplete line of events, or the body of an error
        self._finished = False  # the server said why the generation ended
        self._counted = False  # the server said how many tokens there were

    @property
    def untouched(self) -> bool:
        """Not a byte of it came."""
        return not (self._status or self._waiting)

    def feed(self, data: bytes, now: float) -> bool:
        """True: the answer is complete. Raises MalformedAnswer."""
        if self._waiting:
            data, self._waiting = self._waiting + data, b""
        while not self._status:
            end = data.find(b"\r\n\r\n")
            if end < 0:
                if len(data) > MAX_HEAD:
                    raise MalformedAnswer("a head without an end")
                self._waiting = data
                return False
            self._read_head(data[:end])
            data = data[end + 4 :]
        if self._chunked:
            complete = self._read_chunks(data, now)
        else:
            if self._left is not None:
                data = data[: self._left]
                self._left -= len(data)
            self._read_body(data, now)
            complete = self._left == 0
        if complete:
            self._complete(now)
        return complete

    def closed(self, now: float) -> None:
        """The connection ended before `feed` said that the answer was complete."""
        if self._status and not self._chunked and self._left is None:
            self._complete(now)
        else:
            self._fail("connection lost", f"after {len(self.record.times)} events")
            self.record.end = now

    # --- HTTP ---------------------------------------------------------------------------------------------------

    def _read_head(self, head: bytes) -> None:
        first, *lines = head.split(b"\r\n")
        words = first.split(None, 2)
        if len(words) < 2 or not words[0].startswith(b"HTTP/1.") or not words[1].isdigit():
            raise MalformedAnswer(f"no HTTP/1: {first[:40]!r}")
        status = int(words[1])
        if status < 200:  # an interim answer; the real one follows
            return
        self._status, self.reusable = status, words[0] != b"HTTP/1.0"
        for line in lines:
            name, _, value = line.partition(b":")
            name, value = name.strip().lower(), value.strip().lower()
            if name == b"transfer-encoding":
                self._chunked = value.endswith(b"chunked")
            elif name == b"content-length" and value.isdigit():
                self._left = int(value)
            elif name == b"connection" and value == b"close":
                self.reusable = False
        if self._chunked:
            self._left = None
        elif self._left is None:
            self.reusable = False

    def _read_chunks(self, data: bytes, now: float) -> bool:
        """True: the last chunk was among them."""
        position = 0
        while True:
            end = data.find(b"\r\n", position)
            if end < 0:
                break
            try:
                size = int(data[position:end].partition(b";")[0], 16)
            except ValueError:
                raise MalformedAnswer(f"no chunk size: {data[position:end][:40]!r}") from None
            if not size:
                if data.find(b"\r\n\r\n", end) < 0:
                    break
                return True
            stop = end + 2 + size
            if len(data) < stop + 2:
                break
            self._read_body(data[end + 2 : stop], now)
            position = stop + 2
        self._waiting = data[position:]
        return False

    # --- events -------------------------------------------------------------------------------------------------

    def _read_body(self, data: bytes, now: float) -> None:
        if self._status != 200:
            self._line += data
            return
        *lines, self._line = (self._line + data).split(b"\n")
        for line in lines:
            if line.startswith(b"data:"):
                self._read_event(line[5:], now)

    def _read_event(self, data: bytes, now: float) -> None:
        if data.strip() == DONE:
            return
        try:
            event = _event(data)
        except msgspec.MsgspecError as error:
            raise MalformedAnswer(f"an event that is none: {error}: {data[:80]!r}") from None
        record = self.record
        if event.token is not None:
            record.times.append(now)
            record.tokens += 1
            record.prompt_tokens = event.token.prompt_tokens
            self._counted = True
            self._finished = self._finished or event.finish_reason is not None
        elif event.choices:
            record.times.append(now)
            self._finished = self._finished or event.choices[0].finish_reason is not None
        elif event.error is not None or event.message is not None:
            self._fail("error in the stream", _said(data))
        if event.usage is not None:
            record.tokens, record.prompt_tokens = event.usage.completion_tokens, event.usage.prompt_tokens
            self._counted = True

    def _complete(self, now: float) -> None:
        record = self.record
        record.end = now
        if self._status != 200:
            self._fail(f"http {self._status}", _said(self._line))
        elif not self._finished:
            self._fail("unfinished", f"the stream ended after {len(record.times)} events without a finish_reason")
        if not self._counted:
            record.tokens = len(record.times)

    def _fail(self, kind: str, detail: str) -> None:
        """The first failure is the one that counts."""
        if not self.record.failure:
            self.record.failure, self.record.detail = kind, detail[:200]


def _said(body: bytes) -> str:
    """The message of an error, OpenAI's (``{"error": {"message": …}}``) or a flat one, else its beginning as it is."""
    try:
        said: Any = msgspec.json.decode(body)
    except msgspec.MsgspecError:
        return body[:200].decode(errors="replace")
    for name in ("error", "message"):
        said = said.get(name, said) if isinstance(said, dict) else said
    return said if isinstance(said, str) else body[:200].decode(errors="replace")

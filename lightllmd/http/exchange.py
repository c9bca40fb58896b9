"""One request and its answer, as an ASGI application sees them."""

from __future__ import annotations

import asyncio
import logging
import re
import secrets
from http import HTTPStatus
from typing import Any, Protocol

from starlette.types import ASGIApp, Message, Scope

from lightllmd.errors import LightllmdError, RequestFailed, RequestTimeout
from lightllmd.http.bounds import HIGH_WATER
from lightllmd.http.traffic import Traffic, pace

log = logging.getLogger(__name__)

PREFIX = b"HTTP/1.1 "  # of any answer
REQUEST_ID = b"x-request-id"
_LONGEST_ID = 128
_NOT_IN_AN_ID = re.compile(rb"[^A-Za-z0-9._:/+=@,-]")
_STATUS = {status.value: b"%d %b\r\n" % (status.value, status.phrase.encode()) for status in HTTPStatus}
_NOT_IN_A_HEADER = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_BODILESS = (204, 304)


def request_id(given: bytes) -> bytes:
    """The client's name for its request, less what doesn't belong into a header or a log; else one of ours."""
    return _NOT_IN_AN_ID.sub(b"", given)[:_LONGEST_ID] or secrets.token_hex(16).encode()


def head(status: int, headers: list[tuple[bytes, bytes]]) -> list[bytes]:
    """The parts of a status line, without PREFIX, and of header lines. Raises ValueError for what none may contain."""
    parts = [_STATUS.get(status) or b"%d \r\n" % status]
    for name, value in headers:
        if _NOT_IN_A_HEADER.search(value) or _NOT_IN_A_HEADER.search(name):
            raise ValueError(f"{name!r}: {value!r} is no header")
        parts += (name, b": ", value, b"\r\n")
    return parts


class AnsweringConnection(Protocol):
    """The connection of an exchange, as the exchange sees it."""

    traffic: Traffic
    transport: asyncio.Transport
    server_headers: Any  # gives the header lines of every answer
    write_paused: bool  # the client reads more slowly than is written

    def write(self, data: bytes) -> None:
        """Sends `data`, or buffers it."""

    async def writable(self) -> None:
        """Waits while `write_paused`."""

    def pace_reading(self) -> None:
        """Reads on unless enough is there already."""

    def answered(self, exchange: Exchange) -> None:
        """The answer of `exchange` is complete."""

    def refuse(self, error: LightllmdError, what: str, exchange: Exchange | None = None) -> None:
        """Answers `error` where that is still possible, and ends the connection. `what`: which bound was reached."""


class Exchange:
    """Its connection fills in the body and says when the client is gone; the application calls `receive` and `send`."""

    __slots__ = (
        "_body",
        "_chunked",
        "_flows",
        "_has_body",
        "_head",
        "_left",
        "_news",
        "_probed",
        "_probes_left",
        "_told",
        "begun",
        "connection",
        "ended",
        "expects_continue",
        "gone",
        "held",
        "id",
        "keep_alive",
        "received",
        "scope",
        "started",
        "whole",
    )

    def __init__(
        self,
        connection: AnsweringConnection,
        scope: Scope,
        given_id: bytes,
        keep_alive: bool,
        expects_continue: bool,
        now: float,
    ) -> None:
        self.connection = connection
        self.scope = scope
        self.id = request_id(given_id)
        self.keep_alive = keep_alive
        self.expects_continue = expects_continue
        self.begun = now  # loop time: when its header was complete, later by what we didn't read
        self.received = 0  # bytes of the body
        self.held = 0  # of them, counted in `Bodies`
        self.whole = False  # the body is complete
        self.gone = False  # no client gets an answer any more
        self.started = False  # status and headers are decided
        self.ended = False  # the answer is complete
        self._body = bytearray()  # not yet received by the application
        self._told = False  # the application knows that the body is complete
        self._news = asyncio.Event()
        self._chunked = False
        self._flows = False  # in the middle of an answer in chunks
        self._has_body = True
        self._left: int | None = None  # bytes of the answer that Content-Length still promises
        self._head = b""  # status line and header lines that are not sent yet
        self._probed = 0
        self._probes_left = len(PREFIX)

    # --- the connection's side ------------------------------------------------------------------------------------

    def feed(self, body: bytes) -> None:
        """More of the body."""
        self._body += body
        self._news.set()

    def complete(self) -> None:
        """All of the body is there."""
        self.whole = True
        self._news.set()

    def lose(self) -> None:
        """The client is gone, or won't get this answer."""
        self.gone, self._flows = True, False
        self.release_body()
        self._body.clear()
        self._news.set()

    @property
    def overfull(self) -> bool:
        """More of the body waits for the application than should."""
        return len(self._body) > HIGH_WATER

    def pace(self, now: float) -> float:
        """Bytes per second at which its body comes; without bound while it is too young to tell."""
        return pace(self.received, now - self.begun)

    def crowd_out(self) -> None:
        """Its body comes too slowly to take memory that others need."""
        self.connection.refuse(
            RequestTimeout("the body came too slowly while others needed the memory", retry_after=1.0),
            "slow bodies given up, as others needed their memory",
            self,
        )
        self.lose()

    @property
    def probed(self) -> int:
        """Bytes of PREFIX that are sent already."""
        return self._probed

    def probe(self) -> bool:
        """Sends a byte that changes nothing, to which the host of a client that is gone answers with a reset: one of
        the status line, ahead of the rest, or a zero before the length of the next chunk. False: there is none."""
        if self._probes_left == 0 or self._head or (self.started and not self._chunked):
            return False
        self._probes_left -= 1
        if self.started:
            self.connection.write(b"0")
        else:
            self.connection.write(PREFIX[self._probed : self._probed + 1])
            self._probed += 1
        return True

    # --- the application's side -----------------------------------------------------------------------------------

    async def run(self, app: ASGIApp) -> None:
        """Lets `app` answer it. An application that fails or stops early is answered for."""
        connection = self.connection
        try:
            await app(self.scope, self.receive, self.send)
        except asyncio.CancelledError:
            connection.transport.abort()
            raise
        except Exception:
            log.exception("request %s: %s", self.id.decode(), self.scope["path"])
        if self.ended or self.gone:
            return
        if self.started:
            connection.transport.close()  # cut, so that the client can tell
        else:
            connection.refuse(RequestFailed("internal error of the HTTP server"), "", self)

    async def receive(self) -> Message:
        """ASGI's: the next part of the body, or http.disconnect."""
        if self.expects_continue and not (self.started or self.gone):
            self.expects_continue = False
            self.connection.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        while not (self.gone or self.ended):
            if self._body or (self.whole and not self._told):
                body, self._told = bytes(self._body), self.whole
                self._body.clear()
                self.connection.pace_reading()
                return {"type": "http.request", "body": body, "more_body": not self._told}
            self._news.clear()
            await self._news.wait()
        return {"type": "http.disconnect"}

    def release_body(self) -> None:
        """The application keeps no byte of it any more."""
        if self.held:
            self.connection.traffic.bodies.release(self)

    async def send(self, message: Message) -> None:
        """ASGI's: the head or a part of the answer. Waits while the client reads too slowly; raises RuntimeError for an
        answer that is not as it was begun."""
        connection = self.connection
        if connection.write_paused and not self.gone:
            await connection.writable()
        if self._flows and message.get("more_body") and (body := message["body"]):
            connection.write(b"%x\r\n%b\r\n" % (len(body), body))
            return
        if self.gone:
            return
        if not self.started:
            self._head = self._start(message)
            return
        if self.ended:
            raise RuntimeError("the answer is complete already")
        body = message.get("body", b"")
        last = not message.get("more_body", False)
        if self._left is not None:
            self._left -= len(body)
            if self._left < 0 or (last and self._left and self._has_body):
                raise RuntimeError("the answer's length is not what Content-Length says")
        if not self._has_body:
            body = b""
        elif self._chunked:
            if body:
                body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if last else b"%x\r\n%b\r\n" % (len(body), body)
            elif last:
                body = b"0\r\n\r\n"
        if self._head:  # leaves with what follows it
            body, self._head = self._head + body, b""
            self._flows = self._chunked
        if body:
            connection.write(body)
        if last:
            self.ended, self._flows = True, False
            self._news.set()
            connection.answered(self)

    def _start(self, message: Message) -> bytes:
        if message["type"] != "http.response.start":
            raise RuntimeError(f"{message['type']} before http.response.start")
        connection, status = self.connection, message["status"]
        headers: list[tuple[bytes, bytes]] = [*connection.server_headers(), (REQUEST_ID, self.id)]
        chunked = None
        for name, value in message.get("headers", ()):
            match name := name.lower():
                case b"content-length":
                    self._left = int(value)
                case b"connection":
                    if b"close" in value.lower():
                        self.keep_alive = False
                    continue
                case b"transfer-encoding":
                    chunked = value
                    continue
                case b"x-request-id":
                    continue
            headers.append((name, value))
        self._has_body = self.scope["method"] != "HEAD" and status not in _BODILESS
        if chunked is not None or self._left is None:
            self._left = None
            # A client of HTTP/1.0 knows no chunks: the end of the connection is the end of the answer.
            self._chunked = self._has_body and self.scope["http_version"] != "1.0"
            if self._chunked:
                headers.append((b"transfer-encoding", b"chunked"))
            elif self._has_body:
                self.keep_alive = False
        if connection.traffic.retired or self.expects_continue:
            self.keep_alive = False  # a body that waits for "100 Continue" may come or not
        if not self.keep_alive:
            headers.append((b"connection", b"close"))
        parts = head(status, headers)
        self.started = True
        return b"".join([PREFIX[self._probed :], *parts, b"\r\n"])


def release_body(scope: Scope) -> None:
    """Says that the body of this request has been decoded, and that its bytes are kept no more."""
    exchange: Any = scope.get("lightllmd.exchange")
    if exchange is not None:
        exchange.release_body()


def id_of(scope: Scope) -> str:
    """What the request is called, in its answer's `x-request-id` too where this server answers it."""
    exchange: Any = scope.get("lightllmd.exchange")
    return (request_id(b"") if exchange is None else exchange.id).decode()

"""From the bytes of one connection to its requests: bounded before anything is kept.

What comes is handed to the parser in pieces that end where a header ends, and with the last byte of a body, so that no
more than one request is parsed at a time, and nothing is parsed of which the bounds don't allow a byte more.
"""

from __future__ import annotations

import asyncio
from typing import Protocol
from urllib.parse import unquote

import httptools
from starlette.types import Scope

from lightllmd.errors import (
    BodyTooLarge,
    HeaderTooLarge,
    InvalidRequest,
    LightllmdError,
    NotReady,
    UrlTooLong,
)
from lightllmd.http import bounds as limits
from lightllmd.http.exchange import AnsweringConnection, Exchange

_HEAD_END = b"\r\n\r\n"
_PIECE = 8 << 10  # bytes of a body in chunks, parsed at a time
_QUEUE = 16  # requests that one piece may hold beside the one that is answered


class ReadingConnection(AnsweringConnection, Protocol):
    """The connection of a reader, as the reader sees it."""

    loop: asyncio.AbstractEventLoop
    answering: Exchange | None  # the request that is being answered

    @property
    def queued(self) -> int:
        """How many requests wait behind the one that is being answered."""

    def begin(self, request: Scope, given_id: bytes, keep_alive: bool, expects_continue: bool) -> None:
        """The header of a request is complete."""

    def complete(self, exchange: Exchange) -> None:
        """All of a request is there."""


class Reader:
    """Tells its connection of requests that begin and are complete, and of what has to be refused."""

    def __init__(self, connection: ReadingConnection) -> None:
        self._connection = connection
        self.pending = b""  # read, not parsed
        self.stopped = False
        self.in_turn = False  # the parsing goes on in `Traffic.turns`
        self.receiving: Exchange | None = None  # whose body is coming
        self.url = b""
        self.given_id = b""  # of X-Request-Id

        self._parser = httptools.HttpRequestParser(self)
        self._fault: LightllmdError | None = None  # raised in a callback of the parser
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._length = 0  # Content-Length
        self._body_chunked = False
        self._expects_continue = False
        self._left = 0  # bytes of a body with Content-Length that are still to come
        self._unparsed_body = False  # of a request that asks for an upgrade, where the parser sees none
        self._framing = 0  # bytes of a body in chunks that belong to no chunk

    def feed(self, data: bytes) -> None:
        """More bytes from the client."""
        self.pending = self.pending + data if self.pending else data
        if not self.in_turn:
            self.parse()

    def parse(self) -> None:
        """Parses what is there, as far as it may be now."""
        while self.pending and not self.stopped:
            if self.receiving is None:
                if self._connection.answering is not None:
                    break  # one request after the other
                self._parse_head()
            elif self._in_chunks:
                if len(self.pending) > _PIECE:
                    self.in_turn = True
                    self._connection.traffic.turns.add(self.turn)
                    break
                self._parse_chunks()
            else:
                self._parse_body()
        self._connection.pace_reading()

    def turn(self) -> bool:
        """A piece of a body in chunks; whether there is another."""
        if self._in_chunks:
            self._parse_chunks()
            if self._in_chunks and len(self.pending) > _PIECE:
                return True
        self.in_turn = False
        self.parse()
        return False

    @property
    def _in_chunks(self) -> bool:
        """A body is coming of which only the parser knows where it ends."""
        return self.receiving is not None and not self.stopped and (self._body_chunked or self._left <= 0)

    def _take(self, size: int) -> bytes:
        piece, self.pending = self.pending[:size], self.pending[size:]
        return piece

    def _parse_head(self) -> None:
        end = self.pending.find(_HEAD_END) + len(_HEAD_END)
        size = end if end >= len(_HEAD_END) else len(self.pending)
        piece = self._take(min(size, limits.MAX_HEAD + 1 - self._head_bytes))
        self._head_bytes += len(piece)
        self._feed(piece)
        if self.receiving is None and self._connection.answering is None and self._head_bytes > limits.MAX_HEAD:
            self._too_large(f"the header is larger than {limits.MAX_HEAD} bytes")

    def _parse_body(self) -> None:
        piece = self._take(self._left)
        if not self._unparsed_body:
            self._feed(piece)
            return
        self.on_body(piece)
        if not self._left:
            self._unparsed_body = False
            self.on_message_complete()

    def _parse_chunks(self) -> None:
        exchange = self.receiving
        assert exchange is not None
        received = exchange.received
        piece = self._take(_PIECE)
        self._framing += len(piece)
        self._feed(piece)
        self._framing -= exchange.received - received
        if self._framing > limits.MAX_FRAMING and not self.stopped:
            message = f"the body has more than {limits.MAX_FRAMING} bytes of chunk extensions and trailers"
            self._connection.refuse(BodyTooLarge(message), "requests refused for the framing of their body", exchange)

    def _feed(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            # None is made: the connection goes on as it is, with what may follow.
            self._parser = httptools.HttpRequestParser(self)
            self.pending = piece[upgrade.args[0] :] + self.pending
        except httptools.HttpParserError as failure:
            fault, self._fault = self._fault, None
            if fault is not None:
                self._connection.refuse(fault, "requests refused for their header")
            elif not self.stopped:
                self._connection.refuse(
                    InvalidRequest(f"this is not HTTP: {failure}"), "requests refused that are not HTTP"
                )

    def _too_large(self, message: str) -> None:
        self._connection.refuse(HeaderTooLarge(message), "requests refused for their header")

    # --- the parser's calls ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """The parser's call: a request begins."""
        self.url, self._headers, self.given_id = b"", [], b""
        self._length, self._body_chunked, self._expects_continue = 0, False, False
        if self._connection.queued >= _QUEUE:
            self._raise(InvalidRequest(f"more than {_QUEUE} requests wait behind the one that is answered"))

    def on_url(self, url: bytes) -> None:
        """The parser's call: a part of the request target."""
        self.url += url
        if len(self.url) > limits.MAX_URL:
            size = limits.MAX_URL
            self.url = self.url[:80]
            self._raise(UrlTooLong(f"the URL is longer than {size} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        """The parser's call: one header field, or a trailer."""
        if self.receiving is not None:
            return  # a trailer; nothing of ours reads one
        if len(name) + len(value) > limits.MAX_LINE:
            shown = name[:40].decode("latin-1")
            self._raise(HeaderTooLarge(f"header {shown!r} is longer than {limits.MAX_LINE} bytes"))
        if len(self._headers) >= limits.MAX_FIELDS:
            self._raise(HeaderTooLarge(f"there are more than {limits.MAX_FIELDS} headers"))
        match name := name.lower():
            case b"content-length":
                self._length = int(value)
            case b"transfer-encoding":
                self._body_chunked = True
            case b"expect":
                self._expects_continue = value.lower() == b"100-continue"
            case b"x-request-id":
                self.given_id = value
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The parser's call: the head is complete, the request begins."""
        parser = self._parser
        version = parser.get_http_version()
        try:
            url = httptools.parse_url(self.url)
            raw_path = url.path or b""
            path = raw_path.decode("ascii")
        except (httptools.HttpParserError, UnicodeDecodeError):
            raw_path = b""
        if not raw_path:
            self._raise(InvalidRequest("the URL has no path"))
        scope: Scope = {
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
            "headers": self._headers,
        }
        self._unparsed_body = parser.should_upgrade() and self._length > 0
        self._left, self._framing, self._head_bytes = self._length, 0, 0
        keep_alive = version != "1.0" and parser.should_keep_alive()
        expects = self._expects_continue and version != "1.0"
        self._connection.begin(scope, self.given_id, keep_alive, expects)

    def on_chunk_header(self) -> None:
        """The parser's call: the length of a chunk."""
        self._framing -= limits.CHUNK_FRAMING

    def on_body(self, body: bytes) -> None:
        """The parser's call: a part of the body, if there is room for it."""
        exchange = self.receiving
        self._left -= len(body)
        if exchange is None:
            return
        exchange.received += len(body)
        if exchange.ended or exchange.gone:
            return
        bodies = self._connection.traffic.bodies
        if bodies.take(exchange, len(body), self._connection.loop.time()):
            exchange.feed(body)
            return
        message = f"the bodies of other requests take all of the {bodies.limit} bytes that there are for them"
        self._connection.refuse(
            NotReady(message, retry_after=1.0), "bodies refused, as others took all their memory", exchange
        )

    def on_message_complete(self) -> None:
        """The parser's call: the request is complete."""
        exchange = self.receiving
        if exchange is not None and not self._unparsed_body:
            self.receiving = None
            self._connection.complete(exchange)

    # --- ends -----------------------------------------------------------------------------------------------------

    def stop(self) -> None:
        """Nothing that is there or comes is parsed any more."""
        self.stopped, self.pending = True, b""

    def _raise(self, fault: LightllmdError) -> None:
        """Out of the parser, which then parses no more."""
        self._fault = fault
        raise fault

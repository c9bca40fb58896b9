"""One connection: bytes in, requests one after the other, and the clocks that end it.

What comes is handed to the parser in pieces that end where a header ends, and with the last byte of a body, so that no
more than one request is parsed at a time, and nothing is parsed of which the bounds don't allow a byte more.
"""

from __future__ import annotations

import asyncio
import fcntl
import select
import struct
import termios
from collections import deque
from typing import Any
from urllib.parse import unquote

import httptools
from starlette.types import ASGIApp, Scope

from lightllmd.errors import (
    BodyTooLarge,
    HeaderTooLarge,
    InvalidRequest,
    LightllmdError,
    NotReady,
    RequestTimeout,
    UrlTooLong,
)
from lightllmd.http import bounds as limits
from lightllmd.http.exchange import PREFIX, REQUEST_ID, Exchange, head, request_id
from lightllmd.http.traffic import Traffic

_HEAD_END = b"\r\n\r\n"
_PIECE = 8 << 10  # bytes of a body in chunks, parsed at a time
_QUEUE = 16  # requests that one piece may hold beside the one that is answered
_LINGER = 2.0  # seconds for a client to read a refusal while it still sends
_LINGER_BYTES = 4 << 20  # that are thrown away meanwhile
_DISCARD = 30.0  # seconds for the rest of a body that is not wanted any more
_FIRST_PROBE = 1.0  # seconds from the second byte of the status line that is sent ahead; twice as long to each other
_BROKEN = select.POLLERR | select.POLLHUP


class Connection(asyncio.BufferedProtocol):
    """`server_headers` gives the header lines of every answer."""

    def __init__(self, app: ASGIApp, traffic: Traffic, tasks: set[asyncio.Task[None]], server_headers: Any) -> None:
        self.app = app
        self.traffic = traffic
        self.tasks = tasks
        self.server_headers = server_headers
        self.loop = asyncio.get_running_loop()
        self.state: dict[str, Any] = {}  # `request.state` of every request
        self.transport: asyncio.Transport = None  # type: ignore[assignment]
        self.made = False  # counted among the connections, no longer among the handshakes
        self.guest = False  # beyond the cap: gets what is reserved

        self._deadline = 0.0  # loop time: of the header, or of the next request's first byte
        self._begun = False  # some byte of the header is there
        self._checked = 0.0  # loop time of the last `check`
        self._deaf = False  # nothing that comes is read any more
        self._lingers = False  # the last answer is sent; what comes is thrown away until the client closes
        self._thrown = 0  # bytes
        self._half_closed = False  # the client sends no more, but may read
        self._next_probe = 0.0
        self._probe_pause = _FIRST_PROBE

        self._parser = httptools.HttpRequestParser(self)
        self._fault: LightllmdError | None = None  # raised in a callback of the parser
        self._pending = b""  # read, not parsed
        self._in_turn = False  # the parsing goes on in `Traffic.turns`
        self._reading_paused = False
        self._url = b""
        self._headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._given_id = b""
        self._length = 0  # Content-Length
        self._body_chunked = False
        self._expects_continue = False
        self._left = 0  # bytes of a body with Content-Length that are still to come
        self._unparsed_body = False  # of a request that asks for an upgrade, where the parser sees none
        self._framing = 0  # bytes of a body in chunks that belong to no chunk

        self._receiving: Exchange | None = None  # whose body is coming
        self._answering: Exchange | None = None
        self._queue: deque[Exchange] = deque()  # those after it

        self.write_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._written = 0  # bytes
        self._window = 0.0  # loop time from which the client's pace of reading is measured; 0: it keeps up
        self._taken = 0  # bytes that its host had then

    # --- asyncio's calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]
        self.made = True
        self.traffic.handshakes -= 1
        self.traffic.connections.add(self)
        self.traffic.waiting[self] = None
        self._checked = self.loop.time()
        self._deadline = self._checked + self.traffic.bounds.header_timeout
        server, client = transport.get_extra_info("sockname"), transport.get_extra_info("peername")
        self.client = tuple(client[:2]) if isinstance(client, tuple) else None
        self.server = tuple(server[:2]) if isinstance(server, tuple) else (str(server), None)
        self.tls = transport.get_extra_info("sslcontext") is not None

    def connection_lost(self, exc: Exception | None) -> None:
        self._let_go()
        for exchange in (self._receiving, self._answering, *self._queue):
            if exchange is not None:
                exchange.lose()
        self._queue.clear()
        self._pending, self._deaf = b"", True
        self.resume_writing()

    def get_buffer(self, sizehint: int) -> bytearray:
        return self.traffic.buffer

    def buffer_updated(self, nbytes: int) -> None:
        self.data_received(bytes(memoryview(self.traffic.buffer)[:nbytes]))

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            self._throw(len(data))
            return
        if not self._begun and self._receiving is None:
            self._begun = True
            self._deadline = self.loop.time() + self.traffic.bounds.header_timeout
        self._pending = self._pending + data if self._pending else data
        if not self._in_turn:
            self._parse()

    def eof_received(self) -> bool:
        """The client sends no more. It still gets the answers to what it asked for, but over TLS, where asyncio closes
        both directions."""
        self._half_closed = True
        if self.tls or self._lingers or self._receiving is not None or self._answering is None:
            return False
        self._next_probe = self.loop.time() + self._probe_pause
        self._answering.probe()
        return True

    def pause_writing(self) -> None:
        self.write_paused = True

    def resume_writing(self) -> None:
        self.write_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # --- for its exchanges ----------------------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        self._written += len(data)
        self.transport.write(data)

    async def writable(self) -> None:
        while self.write_paused:
            if self._drained is None:
                self._drained = self.loop.create_future()
            await asyncio.shield(self._drained)

    def pace_reading(self) -> None:
        """Reads on unless enough is there already."""
        exchange = self._receiving
        pause = bool(self._pending) or (exchange is not None and exchange.overfull)
        if pause != self._reading_paused and not self.transport.is_closing():
            self._reading_paused = pause
            (self.transport.pause_reading if pause else self.transport.resume_reading)()

    def answered(self, exchange: Exchange) -> None:
        """Its answer is complete."""
        exchange.release_body()
        if self.transport.is_closing():
            return
        if not exchange.keep_alive:
            self._finish()
            return
        self._answering = None
        now = self.loop.time()
        if self._receiving is exchange:
            exchange.begun = now  # the rest of its body is thrown away
            self.pace_reading()
        if self._queue:
            self._answer(self._queue.popleft())
            return
        self._await_request(now)
        if self._pending and not self._in_turn:
            self._parse()
        elif self._half_closed:
            self.transport.close()

    def refuse(self, error: LightllmdError, what: str, exchange: Exchange | None = None) -> None:
        """Answers `error` where that is still possible, and ends the connection.

        `what`: which bound was reached, if any. `exchange`: the request that is at fault; None: what was being parsed.
        """
        if what:
            self.traffic.bite(what)
        current = self._answering
        if current is None:
            if self._receiving is None:
                self._refuse(error, self._url.decode("latin-1"), request_id(self._given_id), 0)
            else:  # the answer has been given, only the rest of the body comes
                self._finish()
        elif exchange is not current:  # what comes behind the one that is being answered
            current.keep_alive = False
            self._queue.clear()
            self._stop_reading()
        elif current.started:
            current.lose()
            self.transport.close()  # cut, so that the client can tell
        else:
            current.lose()
            self._refuse(error, current.scope["path"], current.id, current.probed)

    def give_way(self) -> None:
        """Closed, as others need the room."""
        self._let_go()
        self.transport.abort()

    # --- the server's calls ---------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """The server ends: at once where nothing is being answered."""
        if self._answering is None or self._lingers:
            self.transport.close()
        else:
            self._answering.keep_alive = False

    def hasten(self, seconds: float) -> None:
        """An idle connection has so long from now."""
        if self._answering is None:
            self._deadline = min(self._deadline, self.loop.time() + seconds)

    def check(self, now: float) -> None:
        """Ends what has taken too long. Called about twice a second."""
        since, self._checked = self._checked, now
        if self._reads_too_slowly(now):
            self.traffic.bite("connections cut whose client didn't read")
            self.transport.abort()
            return
        exchange = self._receiving
        if self._lingers:
            if now >= self._deadline:
                self.transport.abort()
        elif self.transport.is_closing():
            pass
        elif exchange is not None and not self._deaf:
            if self._reading_paused:
                exchange.begun += now - since  # it is we who don't read
            elif self._body_overdue(exchange, now):
                self._time_out_body(exchange)
        elif self._answering is not None:
            if self._half_closed:
                self._look_for_reader(now)
        elif now >= self._deadline:
            self._time_out_head()

    # --- clocks ---------------------------------------------------------------------------------------------------

    def _await_request(self, now: float) -> None:
        traffic = self.traffic
        self._begun = bool(self._pending)
        bounds = traffic.bounds
        self._deadline = now + (bounds.header_timeout if self._begun else traffic.idle_timeout)
        traffic.waiting[self] = None

    def _time_out_head(self) -> None:
        if not self._begun:
            self.transport.close()
            return
        seconds = self.traffic.bounds.header_timeout
        self.refuse(RequestTimeout(f"the header was not complete within {seconds:g} s"), "headers timed out")

    def _body_overdue(self, exchange: Exchange, now: float) -> bool:
        if exchange.ended:
            return now - exchange.begun > _DISCARD
        bounds = self.traffic.bounds
        return now - exchange.begun > bounds.body_timeout + exchange.received / bounds.min_rate

    def _time_out_body(self, exchange: Exchange) -> None:
        bounds = self.traffic.bounds
        self.refuse(
            RequestTimeout(
                f"the body stopped after {exchange.received} bytes: it has {bounds.body_timeout:g} s "
                f"and 1 s for every {bounds.min_rate:g} bytes"
            ),
            "bodies timed out",
            exchange,
        )

    def _reads_too_slowly(self, now: float) -> bool:
        """Whether the client's host took what we have to send more slowly than min_rate, over write_timeout."""
        backlog = self.transport.get_write_buffer_size()
        if not backlog:
            self._window = 0.0
            return False
        # Our buffer moves in steps of a third of the kernel's, which holds megabytes: a slow reader's pace shows there.
        bounds, taken = self.traffic.bounds, self._written - backlog - _unsent(self.transport)
        if not self._window:
            self._window, self._taken = now, taken
        elif now - self._window >= bounds.write_timeout:
            if taken - self._taken < bounds.min_rate * bounds.write_timeout:
                return True
            self._window, self._taken = now, taken
        return False

    def _look_for_reader(self, now: float) -> None:
        """The client has closed its sending side, or both: then its host answers to what we send with a reset."""
        poll = select.poll()
        poll.register(self.transport.get_extra_info("socket").fileno(), 0)
        if any(events & _BROKEN for _, events in poll.poll(0)):
            self.transport.abort()
        elif now >= self._next_probe and self._answering is not None and self._answering.probe():
            self._probe_pause *= 2
            self._next_probe = now + self._probe_pause

    # --- parsing --------------------------------------------------------------------------------------------------

    def _parse(self) -> None:
        """Parses what is there, as far as it may be now."""
        while self._pending and not self._deaf:
            if self._receiving is None:
                if self._answering is not None:
                    break  # one request after the other
                self._parse_head()
            elif self._in_chunks:
                if len(self._pending) > _PIECE:
                    self._in_turn = True
                    self.traffic.turns.add(self._parse_turn)
                    break
                self._parse_chunks()
            else:
                self._parse_body()
        self.pace_reading()

    def _parse_turn(self) -> bool:
        """A piece of a body in chunks; whether there is another."""
        if self._in_chunks:
            self._parse_chunks()
            if self._in_chunks and len(self._pending) > _PIECE:
                return True
        self._in_turn = False
        self._parse()
        return False

    @property
    def _in_chunks(self) -> bool:
        """A body is coming of which only the parser knows where it ends."""
        return self._receiving is not None and not self._deaf and (self._body_chunked or self._left <= 0)

    def _take(self, size: int) -> bytes:
        piece, self._pending = self._pending[:size], self._pending[size:]
        return piece

    def _parse_head(self) -> None:
        end = self._pending.find(_HEAD_END) + len(_HEAD_END)
        size = end if end >= len(_HEAD_END) else len(self._pending)
        piece = self._take(min(size, limits.MAX_HEAD + 1 - self._head_bytes))
        self._head_bytes += len(piece)
        self._feed(piece)
        if self._receiving is None and self._answering is None and self._head_bytes > limits.MAX_HEAD:
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
        exchange = self._receiving
        assert exchange is not None
        received = exchange.received
        piece = self._take(_PIECE)
        self._framing += len(piece)
        self._feed(piece)
        self._framing -= exchange.received - received
        if self._framing > limits.MAX_FRAMING and not self._deaf:
            message = f"the body has more than {limits.MAX_FRAMING} bytes of chunk extensions and trailers"
            self.refuse(BodyTooLarge(message), "requests refused for the framing of their body", exchange)

    def _feed(self, piece: bytes) -> None:
        try:
            self._parser.feed_data(piece)
        except httptools.HttpParserUpgrade as upgrade:
            # None is made: the connection goes on as it is, with what may follow.
            self._parser = httptools.HttpRequestParser(self)
            self._pending = piece[upgrade.args[0] :] + self._pending
        except httptools.HttpParserError as failure:
            fault, self._fault = self._fault, None
            if fault is not None:
                self.refuse(fault, "requests refused for their header")
            elif not self._deaf:
                self.refuse(InvalidRequest(f"this is not HTTP: {failure}"), "requests refused that are not HTTP")

    def _too_large(self, message: str) -> None:
        self.refuse(HeaderTooLarge(message), "requests refused for their header")

    # --- the parser's calls ---------------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        self._url, self._headers, self._given_id = b"", [], b""
        self._length, self._body_chunked, self._expects_continue = 0, False, False
        if len(self._queue) >= _QUEUE:
            self._raise(InvalidRequest(f"more than {_QUEUE} requests wait behind the one that is answered"))

    def on_url(self, url: bytes) -> None:
        self._url += url
        if len(self._url) > limits.MAX_URL:
            size = limits.MAX_URL
            self._url = self._url[:80]
            self._raise(UrlTooLong(f"the URL is longer than {size} bytes"))

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._receiving is not None:
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
                self._given_id = value
        self._headers.append((name, value))

    def on_headers_complete(self) -> None:
        parser = self._parser
        version = parser.get_http_version()
        try:
            url = httptools.parse_url(self._url)
            raw_path = url.path or b""
            path = raw_path.decode("ascii")
        except (httptools.HttpParserError, UnicodeDecodeError):
            raw_path = b""
        if not raw_path:
            self._raise(InvalidRequest("the URL has no path"))
        now = self.loop.time()
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "http_version": version,
            "method": parser.get_method().decode("ascii"),
            "scheme": "https" if self.tls else "http",
            "server": self.server,
            "client": self.client,
            "root_path": "",
            "path": unquote(path) if "%" in path else path,
            "raw_path": raw_path,
            "query_string": url.query or b"",
            "headers": self._headers,
            "state": self.state.copy(),
        }
        keep_alive = version != "1.0" and parser.should_keep_alive()
        expects = self._expects_continue and version != "1.0"
        exchange = Exchange(self, scope, self._given_id, keep_alive, expects, now)
        scope["lightllmd.exchange"] = exchange
        self._unparsed_body = parser.should_upgrade() and self._length > 0
        self._left, self._framing, self._head_bytes = self._length, 0, 0
        self._receiving = exchange
        self.traffic.waiting.pop(self, None)
        self.guest = self.guest and self.traffic.crowded
        if self.guest:
            exchange.keep_alive = False
        if self.guest and not self.traffic.is_reserved(scope["path"]):
            most = self.traffic.bounds.connections
            self._answering = exchange
            self.refuse(NotReady(f"all {most} connections are in use", retry_after=1.0), "", exchange)
        elif self._answering is None:
            self._answer(exchange)
        else:
            self._queue.append(exchange)

    def on_chunk_header(self) -> None:
        self._framing -= limits.CHUNK_FRAMING

    def on_body(self, body: bytes) -> None:
        exchange = self._receiving
        self._left -= len(body)
        if exchange is None or exchange.ended or exchange.gone:
            return
        exchange.received += len(body)
        bodies = self.traffic.bodies
        if bodies.take(exchange, len(body), self.loop.time()):
            exchange.feed(body)
            return
        message = f"the bodies of other requests take all of the {bodies.limit} bytes that there are for them"
        self.refuse(NotReady(message, retry_after=1.0), "bodies refused, as others took all their memory", exchange)

    def on_message_complete(self) -> None:
        exchange = self._receiving
        if exchange is None or self._unparsed_body:
            return
        self._receiving = None
        self.traffic.bodies.complete(exchange)
        exchange.complete()
        self._begun = False
        if not exchange.keep_alive:
            self._stop_reading()
        elif exchange.ended:
            self._await_request(self.loop.time())

    def _raise(self, fault: LightllmdError) -> None:
        """Out of the parser, which then parses no more."""
        self._fault = fault
        raise fault

    # --- ends -----------------------------------------------------------------------------------------------------

    def _answer(self, exchange: Exchange) -> None:
        self._answering = exchange
        task = self.loop.create_task(exchange.run(self.app))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)

    def _refuse(self, error: LightllmdError, path: str, name: bytes, probed: int) -> None:
        body = self.traffic.render(error, path)
        headers = [
            *self.server_headers(),
            (REQUEST_ID, name),
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(body)),
            (b"connection", b"close"),
        ]
        if error.retry_after is not None:
            headers.append((b"retry-after", b"%d" % max(1, error.retry_after)))
        self.write(b"".join([PREFIX[probed:], *head(error.status, headers), b"\r\n", body]))
        self._finish()

    def _stop_reading(self) -> None:
        self._deaf, self._pending = True, b""
        self.pace_reading()

    def _finish(self) -> None:
        """The last answer is written. A client that still sends gets the time to read it: what comes is thrown away,
        since closing with something unread would reset the connection, and the answer with it."""
        if self._half_closed or (self._receiving is None and not self._pending and self._answering is not None):
            self.transport.close()
            return
        self._stop_reading()
        self._lingers = True
        self._deadline = self.loop.time() + _LINGER
        self.traffic.waiting[self] = None
        if self.transport.can_write_eof():
            self.transport.write_eof()

    def _throw(self, size: int) -> None:
        self._thrown += size
        if self._thrown > _LINGER_BYTES:
            self.transport.abort()

    def _let_go(self) -> None:
        self.traffic.connections.discard(self)
        self.traffic.waiting.pop(self, None)


def _unsent(transport: asyncio.Transport) -> int:
    """Bytes in the kernel's buffer that the peer's kernel has not acknowledged."""
    sock = transport.get_extra_info("socket")
    return struct.unpack("i", fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, bytes(4)))[0]

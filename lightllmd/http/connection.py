"""One connection: its requests, answered one after the other, and the clocks that end it."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Any

from starlette.types import ASGIApp, Scope

from lightllmd.errors import LightllmdError, NotReady, RequestTimeout
from lightllmd.http.client_watch import Presence, ReadingPace
from lightllmd.http.exchange import PREFIX, REQUEST_ID, Exchange, head, request_id
from lightllmd.http.reader import Reader
from lightllmd.http.traffic import Traffic

_LINGER = 2.0  # seconds for a client to read a refusal while it still sends
_LINGER_BYTES = 4 << 20  # that are thrown away meanwhile
_DISCARD = 30.0  # seconds for the rest of a body that is not wanted any more


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
        self.handshake: asyncio.Task[None] | None = None  # until it is made or given up
        self.guest = False  # beyond the cap: gets what is reserved

        self._deadline = 0.0  # loop time: of the header, or of the next request's first byte
        self._begun = False  # some byte of the header is there
        self._checked = 0.0  # loop time of the last `check`
        self._lingers = False  # the last answer is sent; what comes is thrown away until the client closes
        self._thrown = 0  # bytes
        self._half_closed = False  # the client sends no more, but may read
        self._presence = Presence()

        self.reader = Reader(self)
        self._reading_paused = False
        self.answering: Exchange | None = None
        self._queue: deque[Exchange] = deque()  # those after it

        self.write_paused = False
        self._drained: asyncio.Future[None] | None = None
        self._pace = ReadingPace(traffic.bounds)

    # --- asyncio's calls ------------------------------------------------------------------------------------------

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """asyncio's call: counts it among the connections and starts the clock of its first header."""
        self.transport = transport  # type: ignore[assignment]
        self.made, self.handshake = True, None
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
        """asyncio's call: the requests that it had get no answer any more."""
        self._let_go()
        for exchange in (self.reader.receiving, self.answering, *self._queue):
            if exchange is not None:
                exchange.lose()
        self._queue.clear()
        self.reader.stop()
        self.resume_writing()

    def get_buffer(self, sizehint: int) -> memoryview:
        """asyncio's call: all connections of a server read into one buffer."""
        return self.traffic.buffer

    def buffer_updated(self, nbytes: int) -> None:
        """asyncio's call: `nbytes` are in the buffer."""
        self.data_received(bytes(self.traffic.buffer[:nbytes]))

    def data_received(self, data: bytes) -> None:
        """Bytes of requests, or, after the last answer, bytes that are thrown away."""
        if self.reader.stopped:
            self._throw(len(data))
            return
        if not self._begun and self.reader.receiving is None:
            self._begun = True
            self._deadline = self.loop.time() + self.traffic.bounds.header_timeout
        self.reader.feed(data)

    def eof_received(self) -> bool:
        """The client sends no more. It still gets the answers to what it asked for, but over TLS, where asyncio closes
        both directions."""
        self._half_closed = True
        if self.tls or self._lingers or self.reader.receiving is not None or self.answering is None:
            return False
        self._presence.begin(self.loop.time())
        self.answering.probe()
        return True

    def pause_writing(self) -> None:
        """asyncio's call: the client reads more slowly than is written."""
        self.write_paused = True

    def resume_writing(self) -> None:
        """asyncio's call: what `writable` waits for."""
        self.write_paused = False
        if self._drained is not None and not self._drained.done():
            self._drained.set_result(None)
        self._drained = None

    # --- for its reader and exchanges -----------------------------------------------------------------------------

    def write(self, data: bytes) -> None:
        """Sends `data`, or buffers what the client doesn't take now."""
        self._pace.written += len(data)
        self.transport.write(data)

    async def writable(self) -> None:
        """Waits while `write_paused`."""
        while self.write_paused:
            if self._drained is None:
                self._drained = self.loop.create_future()
            await asyncio.shield(self._drained)

    def pace_reading(self) -> None:
        """Reads on unless enough is there already."""
        exchange = self.reader.receiving
        pause = bool(self.reader.pending) or (exchange is not None and exchange.overfull)
        if pause != self._reading_paused and not self.transport.is_closing():
            self._reading_paused = pause
            (self.transport.pause_reading if pause else self.transport.resume_reading)()

    def begin(self, request: Scope, given_id: bytes, keep_alive: bool, expects_continue: bool) -> None:
        """The header of a request is complete."""
        scope: Scope = {
            "type": "http",
            "asgi": {"version": "3.0", "spec_version": "2.3"},
            "scheme": "https" if self.tls else "http",
            "server": self.server,
            "client": self.client,
            "root_path": "",
            "state": self.state.copy(),
            **request,
        }
        exchange = Exchange(self, scope, given_id, keep_alive, expects_continue, self.loop.time())
        scope["lightllmd.exchange"] = exchange
        self.reader.receiving = exchange
        self.traffic.waiting.pop(self, None)
        self.guest = self.guest and self.traffic.crowded
        if self.guest:
            exchange.keep_alive = False
        if self.guest and not self.traffic.is_reserved(scope["path"]):
            most = self.traffic.bounds.connections
            self.answering = exchange
            self.refuse(NotReady(f"all {most} connections are in use", retry_after=1.0), "", exchange)
        elif self.answering is None:
            self._answer(exchange)
        else:
            self._queue.append(exchange)

    @property
    def queued(self) -> int:
        """Requests behind the one that is being answered."""
        return len(self._queue)

    def complete(self, exchange: Exchange) -> None:
        """All of a request is there."""
        self.traffic.bodies.complete(exchange)
        exchange.complete()
        self._begun = False
        if not exchange.keep_alive:
            self._stop_reading()
        elif exchange.ended:
            self._await_request(self.loop.time())

    def answered(self, exchange: Exchange) -> None:
        """Its answer is complete."""
        exchange.release_body()
        if self.transport.is_closing():
            return
        if not exchange.keep_alive:
            self._finish()
            return
        self.answering = None
        now = self.loop.time()
        if self.reader.receiving is exchange:
            exchange.begun = now  # the rest of its body is thrown away
            self.pace_reading()
        if self._queue:
            self._answer(self._queue.popleft())
            return
        self._await_request(now)
        if self.reader.pending and not self.reader.in_turn:
            self.reader.parse()
        elif self._half_closed:
            self.transport.close()

    def refuse(self, error: LightllmdError, what: str, exchange: Exchange | None = None) -> None:
        """Answers `error` where that is still possible, and ends the connection.

        `what`: which bound was reached, if any. `exchange`: the request that is at fault; None: what was being parsed.
        """
        if what:
            self.traffic.bite(what)
        current = self.answering
        if current is None:
            if self.reader.receiving is None:
                self._refuse(error, self.reader.url.decode("latin-1"), request_id(self.reader.given_id), 0)
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
        if self.made:
            self.transport.abort()
        else:
            self.give_up_handshake()

    def begin_handshake(self, task: asyncio.Task[None]) -> None:
        """Accepted, and counted as such: `task` leads to `connection_made`, over TLS at the client's pace."""
        self.handshake = task
        self.traffic.handshakes += 1
        self.traffic.waiting[self] = None

    def give_up_handshake(self) -> None:
        """It has failed, or has to; nothing happens where it is over."""
        handshake, self.handshake = self.handshake, None
        if handshake is not None:
            self._let_go()
            self.traffic.handshakes -= 1
            handshake.cancel()

    # --- the server's calls ---------------------------------------------------------------------------------------

    def shutdown(self) -> None:
        """The server ends: at once where nothing is being answered."""
        if self.answering is None or self._lingers:
            self.transport.close()
        else:
            self.answering.keep_alive = False

    def hasten(self, seconds: float) -> None:
        """An idle connection has so long from now."""
        if self.answering is None:
            self._deadline = min(self._deadline, self.loop.time() + seconds)

    def check(self, now: float) -> None:
        """Ends what has taken too long. Called about twice a second."""
        since, self._checked = self._checked, now
        if self._pace.too_slow(self.transport, now):
            self.traffic.bite("connections cut whose client didn't read")
            self.transport.abort()
            return
        exchange = self.reader.receiving
        if self._lingers:
            if now >= self._deadline:
                self.transport.abort()
        elif self.transport.is_closing():
            pass
        elif exchange is not None and not self.reader.stopped:
            if self._reading_paused:
                exchange.begun += now - since  # it is we who don't read
            elif self._body_overdue(exchange, now):
                self._time_out_body(exchange)
        elif self.answering is not None:
            deaf = self._half_closed or self._reading_paused  # so that asyncio doesn't tell that it left
            if deaf and self._presence.gone(self.transport, now, self.answering.probe):
                self.transport.abort()
        elif now >= self._deadline:
            self._time_out_head()

    # --- clocks ---------------------------------------------------------------------------------------------------

    def _await_request(self, now: float) -> None:
        traffic = self.traffic
        self._begun = bool(self.reader.pending)
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

    # --- ends -----------------------------------------------------------------------------------------------------

    def _answer(self, exchange: Exchange) -> None:
        self.answering = exchange
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
        self.reader.stop()
        self.pace_reading()

    def _finish(self) -> None:
        """The last answer is written. A client that still sends gets the time to read it: what comes is thrown away,
        since closing with something unread would reset the connection, and the answer with it."""
        if self._half_closed or (
            self.reader.receiving is None and not self.reader.pending and self.answering is not None
        ):
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

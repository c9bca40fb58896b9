"""uvicorn's server on our own connections: what it accepts, and the clock that looks after them."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
import ssl
from collections.abc import Callable, Iterator
from functools import partial

import uvicorn

from lightllmd.http.connection import Connection
from lightllmd.http.traffic import Traffic

log = logging.getLogger(__name__)

_ACCEPTS = 8  # connections taken in one turn of the loop
_NO_DESCRIPTOR = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
_PAUSE = 0.2  # seconds without accepting when the host has no descriptor left
_TICK = 0.1  # seconds, as uvicorn's
_TICKS = 5  # between two looks at the connections
_LOOKS = 0.01  # seconds between two looks at what is open still when it ends


class Acceptor:
    """One listener. Closing it leaves the socket to its owner."""

    def __init__(
        self,
        sock: socket.socket,
        traffic: Traffic,
        make: Callable[[], Connection],
        tls: Callable[[], ssl.SSLContext | None],
    ) -> None:
        """`tls`: of a connection that comes now; None: it is not encrypted."""
        self._sock = sock
        self._traffic = traffic
        self._make = make
        self._tls = tls
        self._loop = asyncio.get_running_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._accept)

    def close(self) -> None:
        """Accepts no more."""
        if not self._closed:
            self._closed = True
            self._loop.remove_reader(self._sock.fileno())

    async def wait_closed(self) -> None:
        """As asyncio's servers have it."""

    def _accept(self) -> None:
        for _ in range(_ACCEPTS):
            try:
                sock, _ = self._sock.accept()
            except (BlockingIOError, InterruptedError):
                return
            except OSError as failure:
                if failure.errno in _NO_DESCRIPTOR:
                    self._traffic.bite(f"connections that wait: {failure.strerror}")
                    self._loop.remove_reader(self._sock.fileno())
                    self._loop.call_later(_PAUSE, self._resume)
                    return
                continue  # this one is gone already
            admitted = self._traffic.admit()
            if admitted is False:
                sock.close()
                continue
            connection = self._make()
            connection.guest = admitted is None
            task = self._loop.create_task(self._connect(sock, connection))
            connection.begin_handshake(task)
            self._tasks.add(task)
            task.add_done_callback(partial(self._connected, sock, connection))

    def _resume(self) -> None:
        if not self._closed:
            self._loop.add_reader(self._sock.fileno(), self._accept)

    async def _connect(self, sock: socket.socket, connection: Connection) -> None:
        sock.setblocking(False)
        tls = None
        if sock.family != socket.AF_UNIX:  # which no network is between
            tls = self._tls()
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # asyncio, unlike uvloop, forgets it here
        with contextlib.suppress(OSError):  # ssl.SSLError and time-outs too
            await self._loop.connect_accepted_socket(
                lambda: connection,
                sock,
                ssl=tls,
                ssl_handshake_timeout=self._traffic.bounds.header_timeout if tls else None,
            )

    def _connected(self, sock: socket.socket, connection: Connection, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not connection.made:
            sock.close()
            connection.give_up_handshake()


class Server(uvicorn.Server):
    """Signals are the supervisor's business, not uvicorn's; and it ends when it can, where uvicorn looks at times."""

    def __init__(
        self, config: uvicorn.Config, traffic: Traffic, connection_class: type[Connection] = Connection
    ) -> None:
        """`config` is loaded."""
        super().__init__(config)
        self.traffic = traffic
        self._connection_class = connection_class
        self.server_state.connections = traffic.connections  # type: ignore[assignment]
        self._end = asyncio.Event()
        self.tls: ssl.SSLContext | None = None  # of connections to come

    def end(self) -> None:
        """Accepts no more, and ends when the open answers have been sent, or after `timeout_graceful_shutdown` s."""
        self.should_exit = True
        self._end.set()

    def _connection(self) -> Connection:
        state = self.server_state
        return self._connection_class(self.config.loaded_app, self.traffic, state.tasks, lambda: state.default_headers)

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """As uvicorn's, without any."""
        yield

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's: listens on `sockets`."""
        await self.lifespan.startup()
        self.servers = [
            Acceptor(sock, self.traffic, self._connection, lambda: self.tls)  # type: ignore[misc]
            for sock in sockets or []
        ]
        self.started = True

    async def on_tick(self, counter: int) -> bool:
        """As uvicorn's, ten times a second; every half second the connections' clocks are looked at."""
        if counter % _TICKS == 0:
            now = asyncio.get_running_loop().time()
            for connection in list(self.traffic.connections):
                try:
                    connection.check(now)
                except Exception:  # of this one, which ends: the clocks of all others go on
                    log.exception("a connection can't be looked after")
                    connection.transport.abort()
        return await super().on_tick(counter)

    async def main_loop(self) -> None:
        """As uvicorn's, until `end`."""
        counter = 0
        while not await self.on_tick(counter):
            counter += 1
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._end.wait(), _TICK)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's, without its pauses of a tenth of a second before and between looks at what is still open."""
        for listener in self.servers:
            listener.close()
        for sock in sockets or []:
            sock.close()
        for connection in list(self.traffic.connections):
            connection.shutdown()
        tasks = self.server_state.tasks
        try:
            async with asyncio.timeout(self.config.timeout_graceful_shutdown):
                while self.traffic.connections or tasks:
                    await asyncio.sleep(_LOOKS)
        except TimeoutError:
            log.error("%d requests are not answered: the time to finish them is over", len(tasks))
            for task in list(tasks):
                task.cancel()
        await self.lifespan.shutdown()

"""uvicorn on the inherited listeners: when it accepts, how its connections end."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections.abc import Iterator
from typing import cast

import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from lightllmd.config.files import read_bytes
from lightllmd.config.parameters import HttpSettings
from lightllmd.errors import ConfigInvalid, Problem

KEEP_ALIVE = 30  # seconds that an idle HTTP connection stays open
# The same once the worker retires. More than the 5 s after which several clients (httpx is one) give up an idle
# connection themselves: who keeps one for longer may send a request just when we close it.
KEEP_ALIVE_RETIRED = 6
_SETTLE = 0.2  # seconds after which uvicorn knows every connection that was accepted
LARGEST_PEM = 1 << 20  # bytes
BACKLOG = 4096  # as the supervisor's; the kernel caps it at net.core.somaxconn


def uvicorn_config(app: ASGIApp, http: HttpSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        backlog=BACKLOG,
        ssl_certfile=http.tls_certificate or None,
        ssl_keyfile=http.tls_key or None,
    )
    try:
        for path in (http.tls_certificate, http.tls_key):
            if path:
                read_bytes(path, LARGEST_PEM)  # OpenSSL would wait for a pipe's writer
        config.load()
    except OSError as failure:  # ssl.SSLError is one
        message = f"{http.tls_certificate} with key {http.tls_key or 'in the same file'} can't be used: {failure}"
        raise ConfigInvalid([Problem("http.tls_certificate", message)]) from failure
    return config


class Server(uvicorn.Server):
    """Signals are the supervisor's business, not uvicorn's."""

    def __init__(self, config: uvicorn.Config, sockets: list[socket.socket]) -> None:
        super().__init__(config)
        self.sockets = sockets
        self._settled: float | None = None  # loop time from which a retired one may end; None: not retired

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def retire(self) -> None:
        """Stops accepting, and ends when the last connection has. Those that are open may bring further requests, and
        with the answer they are told to connect anew; so they end without a request lost on its way to us.

        An answer that has begun can't say so any more: its connection stays for one more request.
        """
        if not self.started:
            self.should_exit = True
        if self.should_exit or self._settled is not None:
            return
        for server in self.servers:
            server.close()
        for sock in self.sockets:
            sock.close()
        close = (b"connection", b"close")
        self.config.encoded_headers.append(close)  # `on_tick` makes default_headers of them, every second
        self.server_state.default_headers = [*self.server_state.default_headers, close]
        # What was accepted a moment ago is in no list yet, nor is a connection in its TLS handshake.
        settle = KEEP_ALIVE_RETIRED if self.config.is_ssl else _SETTLE
        loop = asyncio.get_running_loop()
        self._settled = loop.time() + settle
        self._shorten()
        loop.call_later(settle, self._shorten)

    def _shorten(self) -> None:
        """An idle connection has KEEP_ALIVE_RETIRED from now; one that waits for an answer will hear from that."""
        loop = asyncio.get_running_loop()
        for connection in cast("set[HttpToolsProtocol]", self.server_state.connections):
            connection.timeout_keep_alive = KEEP_ALIVE_RETIRED
            cycle = connection.cycle
            if cycle is None or cycle.response_complete:
                connection._unset_keepalive_if_required()
                connection.timeout_keep_alive_task = loop.call_later(
                    KEEP_ALIVE_RETIRED, connection.timeout_keep_alive_handler
                )
            elif not cycle.response_started:
                cycle.keep_alive = False

    async def on_tick(self, counter: int) -> bool:
        over = await super().on_tick(counter)
        if self._settled is None or self.server_state.connections:
            return over
        return over or asyncio.get_running_loop().time() >= self._settled

    def leave(self, timeout: float | None) -> None:
        """Stops accepting; open responses may finish, for `timeout` seconds at most.

        A connection that was accepted a moment ago brings its request first: closed at once it would be reset.
        """
        self.config.timeout_graceful_shutdown = timeout  # type: ignore[assignment]
        self.retire()
        asyncio.get_running_loop().call_later(_SETTLE if self.started else 0, self._end)

    def _end(self) -> None:
        self.should_exit = True

"""The front end's HTTP server on the inherited listeners: its bounds, and how its connections end."""

from __future__ import annotations

import asyncio
import logging
import socket

import uvicorn
from starlette.types import ASGIApp

from lightllmd.api.web.auth import OPEN_PATHS
from lightllmd.api.web.errors import ErrorAnswers
from lightllmd.config.parameters import HttpSettings
from lightllmd.http import server
from lightllmd.http.bounds import Bounds, descriptors_left
from lightllmd.http.connection import Connection
from lightllmd.http.traffic import Traffic

log = logging.getLogger(__name__)

# Seconds that an idle connection stays open once the worker retires. More than the 5 s after which several clients
# (httpx is one) give up an idle connection themselves: who keeps one for longer may send a request just when we close
# it.
KEEP_ALIVE_RETIRED = 6
_SETTLE = 0.2  # seconds after which every connection that was accepted is known
_BODIES = 8  # of the largest kind, in memory at a time


def uvicorn_config(app: ASGIApp) -> uvicorn.Config:
    """Loaded. TLS is ours: see `http.server.Server.tls`."""
    config = uvicorn.Config(
        app,
        http=Connection,  # type: ignore[arg-type]  # a class like its own, not derived from them
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
    )
    config.load()
    return config


def bounds(http: HttpSettings) -> Bounds:
    """Of this process, whose descriptors count."""
    if http.max_connections == "auto":
        connections = descriptors_left()
    else:
        connections = descriptors_left(http.max_connections)
        if connections < http.max_connections:
            log.warning("max_connections is %d, as the descriptors (ulimit -n) leave no more", connections)
    memory = http.max_body_bytes_in_flight
    return Bounds(
        header_timeout=http.header_timeout,
        body_timeout=http.body_timeout,
        write_timeout=http.write_timeout,
        keep_alive_timeout=http.keep_alive_timeout,
        min_rate=http.min_rate,
        connections=connections,
        body_bytes=_BODIES * http.max_body_bytes if memory == "auto" else memory,
    )


class ApiServer(server.Server):
    """Ends when it is told to, each connection after its answer."""

    def __init__(self, app: ASGIApp, http: HttpSettings, sockets: list[socket.socket], errors: ErrorAnswers) -> None:
        """`errors`: of requests that never reach `app`."""
        config = uvicorn_config(app)
        traffic = Traffic(
            bounds(http),
            render=errors.body,
            is_reserved=OPEN_PATHS.__contains__,
        )
        super().__init__(config, traffic)
        self.sockets = sockets
        self._settled: float | None = None  # loop time from which a retired one may end; None: not retired

    def retire(self) -> None:
        """Stops accepting, and ends when the last connection has. Those that are open may bring further requests, and
        with the answer they are told to connect anew; so they end without a request lost on its way to us.

        An answer that has begun can't say so any more: its connection stays for one more request.
        """
        if not self.started:
            self.end()
        if self.should_exit or self._settled is not None:
            return
        for acceptor in self.servers:
            acceptor.close()
        for sock in self.sockets:
            sock.close()
        self.traffic.retire(KEEP_ALIVE_RETIRED)
        # What was accepted a moment ago is in no list yet, nor is a connection in its TLS handshake.
        settle = KEEP_ALIVE_RETIRED if self.tls is not None else _SETTLE
        loop = asyncio.get_running_loop()
        self._settled = loop.time() + settle
        loop.call_later(settle, self.traffic.retire, KEEP_ALIVE_RETIRED)

    async def on_tick(self, counter: int) -> bool:
        """See `http.server`. True also once it has retired and the last connection is gone."""
        over = await super().on_tick(counter)
        if self._settled is None or self.traffic.connections:
            return over
        return over or asyncio.get_running_loop().time() >= self._settled

    def leave(self, timeout: float | None) -> None:
        """Stops accepting; open responses may finish, for `timeout` seconds at most.

        A connection that was accepted a moment ago brings its request first: closed at once it would be reset.
        """
        self.config.timeout_graceful_shutdown = timeout  # type: ignore[assignment]
        self.retire()
        asyncio.get_running_loop().call_later(_SETTLE if self.started else 0, self.end)

"""The ledger's way to one engine generation: ZeroMQ's socket driven by the event loop."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import zmq

from lightllmd.api.inflight.groups import Link
from lightllmd.ipc import messages
from lightllmd.ipc.bus import ApiSocket


class EngineLink(Link):
    """`on_readable` is called when there may be something to receive, at times when there is nothing."""

    def __init__(
        self, endpoint: str, api: int, epoch: int, context: zmq.Context, on_readable: Callable[[], None]
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_readable = on_readable
        self._socket: ApiSocket | None = ApiSocket(endpoint, api, epoch, context)
        self._fd = self._socket.fileno()
        self._loop.add_reader(self._fd, on_readable)
        self._looking = False
        self._look()

    def send(self, message: messages.ToEngine) -> None:
        if self._socket is not None:
            self._socket.send(message)
            self._look()

    def _look(self) -> None:
        """ZeroMQ's descriptor is edge-triggered, and a send may swallow the edge."""
        if not self._looking:
            self._looking = True
            self._loop.call_soon(self._looked)

    def _looked(self) -> None:
        self._looking = False
        if self._socket is not None:
            self._on_readable()

    def receive(self) -> list[messages.ToApi]:
        return [] if self._socket is None else self._socket.receive()

    def close(self) -> None:
        if self._socket is not None:
            self._loop.remove_reader(self._fd)
            self._socket.close()
            self._socket = None

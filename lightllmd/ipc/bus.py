"""The ZeroMQ link between api workers and an engine generation.

The engine's rank 0 binds one ROUTER; each api worker connects one DEALER. No high-water mark: a send never blocks and
what is in flight is bounded by max_new_tokens. What is addressed to an api worker that is gone is dropped by ROUTER.
"""

from __future__ import annotations

import contextlib
import os

import zmq

from lightllmd.ipc import messages


def identity(api: int, epoch: int) -> bytes:
    """The ZeroMQ routing id of one process of an api worker."""
    return b"api-%d-%d" % (api, epoch)


class EngineSocket:
    """Rank 0's end. Poll `socket` for reading with zmq.Poller, beside the supervisor's channel."""

    def __init__(self, endpoint: str) -> None:
        self._path = endpoint.removeprefix("ipc://")
        self.context = zmq.Context(io_threads=1)
        self.socket = self.context.socket(zmq.ROUTER)
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self.socket.setsockopt(option, 0)
        # An api worker that connects again is heard at once, even if the end of its last connection is not noticed yet.
        self.socket.setsockopt(zmq.ROUTER_HANDOVER, 1)
        old = os.umask(0o177)
        try:
            self.socket.bind(endpoint)
        finally:
            os.umask(old)

    def receive(self) -> list[messages.ToEngine]:
        """All that is there now, in order per api worker."""
        received: list[messages.ToEngine] = []
        while True:
            try:
                _, body = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return received
            received.append(messages.decode_to_engine(body))

    def send(self, api: int, epoch: int, message: messages.ToApi) -> None:
        """Never blocks; dropped where that process of that api worker is not connected."""
        self.socket.send_multipart([identity(api, epoch), messages.encode(message)], zmq.NOBLOCK)

    def close(self) -> None:
        """Also removes the socket's file, which ZeroMQ leaves behind."""
        self.socket.close(0)
        self.context.term()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path)


class ApiSocket:
    """An api worker's end to one generation.

    `fileno` is ZeroMQ's *edge-triggered* descriptor: register it with the loop's add_reader, and also call
    `receive` (for instance by loop.call_soon) after every send, or an edge can be missed.
    """

    def __init__(self, endpoint: str, api: int, epoch: int, context: zmq.Context | None = None) -> None:
        self.socket = (context or zmq.Context.instance()).socket(zmq.DEALER)
        self.socket.setsockopt(zmq.IDENTITY, identity(api, epoch))
        for option in (zmq.SNDHWM, zmq.RCVHWM, zmq.LINGER):
            self.socket.setsockopt(option, 0)
        self.socket.connect(endpoint)
        self.send(messages.Hello(api, epoch))

    def fileno(self) -> int:
        """ZeroMQ's edge-triggered descriptor, see the class."""
        return self.socket.getsockopt(zmq.FD)

    def send(self, message: messages.ToEngine) -> None:
        """Never blocks: what the engine hasn't taken yet waits in ZeroMQ's queue."""
        self.socket.send(messages.encode(message), zmq.NOBLOCK)

    def receive(self) -> list[messages.ToApi]:
        """All that is there now, in order."""
        received = []
        while True:
            try:
                received.append(messages.decode_to_api(self.socket.recv(zmq.NOBLOCK)))
            except zmq.Again:
                return received

    def close(self) -> None:
        """Drops what was sent and what was received but not read."""
        self.socket.close(0)

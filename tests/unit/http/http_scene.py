"""A server on real sockets with a small application, whose clock is set forward rather than waited for."""

from __future__ import annotations

import asyncio
import json
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from lightllmd.http.bounds import Bounds
from lightllmd.http.connection import Connection
from lightllmd.http.server import Acceptor
from lightllmd.http.traffic import Traffic

PATIENCE = 60  # seconds; a bound, never a measure
GET = b"GET /answer HTTP/1.1\r\nHost: x\r\n\r\n"
CHUNKED = b"POST /answer HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"


class App:
    """/answer: 200 with the body's length. /stream: parts until `open`. /big: 20 MB. /wait: until the client is gone.
    /deaf: an answer that doesn't wait for the body."""

    def __init__(self) -> None:
        self.called: list[str] = []
        self.gone: list[str] = []
        self.go_on = asyncio.Event()
        self.sent = 0
        self.states: list[Any] = []

    async def __call__(self, scope, receive, send) -> None:
        path = scope["path"]
        self.called.append(path)
        start = {"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]}
        if path == "/wait":
            while (await receive())["type"] != "http.disconnect":
                pass
            self.gone.append(path)
            return
        size, more = 0, path != "/deaf"
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                self.gone.append(path)
                return
            size, more = size + len(message["body"]), message["more_body"]
        if path == "/late":
            await self.go_on.wait()
        if path == "/stream":
            await send(start)
            await send({"type": "http.response.body", "body": b"one", "more_body": True})
            await self.go_on.wait()
            await send({"type": "http.response.body", "body": b"two", "more_body": True})
            await send({"type": "http.response.body", "body": b"three", "more_body": False})
        elif path == "/big":
            await send(start)
            for _ in range(320):
                await send({"type": "http.response.body", "body": bytes(1 << 16), "more_body": True})
                self.sent += 1 << 16
            await send({"type": "http.response.body", "body": b"", "more_body": False})
        else:
            body = b"%d" % size
            start["headers"].append((b"content-length", b"%d" % len(body)))
            await send(start)
            await send({"type": "http.response.body", "body": body, "more_body": False})


class Served:
    def __init__(self, app: App, traffic: Traffic, port: int) -> None:
        self.app, self.traffic, self.port = app, traffic, port
        self._sockets: list[socket.socket] = []
        self.tls: ssl.SSLContext | None = None  # of connections to come

    async def connect(self, data: bytes = b"", receive_buffer: int = 0) -> Client:
        sock = socket.socket()
        if receive_buffer:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        sock.setblocking(False)
        loop = asyncio.get_running_loop()
        await loop.sock_connect(sock, ("127.0.0.1", self.port))
        self._sockets.append(sock)
        client = Client(sock)
        await client.send(data)
        return client

    async def ask(self, data: bytes) -> bytes:
        """All that is answered until the server closes."""
        return await (await self.connect(data)).rest()

    def later(self, seconds: float) -> None:
        """The server looks at its connections as if so much time had passed."""
        now = asyncio.get_running_loop().time() + seconds
        for connection in list(self.traffic.connections):
            connection.check(now)

    def close(self) -> None:
        for sock in self._sockets:
            sock.close()


class Client:
    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self._loop = asyncio.get_running_loop()

    async def send(self, data: bytes) -> None:
        try:
            await self._loop.sock_sendall(self.sock, data)
        except (BrokenPipeError, ConnectionResetError):
            pass

    async def read(self) -> bytes:
        async with asyncio.timeout(PATIENCE):
            try:
                return await self._loop.sock_recv(self.sock, 1 << 16)
            except ConnectionResetError:
                return b""

    async def rest(self) -> bytes:
        parts = []
        while part := await self.read():
            parts.append(part)
        return b"".join(parts)

    async def until(self, end: bytes) -> bytes:
        data = b""
        while not data.endswith(end):
            part = await self.read()
            assert part, data
            data += part
        return data


async def until(condition: Callable[[], Any]) -> Any:
    async with asyncio.timeout(PATIENCE):
        while not (value := condition()):
            await asyncio.sleep(0.001)
        return value


BOUNDS = Bounds(
    header_timeout=20,
    body_timeout=20,
    write_timeout=30,
    keep_alive_timeout=75,
    min_rate=1000,
    connections=100,
    body_bytes=8 << 20,
    guests=2,
)


def traffic_of(bounds: dict[str, Any]) -> Traffic:
    values = {name: bounds.get(name, getattr(BOUNDS, name)) for name in BOUNDS.__dataclass_fields__}
    return Traffic(
        Bounds(**values),
        render=lambda error, path: json.dumps({"message": error.message, "path": path}).encode(),
        is_reserved=lambda path: path == "/health",
    )


@asynccontextmanager
async def serving(**bounds: Any) -> AsyncIterator[Served]:
    app, traffic, tasks = App(), traffic_of(bounds), set()
    listener = socket.create_server(("127.0.0.1", 0))
    served = Served(app, traffic, listener.getsockname()[1])
    acceptor = Acceptor(listener, traffic, lambda: Connection(app, traffic, tasks, list), lambda: served.tls)
    try:
        yield served
    finally:
        acceptor.close()
        listener.close()
        served.close()
        for connection in list(traffic.connections):
            connection.transport.abort()
        await until(lambda: not traffic.connections and not tasks)


def run(test: Callable[[], Any]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60):
            await test()

    asyncio.run(bounded())


def status(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def post(size: int, path: bytes = b"/answer") -> bytes:
    return b"POST %b HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (path, size)

"""Servers of images for tests, well-behaved and others, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from ipaddress import ip_address

from lightllmd.visual.policy import Address

Answer = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


@dataclass
class Source:
    """An `ImageSource` as the fetcher sees it."""

    kind: str = "url"
    url: str = ""
    path: str = ""


@dataclass
class Server:
    port: int = 0
    heads: list[bytes] = field(default_factory=list)  # of the requests that came
    at_once: int = 0  # connections, the most there were
    open: int = 0

    def url(self, path: str = "/a.png", host: str = "127.0.0.1", scheme: str = "http") -> str:
        return f"{scheme}://{host}:{self.port}{path}"


@contextlib.asynccontextmanager
async def serving(
    answer: Answer | bytes, tls: ssl.SSLContext | None = None, *, unasked: bool = False
) -> AsyncIterator[Server]:
    """`answer`: what is sent to every request, or a function that sends it. A client that goes away ends it.
    `unasked`: it is sent before the request."""
    made, tasks = Server(), set()

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(asyncio.current_task())
        made.open += 1
        made.at_once = max(made.at_once, made.open)
        try:
            if not unasked:
                made.heads.append(await reader.readuntil(b"\r\n\r\n"))
            if isinstance(answer, bytes):
                writer.write(answer)
                await writer.drain()
            else:
                await answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            made.open -= 1
            tasks.discard(asyncio.current_task())
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0, ssl=tls)
    made.port = server.sockets[0].getsockname()[1]
    try:
        yield made
    finally:
        server.close()
        for task in list(tasks):
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def ok(body: bytes, *fields: str, length: bool = True) -> bytes:
    """A whole answer."""
    lines = ["HTTP/1.1 200 OK", *([f"Content-Length: {len(body)}"] if length else []), *fields, "", ""]
    return "\r\n".join(lines).encode() + body


def redirect(to: str, status: int = 302) -> bytes:
    return f"HTTP/1.1 {status} Elsewhere\r\nLocation: {to}\r\nContent-Length: 0\r\n\r\n".encode()


def endless(piece: bytes, head: bytes = ok(b"", length=False)) -> Answer:
    """`head`, and then the same for ever, as fast as it is read."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        while True:
            writer.write(piece)
            await writer.drain()
            await asyncio.sleep(0)

    return answer


def silent(head: bytes = b"") -> Answer:
    """`head`, and nothing more; the connection stays open until the client goes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(head)
        await writer.drain()
        await reader.read()

    return answer


class Names:
    """A resolver that a test scripts: each look-up of a name takes its next answer, the last one stays."""

    def __init__(self, **answers: list[str]) -> None:
        self._answers = {name.replace("_", "."): list(given) for name, given in answers.items()}
        self.asked: list[str] = []

    async def __call__(self, host: str) -> list[Address]:
        self.asked.append(host)
        answers = self._answers.get(host.rstrip("."), [""])
        given = answers.pop(0) if len(answers) > 1 else answers[0]
        return [ip_address(text) for text in given.split()]

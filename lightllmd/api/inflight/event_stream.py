"""Server-sent events: one task waits on one signal, however many entries it answers."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import Protocol

from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from lightllmd.api.inflight.pending import Pending
from lightllmd.errors import ClientClosed, RequestError

HELD = b": held\n\n"  # SSE comments: they keep proxies and clients from giving up
WAITING = b": waiting\n\n"
DONE = b"data: [DONE]\n\n"  # ends OpenAI's streams
_HEADERS = [
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
    (b"content-type", b"text/event-stream; charset=utf-8"),
]


class Frames(Protocol):
    """Turns what the entries gained since the last call into bytes of SSE frames."""

    def take(self) -> bytes:
        """Empty where nothing came."""

    def end(self) -> bytes:
        """After the last token."""

    def error(self, error: RequestError) -> bytes:
        """The last frame of a stream that has started and can't go on."""

    def idle(self, comment: bytes) -> bytes:
        """What keeps a quiet stream alive, instead of `comment`."""
        return comment


def _start(response: Response) -> Message:
    return {"type": "http.response.start", "status": 200, "headers": response.raw_headers}


async def _send_last(send: Send, body: bytes) -> None:
    """The end of a stream. OpenAI's last frame gets a chunk of its own: some clients compare whole chunks with it."""
    if body.endswith(DONE) and len(body) > len(DONE):
        await send({"type": "http.response.body", "body": body.removesuffix(DONE), "more_body": True})
        body = DONE
    await send({"type": "http.response.body", "body": body, "more_body": False})


class EventStream(Response):
    """Server-sent events, straight onto ASGI: all that came since the last wake-up goes out in one send.

    The status line waits for the first token or comment, so that a refusal by the engine still gets its own status: it
    is raised. An answer that is broken off from our side after a token was sent ends as any other, with "abort" as its
    finish reason: not in OpenAI's list, but what other servers say too, and "length" would be a lie.
    """

    def __init__(
        self,
        pending: Pending,
        frames: Frames,
        streams: set[EventStream],
        headers: Mapping[str, str] | None = None,
        before_end: Callable[[], Awaitable[None]] | None = None,
    ) -> None:
        """`headers`: beside the usual ones. `before_end`: awaited when all is known and the client wasn't told yet."""
        self.status_code = 200
        self.raw_headers = list(_HEADERS)
        if headers:
            self.raw_headers += [(name.encode(), value.encode()) for name, value in headers.items()]
        self.background = None
        self.body = b""
        self.pending = pending
        self.frames = frames
        self.last_sent = asyncio.get_running_loop().time()
        self._comment = b""
        self._before_end = before_end
        self.started = False  # the status line is sent
        self._streams = streams  # those that are open, for keep_alive

    def keep_alive(self, now: float, idle: float) -> None:
        """Asks for a comment if nothing was sent for `idle` seconds."""
        if now - self.last_sent >= idle:
            self.last_sent = now
            self._comment = HELD if self.pending.held else WAITING
            self.pending.signal.set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        pending, frames, loop = self.pending, self.frames, asyncio.get_running_loop()
        watcher = asyncio.create_task(pending.watch(receive))
        self._streams.add(self)
        try:
            while True:
                await pending.signal.wait()
                error = pending.error
                if isinstance(error, ClientClosed):
                    return
                if error is not None and not self.started:
                    raise error
                if error is not None and pending.aborted and pending.generated:
                    error = None  # the branches show it as their finish
                done = pending.done
                body = frames.take()
                if error is not None:
                    body = frames.error(error) if pending.aborted else body + frames.error(error)
                elif done:
                    body += frames.end()
                elif not body and self._comment:
                    body = frames.idle(self._comment)
                self._comment = b""
                last = done or error is not None
                if not body and not last:
                    continue
                if not self.started:
                    self.started = True
                    await send(_start(self))
                self.last_sent = loop.time()
                if last:
                    if self._before_end is not None:
                        await self._before_end()
                    await _send_last(send, body)
                    return
                await send({"type": "http.response.body", "body": body, "more_body": True})
        finally:
            self._streams.discard(self)
            watcher.cancel()
            pending.cancel()


class LateStream(Response):
    """Stands in for a stream whose request waits at the gate, or for its images: comments every `idle` seconds until
    `make` has made the real one, which goes on from there. What `make` raises is told by `error_frame` once the status
    line is sent."""

    def __init__(
        self, make: Callable[[], Awaitable[Response]], error_frame: Callable[[RequestError], bytes], idle: float
    ) -> None:
        self.status_code = 200
        self.raw_headers = list(_HEADERS)
        self.background = None
        self.body = b""
        self._make = make
        self._error_frame = error_frame
        self._idle = idle

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        making = asyncio.ensure_future(self._make())
        started = False
        try:
            while not (await asyncio.wait({making}, timeout=self._idle))[0]:
                if not started:
                    started = True
                    await send(_start(self))
                await send({"type": "http.response.body", "body": HELD, "more_body": True})
            stream = making.result()
        except RequestError as error:
            if not started:
                raise
            await _send_last(send, self._error_frame(error))
            return
        finally:
            making.cancel()
        assert isinstance(stream, EventStream)
        stream.started = started
        have = {name for name, _ in stream.raw_headers}
        stream.raw_headers += [(name, value) for name, value in self.raw_headers if name not in have]
        await stream(scope, receive, send)

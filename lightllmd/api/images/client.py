"""An api worker's way to the visual worker of a revision. It outlives visual workers: what they had been shown is shown
again to the next one, from the files of the images, which are kept here in memory without a name."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightllmd.errors import InvalidRequest, NotReady, QueueFull, RequestError
from lightllmd.ipc.images import (
    FromVisual,
    ImageFacts,
    ImageSource,
    ImageStream,
    NotSeen,
    Seen,
    Show,
    Unshow,
    to_visual,
)
from lightllmd.requests.images import AskedImage

log = logging.getLogger(__name__)
RETRY = 0.1  # seconds between attempts to reach a visual worker that is not there


@dataclass(eq=False)
class _Shown:
    """A request's images. `memories` goes with `sources`: first what the client wrote, then the files."""

    number: int
    sources: list[ImageSource]
    memories: list[int]
    answer: asyncio.Future[list[ImageFacts]]
    release_from: Callable[[_Shown], None]
    facts: Sequence[ImageFacts] = field(default_factory=list)

    def release(self) -> None:
        """The request needs them no more. A second time nothing happens."""
        self.release_from(self)


class VisualClient:
    """`path`: of the visual worker's socket; `hold_timeout`: seconds that a request waits while none is there.
    Everything happens in the event loop of the first `show`."""

    def __init__(self, path: str, hold_timeout: float) -> None:
        self._path, self._hold_timeout = path, hold_timeout
        self._numbers = itertools.count(1)
        self._shown: dict[int, _Shown] = {}
        self._stream: ImageStream[FromVisual] | None = None
        self._connected = asyncio.Event()
        self._lost = asyncio.Event()  # of the connection that is there, or comes next
        self._connecting: asyncio.Task[None] | None = None

    @property
    def held(self) -> int:
        """Requests whose images are held, or looked at."""
        return len(self._shown)

    async def show(self, images: Sequence[AskedImage]) -> _Shown:
        """See `Sight.show`. While no visual worker is there the request is held."""
        memories: list[int] = []
        try:
            for image in images:
                if image.kind == "data":
                    memories.append(os.memfd_create("lightllmd-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING))
                    await asyncio.to_thread(_write, memories[-1], image.content)
        except BaseException as failure:
            _close(memories)
            if isinstance(failure, OSError):
                raise NotReady(f"an image cannot be held: {failure.strerror}") from None
            raise
        sources = [_source(image) for image in images]
        answer: asyncio.Future[list[ImageFacts]] = asyncio.get_running_loop().create_future()
        shown = _Shown(next(self._numbers), sources, memories, answer, self._release)
        self._shown[shown.number] = shown
        if self._stream is not None:
            self._send(Show(shown.number, sources), memories)
        self._connect_if_needed()
        try:
            while not answer.done():
                await self._connection(answer)
                if not answer.done():
                    lost = asyncio.ensure_future(self._loss())
                    try:
                        await asyncio.wait((answer, lost), return_when=asyncio.FIRST_COMPLETED)
                    finally:
                        lost.cancel()
            shown.facts = answer.result()
        except NotSeenError as refusal:
            shown.release()
            raise refusal.of(images) from None
        except BaseException:
            shown.release()
            raise
        return shown

    # --- connection ----------------------------------------------------------------------------------------------
    async def _connection(self, answer: asyncio.Future[list[ImageFacts]]) -> None:
        """Raises NotReady where none comes about in time."""
        try:
            async with asyncio.timeout(self._hold_timeout):
                await self._connected.wait()
        except TimeoutError:
            raise NotReady(f"the visual worker did not come back within {self._hold_timeout:g} s") from None

    async def _loss(self) -> None:
        """Until the present connection is gone."""
        stream = self._stream
        while stream is not None and self._stream is stream:
            await self._lost.wait()

    def _connect_if_needed(self) -> None:
        if self._stream is None and self._shown and (self._connecting is None or self._connecting.done()):
            self._lost = asyncio.Event()
            self._connecting = asyncio.create_task(self._connect())

    async def _connect(self) -> None:
        while self._shown:
            sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            sock.setblocking(False)
            try:
                sock.connect(self._path)
            except OSError:
                sock.close()
                await asyncio.sleep(RETRY)
                continue
            self._stream = to_visual(sock)
            asyncio.get_running_loop().add_reader(sock, self._readable)
            self._connected.set()
            for shown in list(self._shown.values()):
                self._send(Show(shown.number, shown.sources), shown.memories)
            return

    def _send(self, message: Show | Unshow, memories: Sequence[int] = ()) -> None:
        stream = self._stream
        if stream is None:
            return
        try:
            stream.send(message, memories)
        except OSError as failure:
            log.error("images can't be shown: %s", failure)
            stream.closed = True
        if stream.closed:
            self._lose()
        elif stream.pending:
            asyncio.get_running_loop().add_writer(stream.fileno(), self._writable)

    def _writable(self) -> None:
        stream = self._stream
        assert stream is not None
        if not stream.flush():
            self._lose()
        elif not stream.pending:
            asyncio.get_running_loop().remove_writer(stream.fileno())

    def _readable(self) -> None:
        stream = self._stream
        assert stream is not None
        for message, descriptors in stream.receive():
            match message:
                case Seen():
                    descriptors = self._seen(message, descriptors)
                case NotSeen():
                    self._refused(message)
            _close(descriptors)
        if stream.closed:
            self._lose()

    def _seen(self, message: Seen, descriptors: list[int]) -> list[int]:
        """What is to be closed."""
        shown = self._shown.get(message.request)
        if shown is None or shown.answer.done():
            return descriptors  # released meanwhile, or shown again
        old, shown.memories = shown.memories, descriptors
        shown.sources = [ImageSource("bytes") for _ in descriptors]
        shown.answer.set_result(message.facts)
        return old

    def _refused(self, message: NotSeen) -> None:
        shown = self._shown.get(message.request)
        if shown is None:
            return
        if shown.answer.done():
            log.warning("images can't be shown again: %s", message.message)
        else:
            shown.answer.set_exception(NotSeenError(message))

    def _lose(self) -> None:
        """The visual worker is gone."""
        stream, self._stream = self._stream, None
        if stream is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(stream.fileno())
        loop.remove_writer(stream.fileno())
        stream.close()
        self._connected.clear()
        self._lost.set()
        self._connect_if_needed()

    def _release(self, shown: _Shown) -> None:
        if self._shown.pop(shown.number, None) is None:
            return
        _close(shown.memories)
        self._send(Unshow(shown.number))

    def close(self) -> None:
        """Lets go of all."""
        for shown in list(self._shown.values()):
            self._release(shown)
        if self._connecting is not None:
            self._connecting.cancel()
        self._lose()


class NotSeenError(Exception):
    """What the visual worker refused."""

    def __init__(self, message: NotSeen) -> None:
        super().__init__(message.message)
        self._message = message

    def of(self, images: Sequence[AskedImage]) -> RequestError:
        """As a client is told it."""
        refused = self._message
        kind = {429: QueueFull, 503: NotReady}.get(refused.status, InvalidRequest)
        if refused.index is None or refused.index >= len(images):
            return kind(refused.message)
        image = images[refused.index]
        return kind(f"{image.field}: {refused.message}", param=image.field)


def _source(image: AskedImage) -> ImageSource:
    match image.kind:
        case "url":
            return ImageSource("url", url=image.content)
        case "file":
            return ImageSource("file", path=image.content)
    return ImageSource("data")


def _write(fd: int, text: str) -> None:
    with contextlib.closing(os.fdopen(os.dup(fd), "wb")) as file:
        file.write(text.encode())


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())

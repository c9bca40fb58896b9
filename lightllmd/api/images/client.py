"""An api worker's way to the visual worker of a revision. It outlives visual workers: what they had been shown is shown
again to the next one, from the files of the images, which are kept here in memory without a name."""

from __future__ import annotations

import asyncio
import itertools
import logging
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from lightllmd.api.images.held import KeptImageBytes
from lightllmd.errors import InvalidRequest, NotReady, QueueFull, RequestError, RequestFailed
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

    client: VisualClient  # whose they are now; another one's after it migrated
    number: int  # there
    sources: list[ImageSource]
    memories: list[int]
    answer: asyncio.Future[list[ImageFacts]]
    size: int = 0  # bytes of `memories`
    facts: Sequence[ImageFacts] = field(default_factory=list)
    expiry: asyncio.TimerHandle | None = None  # while it waits for a connection
    refused: NotSeen | None = None  # by the visual worker
    lost: RequestError | None = None
    tell_lost: Callable[[RequestError], None] | None = None

    def release(self) -> None:
        """The request needs them no more. A second time nothing happens."""
        self.tell_lost = None
        self.client.release(self)

    def when_lost(self, tell: Callable[[RequestError], None]) -> None:
        """See `SeenImages`."""
        self.tell_lost = tell
        if self.lost is not None:
            tell(self.lost)

    def fail(self, error: RequestError) -> None:
        """They are not seen, or no more."""
        if not self.answer.done():
            self.answer.set_exception(error)
        elif not self.answer.cancelled() and self.lost is None:
            self.lost = error
            if self.tell_lost is not None:
                self.tell_lost(error)

    def patient(self) -> None:
        """It has a connection."""
        if self.expiry is not None:
            self.expiry.cancel()
            self.expiry = None


class VisualClient:
    """`path`: of the visual worker's socket; `hold_timeout`: seconds that a request waits while none is there;
    `held_bytes`: of images, how many are kept here at the most. Everything happens in the event loop of the first
    `show`."""

    def __init__(self, path: str, hold_timeout: float, held_bytes: KeptImageBytes) -> None:
        self._path, self._hold_timeout, self._held_bytes = path, hold_timeout, held_bytes
        self._numbers = itertools.count(1)
        self._shown: dict[int, _Shown] = {}
        self._stream: ImageStream[FromVisual] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._successor: VisualClient | None = None
        self._closed = False

    @property
    def held(self) -> int:
        """Requests whose images are held, or looked at."""
        return len(self._shown)

    async def show(self, images: Sequence[AskedImage]) -> _Shown:
        """See `Sight.show`. While no visual worker is there the request is held."""
        size = sum(len(image.content) for image in images if image.kind == "data")
        self._held_bytes.take(size)
        answer: asyncio.Future[list[ImageFacts]] = asyncio.get_running_loop().create_future()
        shown = _Shown(self, 0, [_source(image) for image in images], [], answer, size)
        try:
            for image in images:
                if image.kind == "data":
                    shown.memories.append(await _written(image.content))
            self._last._take(shown)
            shown.facts = await answer
        except RequestError:
            shown.release()
            if shown.refused is not None:
                raise _refusal(shown.refused, images) from None
            raise
        except OSError as failure:
            shown.release()
            raise NotReady(f"an image cannot be held: {failure.strerror}") from None
        except BaseException:
            shown.release()
            raise
        return shown

    def migrate(self, successor: VisualClient) -> None:
        """The images of all requests, and of those that come here later, are for `successor`'s visual worker from now
        on. What they were seen as does not change by that."""
        moved, self._shown = list(self._shown.values()), {}
        self._successor, successor._successor = successor, None
        self._disconnect()
        for shown in moved:
            successor._take(shown)

    def release(self, shown: _Shown) -> None:
        """Its request has ended. A second time nothing happens."""
        shown.patient()
        if self._shown.get(shown.number) is shown:
            del self._shown[shown.number]
            self._send(Unshow(shown.number))
        _close(shown.memories)
        size, shown.size = shown.size, 0
        self._held_bytes.give_back(size)

    def close(self) -> None:
        """For good: lets go of all. Requests that wait for an answer are told that there will be none."""
        self._closed = True
        for shown in list(self._shown.values()):
            shown.fail(NotReady("the visual worker of this revision is gone"))
            self.release(shown)
        self._disconnect()

    # --- connection ----------------------------------------------------------------------------------------------
    @property
    def _last(self) -> VisualClient:
        """What this one was migrated to, or itself."""
        last = self
        while last._successor is not None:
            last = last._successor
        return last

    def _take(self, shown: _Shown) -> None:
        """It is this one's from now on."""
        shown.client, shown.number = self, next(self._numbers)
        if self._closed:
            shown.fail(NotReady("the visual worker of this revision is gone"))
            return
        self._shown[shown.number] = shown
        if self._stream is None:
            self._await_connection(shown)
            self._connect_if_needed()
        else:
            shown.patient()
            self._send(Show(shown.number, shown.sources), shown.memories)

    def _await_connection(self, shown: _Shown) -> None:
        """One that has no answer waits no longer than `hold_timeout`."""
        if shown.expiry is None and not shown.answer.done():
            why = NotReady(f"the visual worker did not come back within {self._hold_timeout:g} s")
            shown.expiry = asyncio.get_running_loop().call_later(self._hold_timeout, shown.fail, why)

    def _connect_if_needed(self) -> None:
        wanted = self._stream is None and bool(self._shown) and not self._closed
        if wanted and (self._connecting is None or self._connecting.done()):
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
            self._stream = stream = to_visual(sock)
            asyncio.get_running_loop().add_reader(sock, self._readable)
            for shown in list(self._shown.values()):
                if self._stream is not stream:
                    return  # lost again
                shown.patient()
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
        if shown is None:
            return descriptors  # released meanwhile
        if shown.answer.done():
            if shown.facts and [*shown.facts] != message.facts:  # no revision that goes on with requests does that
                shown.fail(RequestFailed("the images of this request are not what they were"))
            return descriptors
        size = sum(os.fstat(file).st_size for file in descriptors)
        try:
            self._held_bytes.take(size, shown.size)
        except RequestError as full:
            shown.fail(full)
            return descriptors
        old, shown.memories, shown.size = shown.memories, descriptors, size
        shown.sources = [ImageSource("bytes") for _ in descriptors]
        shown.answer.set_result(message.facts)
        return old

    def _refused(self, message: NotSeen) -> None:
        shown = self._shown.get(message.request)
        if shown is None:
            return
        if shown.answer.done():
            log.warning("images can't be shown again: %s", message.message)
            again = (
                f"the visual worker was started again and can't see this request's images any more: {message.message}"
            )
            shown.fail(NotReady(again))
        else:
            shown.refused = message
            shown.fail(_refusal(message))

    def _lose(self) -> None:
        """The visual worker is gone; what is held is shown to the next one."""
        if self._stream is None:
            return
        self._disconnect()
        for shown in self._shown.values():
            self._await_connection(shown)
        self._connect_if_needed()

    def _disconnect(self) -> None:
        if self._connecting is not None:
            self._connecting.cancel()
            self._connecting = None
        stream, self._stream = self._stream, None
        if stream is None:
            return
        loop = asyncio.get_running_loop()
        loop.remove_reader(stream.fileno())
        loop.remove_writer(stream.fileno())
        stream.close()


def _refusal(refused: NotSeen, images: Sequence[AskedImage] = ()) -> RequestError:
    """As a client is told it, with the field of the image where it is known which of `images` it was."""
    kind = {429: QueueFull, 500: RequestFailed, 503: NotReady}.get(refused.status, InvalidRequest)
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


async def _written(text: str) -> int:
    """A memfd of it, made in a thread, which ends in its own time where this is cancelled. Raises OSError."""
    making = asyncio.ensure_future(asyncio.to_thread(_memory, text))
    try:
        return await asyncio.shield(making)
    except asyncio.CancelledError:
        making.add_done_callback(lambda made: None if made.cancelled() or made.exception() else os.close(made.result()))
        raise


def _memory(text: str) -> int:
    fd = os.memfd_create("lightllmd-data", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        with open(fd, "wb", closefd=False) as file:
            file.write(text.encode())
    except BaseException:
        os.close(fd)
        raise
    return fd


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())

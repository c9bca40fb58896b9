"""Shows the images of requests to the visual worker of a revision, and again to the next one where it ends.

The files of the images stay here, in memory that has no name, for as long as their request runs: a visual worker that
was started again is shown them before an engine can miss them. Nothing of a client's size is copied on the event loop.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Sequence

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
from lightllmd.requests.seeing import SeenImages

log = logging.getLogger(__name__)

RETRY = 0.1  # seconds between two attempts to connect, while a request waits for it


class ShownToWorker:
    """See `SeenImages`. `files`: memfds, one for each source that has memory; owned here."""

    def __init__(self, client: VisualClient, number: int, images: Sequence[AskedImage]) -> None:
        self.facts: list[ImageFacts] = []
        self.images, self.number = images, number
        self.sources: list[ImageSource] = []
        self.files: list[int] = []
        self.answer: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self.client: VisualClient | None = client  # None: it was released

    def release(self) -> None:
        """See `SeenImages`."""
        if self.client is not None:
            self.client.unshow(self)
            self.client = None
        self.close()

    def close(self) -> None:
        """Lets go of the files."""
        while self.files:
            os.close(self.files.pop())


class VisualClient:
    """A `Sight`. All calls come from one event loop. `patience`: seconds that a request waits for an answer."""

    def __init__(self, patience: float) -> None:
        self._patience = patience
        self._path: str | None = None
        self._shown: dict[int, ShownToWorker] = {}  # that are held, or to be
        self._numbers = 0
        self._stream: ImageStream[FromVisual] | None = None
        self._connecting: asyncio.Task[None] | None = None
        self._closed = False
        self._successor: VisualClient | None = None

    def at(self, path: str) -> None:
        """Where the visual worker of this revision listens."""
        self._path = path
        self._want_connection()

    async def show(self, images: Sequence[AskedImage]) -> SeenImages:
        """See `Sight`."""
        shown = ShownToWorker(self, 0, images)
        try:
            await asyncio.to_thread(_hold, shown)
            self._last._take(shown)
            async with asyncio.timeout(self._patience):
                await shown.answer
        except TimeoutError:
            shown.release()
            raise NotReady(f"the visual worker did not see the request's images within {self._patience:g} s") from None
        except OSError as failure:
            shown.release()
            raise NotReady(f"the request's images cannot be held: {failure.strerror}") from None
        except BaseException:
            shown.release()
            raise
        return shown

    def unshow(self, shown: ShownToWorker) -> None:
        """Its request has ended."""
        if self._shown.pop(shown.number, None) is not None and self._stream is not None:
            self._put(Unshow(shown.number))

    def migrate(self, successor: VisualClient) -> None:
        """What is held here is for another visual worker from now on."""
        moved, self._shown = list(self._shown.values()), {}
        self._successor = successor
        self.close()
        for shown in moved:
            successor._take(shown)

    def close(self) -> None:
        """For good; what waits for an answer is told that there will be none."""
        self._closed = True
        if self._connecting is not None:
            self._connecting.cancel()
        self._disconnect()
        for shown in list(self._shown.values()):
            _fail(shown, NotReady("the visual worker is gone"))

    @property
    def _last(self) -> VisualClient:
        """What this one was migrated to, or itself."""
        last = self
        while last._successor is not None:
            last = last._successor
        return last

    def _take(self, shown: ShownToWorker) -> None:
        self._numbers += 1
        shown.client, shown.number = self, self._numbers
        self._shown[shown.number] = shown
        self._send(shown)

    # --- the connection -------------------------------------------------------------------------------------------

    def _send(self, shown: ShownToWorker) -> None:
        if self._stream is None:
            self._want_connection()
        else:
            self._put(Show(shown.number, shown.sources), shown.files)

    def _put(self, message: Show | Unshow, files: Sequence[int] = ()) -> None:
        stream = self._stream
        assert stream is not None
        try:
            alive = stream.send(message, files)
        except (OSError, ValueError) as failure:
            log.error("the visual worker can't be told of images: %s", failure)
            alive = False
        if alive:
            self._watch_writing(stream)
        else:
            self._lost()

    def _want_connection(self) -> None:
        wanted = self._path is not None and bool(self._shown) and self._stream is None and not self._closed
        if wanted and self._connecting is None:
            self._connecting = asyncio.get_running_loop().create_task(self._connect())

    async def _connect(self) -> None:
        """Until it is there, or no request waits for it."""
        try:
            while self._shown and self._stream is None:
                try:
                    self._stream = await _opened(str(self._path))
                except OSError:
                    await asyncio.sleep(RETRY)
        finally:
            self._connecting = None
        if self._stream is not None:
            asyncio.get_running_loop().add_reader(self._stream.fileno(), self._heard)
            for shown in list(self._shown.values()):
                if self._stream is not None:
                    self._send(shown)

    def _watch_writing(self, stream: ImageStream[FromVisual]) -> None:
        loop = asyncio.get_running_loop()
        if stream.pending:
            loop.add_writer(stream.fileno(), self._writable)
        else:
            loop.remove_writer(stream.fileno())

    def _writable(self) -> None:
        if self._stream is None:
            return
        if self._stream.flush():
            self._watch_writing(self._stream)
        else:
            self._lost()

    def _lost(self) -> None:
        """It will be started again; what is held is shown to that one."""
        self._disconnect()
        self._want_connection()

    def _disconnect(self) -> None:
        if self._stream is not None:
            loop = asyncio.get_running_loop()
            loop.remove_reader(self._stream.fileno())
            loop.remove_writer(self._stream.fileno())
            self._stream.close()
            self._stream = None

    def _heard(self) -> None:
        stream = self._stream
        if stream is None:
            return
        for message, files in stream.receive():
            if isinstance(message, Seen):
                self._seen(message, files)
                continue
            for file in files:
                os.close(file)
            if isinstance(message, NotSeen):
                self._not_seen(message)
        if stream.closed and stream is self._stream:
            self._lost()

    def _seen(self, message: Seen, files: list[int]) -> None:
        shown = self._shown.get(message.request)
        if shown is None or shown.answer.done() or len(files) != len(message.facts):
            for file in files:
                os.close(file)
            return
        shown.close()
        shown.facts, shown.files = message.facts, files
        shown.sources = [ImageSource("bytes")] * len(files)
        shown.answer.set_result(None)

    def _not_seen(self, message: NotSeen) -> None:
        """Of a request that was seen before, its engine hears from the visual worker itself."""
        shown = self._shown.get(message.request)
        if shown is not None and not shown.answer.done():
            _fail(shown, _refusal(message, shown.images))


def _hold(shown: ShownToWorker) -> None:
    """Copies what the request has of its images into memory of their own. Raises OSError."""
    for image in shown.images:
        if image.kind == "data":
            memory = os.memfd_create("lightllmd-asked", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
            shown.files.append(memory)
            view = memoryview(image.content.encode())
            while view:
                view = view[os.write(memory, view) :]
            shown.sources.append(ImageSource("data"))
        elif image.kind == "file":
            shown.sources.append(ImageSource("file", path=image.content))
        else:
            shown.sources.append(ImageSource("url", url=image.content))


async def _opened(path: str) -> ImageStream[FromVisual]:
    """Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.setblocking(False)
    try:
        await asyncio.get_running_loop().sock_connect(sock, path)
    except BaseException:
        sock.close()
        raise
    return to_visual(sock)


def _refusal(message: NotSeen, images: Sequence[AskedImage]) -> RequestError:
    index = message.index
    field = images[index].field if index is not None and index < len(images) else None
    words = message.message if field is None else f"{field}: {message.message}"
    if message.status == QueueFull.status:
        return QueueFull(words, retry_after=1.0)
    if message.status >= 500:
        return NotReady(words)
    return InvalidRequest(words) if field is None else InvalidRequest(words, param=field)


def _fail(shown: ShownToWorker, error: RequestError) -> None:
    if not shown.answer.done():
        shown.answer.set_exception(error)
        with contextlib.suppress(BaseException):  # it may be that no one awaits it any more
            shown.answer.exception()

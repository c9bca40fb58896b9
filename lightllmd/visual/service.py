"""The visual worker's service: connections, what they show and want, batches of images on their way to the encoder.

All state belongs to one event loop, which neither fetches, decodes nor encodes itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import time
from collections import defaultdict, deque
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lightllmd.errors import InvalidRequest, LightllmdError, NotReady, RequestError
from lightllmd.ipc.images import (
    ImageFacts,
    ImageSource,
    ImageStream,
    NotSeen,
    Seen,
    Show,
    ToVisual,
    Unknown,
    Unshow,
    Want,
    Wanted,
    of_client,
)
from lightllmd.visual.encoders import EncodedImage, PictureEncoder
from lightllmd.visual.image_file import MemoryWriter
from lightllmd.visual.store import ImageRecord, ImageStore, StoredEmbedding
from lightllmd.visual.viewing import Viewed, Viewer

log = logging.getLogger(__name__)
SHOWN_TOGETHER = 64  # requests whose images are fetched, decoded, or wait for room at a time


@dataclass(eq=False)
class VisualPeer:
    """A connection: an api worker, or an engine."""

    stream: ImageStream[ToVisual]
    shows: dict[int, asyncio.Task[None]] = field(default_factory=dict)
    held: set[int] = field(default_factory=set)  # requests


class Holder(NamedTuple):
    """Whose reference it is: `client` is its connection's number."""

    client: int
    request: int


@dataclass
class Counts:
    """Since the start of the process."""

    encoded: int = 0  # images
    batches: int = 0
    seconds: float = 0.0  # of encoding
    failed: int = 0  # images that could not be encoded


class ImageService:
    """`viewer.view` gives images with what the encoder takes of them; its `known` should be `store.__contains__`."""

    def __init__(
        self,
        store: ImageStore,
        viewer: Viewer,
        encoder: PictureEncoder,
        *,
        data_type: str,
        batch: int,
        room_timeout: float,
    ) -> None:
        self.store, self._viewer, self._encoder = store, viewer, encoder
        self._data_type, self._batch, self._room_timeout = data_type, batch, room_timeout
        self.counts = Counts()
        self.clients: set[VisualPeer] = set()
        self._shown = asyncio.Semaphore(SHOWN_TOGETHER)
        self._wanted: dict[bytes, list[VisualPeer]] = defaultdict(list)  # keys of images that are not encoded yet
        self._line: deque[asyncio.Future[None]] = deque()  # requests that wait for room, the first that came first
        self._work = asyncio.Event()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._listener: socket.socket | None = None

    # --- connections ---------------------------------------------------------------------------------------------
    def listen(self, path: str) -> None:
        """Raises OSError."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.setblocking(False)
        self._listener.bind(path)
        self._listener.listen(64)
        asyncio.get_running_loop().add_reader(self._listener, self._accept)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            sock, _ = self._listener.accept()
        except OSError:
            return
        self.connect(sock)

    def connect(self, sock: socket.socket) -> None:
        """A client is there."""
        client = VisualPeer(of_client(sock))
        self.clients.add(client)
        asyncio.get_running_loop().add_reader(sock, self._readable, client)

    def _readable(self, client: VisualPeer) -> None:
        for message, descriptors in client.stream.receive():
            match message:
                case _ if client not in self.clients:
                    pass  # an answer could not be sent
                case Show():
                    self._show(client, message, descriptors)
                    continue
                case Unshow():
                    self._release(client, message.request)
                case Want():
                    self._want(client, message.key)
            for descriptor in descriptors:
                os.close(descriptor)
        if client.stream.closed:
            self._lose(client)

    def _lose(self, client: VisualPeer) -> None:
        """It is gone: so are its references."""
        if client not in self.clients:
            return
        self.clients.discard(client)
        asyncio.get_running_loop().remove_reader(client.stream.fileno())
        asyncio.get_running_loop().remove_writer(client.stream.fileno())
        client.stream.close()
        for waiting in self._wanted.values():
            while client in waiting:
                waiting.remove(client)
        for request in [*client.shows, *client.held]:
            self._release(client, request)

    def _send(self, client: VisualPeer, message: Any, descriptors: list[int]) -> None:
        if client not in self.clients:
            return
        try:
            client.stream.send(message, descriptors)
        except OSError as failure:
            log.error("%s can't be sent: %s", type(message).__name__, failure)
            client.stream.closed = True
        if client.stream.closed:
            self._lose(client)
        elif client.stream.pending:
            asyncio.get_running_loop().add_writer(client.stream.fileno(), self._writable, client)

    def _writable(self, client: VisualPeer) -> None:
        if not client.stream.flush():
            self._lose(client)
        elif not client.stream.pending:
            asyncio.get_running_loop().remove_writer(client.stream.fileno())

    # --- requests ------------------------------------------------------------------------------------------------
    def _show(self, client: VisualPeer, show: Show, descriptors: list[int]) -> None:
        memories = sum(source.has_memory for source in show.images)
        if len(descriptors) != memories or show.request in client.shows or show.request in client.held:
            for descriptor in descriptors:
                os.close(descriptor)
            client.stream.closed = True  # no client of ours
            return
        task = self._spawn(self._look_at(client, show, descriptors))
        client.shows[show.request] = task

        def ended(_: object) -> None:
            # Here, since a task that is cancelled before its first step runs none of its own code.
            while descriptors:
                os.close(descriptors.pop())
            client.shows.pop(show.request, None)

        task.add_done_callback(ended)

    async def _look_at(self, client: VisualPeer, show: Show, descriptors: list[int]) -> None:
        viewed: list[Viewed] = []
        try:
            if len(show.images) > self.store.capacity:
                raise InvalidRequest(f"{len(show.images)} images: at most {self.store.capacity}, cache_capacity")
            async with self._shown:
                memories = iter(descriptors)
                sources = [(one, next(memories) if one.has_memory else -1) for one in show.images]
                viewed = await self._viewer.view(sources)
                facts = [self._facts(index, one) for index, one in enumerate(viewed)]
                await self._hold(Holder(id(client), show.request), viewed)
            if client not in self.clients:
                self.store.release(Holder(id(client), show.request))
                self._room_made()
                return
            client.held.add(show.request)
            self._work.set()
            self._send(client, Seen(show.request, facts), [one.file.fd for one in viewed])
        except RequestError as refusal:
            index = refusal.parameters.get("index")
            self._send(client, NotSeen(show.request, refusal.status, refusal.message, index), [])
        except OSError as failure:
            self._send(client, NotSeen(show.request, 503, f"an image can't be held: {failure.strerror}"), [])
        except Exception:  # a fault of our own: the request that waits for an answer gets one
            log.exception("images can't be seen")
            self._send(client, NotSeen(show.request, 500, "the images could not be processed"), [])
        finally:
            for one in viewed:
                one.file.close()

    def _facts(self, index: int, one: Viewed) -> ImageFacts:
        try:
            layout = self._encoder.layout(one.width, one.height)
        except RequestError as refusal:
            refusal.parameters.setdefault("index", index)
            raise
        return ImageFacts(one.key, one.width, one.height, layout.tokens, layout.grid)

    async def _hold(self, holder: Holder, viewed: list[Viewed]) -> None:
        """All images, as soon as there is room for all: a request that waits holds none, so that no two wait for each
        other, and none that came later takes its room. Raises NotReady."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._room_timeout
        await self._prepare_again(viewed)
        passes = not self._line or all(one.key in self.store for one in viewed)  # these need no room
        if passes and self.store.hold(holder, [(one.key, one.prepared) for one in viewed]):
            return
        turn: asyncio.Future[None] = loop.create_future()
        self._line.append(turn)
        self._room_made()
        try:
            while True:
                async with asyncio.timeout_at(deadline):
                    await turn
                await self._prepare_again(viewed)
                if self.store.hold(holder, [(one.key, one.prepared) for one in viewed]):
                    return
                self._line[0] = turn = loop.create_future()
        except TimeoutError:
            raise NotReady(
                f"no room for {len(viewed)} images within {self._room_timeout:g} s: all {self.store.capacity} of "
                "cache_capacity are in use by other requests, [images] room_timeout"
            ) from None
        finally:
            self._line.remove(turn)
            self._room_made()

    async def _prepare_again(self, viewed: list[Viewed]) -> None:
        """What was known when it was looked at, and has been evicted meanwhile."""
        for index, one in enumerate(viewed):
            while one.prepared is None and not self._kept(one.key):
                again = await self._viewer.view([(ImageSource("bytes"), one.file.fd)])
                again[0].file.close()
                viewed[index].prepared = again[0].prepared

    def _kept(self, key: bytes) -> bool:
        record = self.store.get(key)
        return record is not None and (record.embedding is not None or record.prepared is not None)

    def _room_made(self) -> None:
        """The first that waits for room tries again."""
        if self._line and not self._line[0].done():
            self._line[0].set_result(None)

    def _release(self, client: VisualPeer, request: int) -> None:
        if (task := client.shows.get(request)) is not None:
            task.cancel()
        client.held.discard(request)
        self.store.release(Holder(id(client), request))
        self._room_made()

    # --- embeddings ----------------------------------------------------------------------------------------------
    def _want(self, client: VisualPeer, key: bytes) -> None:
        record = self.store.get(key)
        if record is None:
            self._send(client, Unknown(key), [])
        elif record.embedding is not None:
            self._send(client, Wanted(key, record.embedding.shape, self._data_type), [record.embedding.fd])
        elif record.failed:
            self._send(client, Unknown(key, record.failed), [])
        elif client not in self._wanted[key]:
            self._wanted[key].append(client)

    async def encode_for_ever(self) -> None:
        """What waits, in batches. Raises OutOfMemory and what else the encoder can't go on with."""
        while True:
            await self._work.wait()
            self._work.clear()
            while batch := self.store.waiting(self._batch):
                await self._encode(batch)

    async def _encode(self, batch: list[ImageRecord]) -> None:
        """A batch that fails is encoded one by one, so that one image takes none with it."""
        begun = time.monotonic()
        try:
            made = await asyncio.to_thread(self._in_memory, [one.prepared for one in batch])
        except (MemoryError, LightllmdError):
            raise
        except Exception as fault:
            if len(batch) > 1:
                for record in batch:
                    await self._encode([record])
                return
            log.exception("an image can't be encoded")
            self.counts.failed += 1
            made = [None]
            why = str(fault) or type(fault).__name__
        else:
            why = ""
            self.counts.encoded += len(batch)
        self.counts.batches += 1
        self.counts.seconds += time.monotonic() - begun
        for record, embedding in zip(batch, made, strict=True):
            self.store.encoded(record, embedding, why)
            for client in self._wanted.pop(record.key, []):
                self._want(client, record.key)
        self._room_made()

    def _in_memory(self, prepared: list[Any]) -> list[StoredEmbedding | None]:
        """In a thread."""
        return [_sealed(one) for one in self._encoder.encode(prepared)]

    # --- life ----------------------------------------------------------------------------------------------------
    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def close(self) -> None:
        """Lets go of all clients and all memory."""
        if self._listener is not None:
            asyncio.get_running_loop().remove_reader(self._listener)
            path = self._listener.getsockname()
            self._listener.close()
            with contextlib.suppress(OSError):
                os.unlink(path)
        for client in list(self.clients):
            self._lose(client)
        for task in list(self._tasks):
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.store.close()


def _sealed(one: EncodedImage) -> StoredEmbedding:
    with MemoryWriter() as out:
        out.write([one.values])
        file = out.finish()
    fd, file.fd = file.fd, -1
    return StoredEmbedding(fd, file.size, one.shape)

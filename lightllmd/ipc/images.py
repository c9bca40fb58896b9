"""Messages between visual worker, api workers and engines, and the stream that carries them with descriptors.

Images and embeddings are never inside a message: each is a sealed memfd that goes beside it (SCM_RIGHTS, unix(7)). The
process that has the descriptor has the memory, whatever becomes of the one that made it, and nothing has a name that
could be left behind.

A message is six bytes (length, number of descriptors, big-endian), then MessagePack. The kernel delivers descriptors in
the order in which they were sent, never behind the first byte that they were sent with, so that those of a message are
there when it is whole.
"""

from __future__ import annotations

import array
import errno
import os
import socket
import struct
from collections import deque
from collections.abc import Iterator, Sequence
from pathlib import PurePath
from typing import Any, Generic, Literal, TypeAlias, TypeVar

import msgspec

LARGEST = 16 << 20  # bytes of a message: some thousand URLs of the longest kind
MOST_DESCRIPTORS = 4096  # beside one message
MOST_WAITING = 64 << 20  # bytes that wait for a peer that does not read
_HEAD = struct.Struct("!IH")
_TOGETHER = 250  # descriptors in one call; SCM_MAX_FD is 253
_CHUNK = 1 << 16
_FULL = (errno.ETOOMANYREFS, errno.EMFILE, errno.ENOBUFS, errno.ENOMEM)


def visual_path(directory: str, revision: int) -> str:
    """The Unix socket of a revision's visual worker, in the directory of the engines' endpoints."""
    return str(PurePath(directory) / f"visual-{revision}")


# --- api -> visual worker -------------------------------------------------------------------------------------------


class ImageSource(msgspec.Struct, frozen=True, omit_defaults=True):
    """One image. Of "data" and "bytes" a memfd goes beside the message, in the order of the sources: the text that the
    client wrote (base64, or a data URI of it), or the image's file."""

    kind: Literal["url", "data", "bytes", "file"]
    url: str = ""
    path: str = ""

    @property
    def has_memory(self) -> bool:
        """Whether a descriptor goes with it."""
        return self.kind in ("data", "bytes")


class Show(msgspec.Struct, tag="show"):
    """All images of a request, or of a part of it, which are kept until `Unshow`, or the end of the connection."""

    request: int  # chosen by the sender, unique on its connection
    images: list[ImageSource]


class Unshow(msgspec.Struct, tag="unshow"):
    """The request needs its images no more, whether it was answered or not."""

    request: int


# --- engine -> visual worker ----------------------------------------------------------------------------------------


class Want(msgspec.Struct, tag="want"):
    """The embedding of an image, as soon as there is one."""

    key: bytes  # see `messages.ImageSpan.key`


ToVisual: TypeAlias = Show | Unshow | Want


# --- visual worker -> api -------------------------------------------------------------------------------------------


class ImageFacts(msgspec.Struct, frozen=True):
    """What is known of an image; of the same content, the same."""

    key: bytes  # see `messages.ImageSpan.key`
    width: int  # pixels, as EXIF turns it
    height: int
    tokens: int  # that it is in a prompt
    grid: tuple[int, int, int]  # see `messages.ImageSpan.grid`


class Seen(msgspec.Struct, tag="seen"):
    """Beside it a memfd of each image's file, which shows it again ("bytes") to another visual worker."""

    request: int
    facts: list[ImageFacts]


class NotSeen(msgspec.Struct, tag="not-seen"):
    """Nothing is kept for the request."""

    request: int
    status: int  # as HTTP has them
    message: str
    index: int | None = None  # of the image that is to blame


# --- visual worker -> engine ----------------------------------------------------------------------------------------


class Wanted(msgspec.Struct, tag="wanted"):
    """Beside it a sealed memfd of `shape` values, little-endian."""

    key: bytes
    shape: tuple[int, int, int]  # [1 + deepstack, tokens, hidden]
    data_type: str  # the plan's


class Unknown(msgspec.Struct, tag="unknown"):
    """It is not known here (any more): an api worker that waits for an answer shows it again. Ask again. With `why` it
    can't be encoded."""

    key: bytes
    why: str = ""


FromVisual: TypeAlias = Seen | NotSeen | Wanted | Unknown

_to_visual: msgspec.msgpack.Decoder[ToVisual] = msgspec.msgpack.Decoder(ToVisual)
_from_visual: msgspec.msgpack.Decoder[FromVisual] = msgspec.msgpack.Decoder(FromVisual)
_encoder = msgspec.msgpack.Encoder()
T = TypeVar("T")


class ImageStream(Generic[T]):
    """One end; `T` is what it receives. Never waits: what the peer does not read yet waits here, up to MOST_WAITING."""

    def __init__(self, sock: socket.socket, decoder: msgspec.msgpack.Decoder[T]) -> None:
        sock.setblocking(False)
        self.sock, self._decoder = sock, decoder
        self._outbox: deque[tuple[memoryview, list[int]]] = deque()
        self._waiting = 0  # bytes of the outbox
        self._inbox = bytearray()
        self._descriptors: deque[int] = deque()  # received, of messages that are not whole yet
        self.closed = False  # the peer is gone, or is none of ours

    def fileno(self) -> int:
        """Of the socket, for a selector."""
        return self.sock.fileno()

    @property
    def pending(self) -> bool:
        """Something waits for the peer: call `flush` when the socket is writable."""
        return bool(self._outbox)

    def send(self, message: Any, descriptors: Sequence[int] = ()) -> bool:
        """Now or later, with copies of `descriptors`, which stay the caller's. False: the peer is gone, or so far
        behind that it is given up. Raises ValueError for a message that is too large, OSError where no descriptor is
        left."""
        body = _encoder.encode(message)
        if len(body) > LARGEST or len(descriptors) > MOST_DESCRIPTORS:
            raise ValueError(f"{type(message).__name__}: {len(body)} bytes, {len(descriptors)} descriptors")
        if self.closed:
            return False
        if self._waiting > MOST_WAITING:
            self.closed = True
            return False
        copies: list[int] = []
        try:
            for descriptor in descriptors:
                copies.append(os.dup(descriptor))
        except OSError:
            _close(copies)
            raise
        data = memoryview(_HEAD.pack(len(body), len(descriptors)) + body)
        self._waiting += len(data)
        # All but the last chunk of them go with a byte each.
        while len(copies) > _TOGETHER:
            self._outbox.append((data[:1], copies[:_TOGETHER]))
            data, copies = data[1:], copies[_TOGETHER:]
        self._outbox.append((data, copies))
        return self.flush()

    def flush(self) -> bool:
        """Sends as much of what waits as the peer takes; False when it is gone."""
        try:
            while self._outbox:
                data, copies = self._outbox[0]
                beside = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", copies))] if copies else []
                sent = self.sock.sendmsg([data], beside)
                _close(copies)
                self._waiting -= sent
                if sent == len(data):
                    self._outbox.popleft()
                else:
                    self._outbox[0] = (data[sent:], [])
        except BlockingIOError:
            pass
        except OSError as failure:
            if failure.errno in _FULL:
                return True  # as many descriptors are under way as may be; the peer's reading makes room
            self.closed = True
            return False
        return True

    def receive(self) -> Iterator[tuple[T, list[int]]]:
        """Every message that is there now with its descriptors, which the caller owns. Sets `closed` at the end of
        file, and where the peer does not keep to the protocol."""
        while not self.closed:
            try:
                chunk, beside, flags, _ = self.sock.recvmsg(
                    _CHUNK, socket.CMSG_SPACE(_TOGETHER * 4), socket.MSG_CMSG_CLOEXEC
                )
            except BlockingIOError:
                return
            except OSError:
                chunk, beside, flags = b"", [], 0
            for level, kind, data in beside:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    self._descriptors.extend(array.array("i", data[: len(data) - len(data) % 4]))
            self._inbox += chunk
            if not chunk or flags & socket.MSG_CTRUNC:  # cut: this process may open no more
                self.closed = True
            yield from self._messages()

    def _messages(self) -> Iterator[tuple[T, list[int]]]:
        while len(self._inbox) >= _HEAD.size:
            length, count = _HEAD.unpack_from(self._inbox)
            if length > LARGEST or count > MOST_DESCRIPTORS:
                self.closed = True
                return
            end = _HEAD.size + length
            if len(self._inbox) < end:
                return
            if len(self._descriptors) < count:
                self.closed = True
                return
            body = bytes(self._inbox[_HEAD.size : end])
            del self._inbox[:end]
            descriptors = [self._descriptors.popleft() for _ in range(count)]
            try:
                message = self._decoder.decode(body)
            except msgspec.DecodeError:
                _close(descriptors)
                self.closed = True
                return
            yield message, descriptors

    def close(self) -> None:
        """Lets go of all that waits in either direction."""
        self.closed = True
        for _, copies in self._outbox:
            _close(copies)
        self._outbox.clear()
        _close(list(self._descriptors))
        self._descriptors.clear()
        self.sock.close()


def of_client(sock: socket.socket) -> ImageStream[ToVisual]:
    """The visual worker's end of a connection."""
    return ImageStream(sock, _to_visual)


def to_visual(sock: socket.socket) -> ImageStream[FromVisual]:
    """An api worker's or an engine's end of one."""
    return ImageStream(sock, _from_visual)


def _close(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())

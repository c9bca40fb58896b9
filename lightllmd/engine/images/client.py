"""The engine's end of its connection to the visual worker: which embeddings are here, and which are asked for."""

from __future__ import annotations

import fcntl
import logging
import mmap
import os
import select
import socket
from collections.abc import Set
from weakref import WeakValueDictionary

from lightllmd.engine.images.prompt_images import ImageEmbedding
from lightllmd.ipc import images

log = logging.getLogger(__name__)

FIRST_RETRY, LAST_RETRY = 0.05, 1.0  # seconds until something is tried once more, doubled each time
_ITEM = {"float32": 4, "bfloat16": 2, "float16": 2}  # bytes
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_WRITE


class EmbeddingClient:
    """Never waits. `handle` is called when `fileno` is readable and when `due` has come; what the visual worker says in
    the meantime, dies of or begins anew with is no concern of who asks.

    An embedding stays mapped for as long as anyone has a reference to it, so that no key is asked for twice meanwhile.
    """

    def __init__(self, path: str, data_type: str, token_bytes: int) -> None:
        """`path`: of the visual worker's socket, which need not be there yet. `token_bytes`: of each token's numbers,
        all layers together."""
        self._path, self._data_type, self._token_bytes = path, data_type, token_bytes
        self._poll = select.epoll(flags=select.EPOLL_CLOEXEC)
        self._link: images.ImageStream[images.FromVisual] | None = None
        self._connects_at, self._patience = 0.0, FIRST_RETRY  # seconds on the caller's clock; seconds
        self._known: WeakValueDictionary[bytes, ImageEmbedding] = WeakValueDictionary()
        self._wanted: dict[bytes, float] = {}  # patience with each key that is asked for, seconds
        self._unasked: dict[bytes, float] = {}  # of those, when to ask, where no answer is on its way

    def fileno(self) -> int:
        """Readable when `handle` has something to do."""
        return self._poll.fileno()

    @property
    def mapped(self) -> int:
        """Embeddings that are here."""
        return len(self._known)

    @property
    def wanted(self) -> int:
        """Keys that are asked for."""
        return len(self._wanted)

    def find(self, key: bytes, now: float) -> ImageEmbedding | None:
        """None: it is asked for, and comes by `handle`."""
        embedding = self._known.get(key)
        if embedding is None and key not in self._wanted:
            self._wanted[key], self._unasked[key] = FIRST_RETRY, now
            self._ask(now)
        return embedding

    def keep(self, keys: Set[bytes]) -> None:
        """Others are not wanted any more."""
        self._wanted = {key: patience for key, patience in self._wanted.items() if key in keys}
        self._unasked = {key: due for key, due in self._unasked.items() if key in keys}

    @property
    def due(self) -> float:
        """When `handle` has something to do of its own accord; inf: never."""
        if not self._wanted:
            return float("inf")
        if self._link is None:
            return self._connects_at
        return min(self._unasked.values(), default=float("inf"))

    def handle(self, now: float) -> dict[bytes, ImageEmbedding | str]:
        """Those that came, or why there are none of them. `now`: seconds of any clock, the same for all calls."""
        come: dict[bytes, ImageEmbedding | str] = {}
        if self._link is not None:
            for message, descriptors in self._link.receive():
                try:
                    if isinstance(message, images.Wanted | images.Unknown):
                        self._take(message, descriptors, now, come)
                finally:
                    for descriptor in descriptors:
                        os.close(descriptor)
            self._link.flush()
            if self._link.closed:
                self._disconnect(now)
        self._ask(now)
        return come

    def close(self) -> None:
        """What is mapped stays so."""
        if self._link is not None:
            self._link.close()
        self._poll.close()

    def _take(
        self,
        message: images.Wanted | images.Unknown,
        descriptors: list[int],
        now: float,
        come: dict[bytes, ImageEmbedding | str],
    ) -> None:
        key = message.key
        if key not in self._wanted:
            return
        if isinstance(message, images.Unknown) and not message.why:
            self._unasked[key] = now + self._wanted[key]
            self._wanted[key] = min(2 * self._wanted[key], LAST_RETRY)
            return
        del self._wanted[key]
        self._unasked.pop(key, None)
        if isinstance(message, images.Unknown):
            come[key] = message.why
        elif (embedding := self._mapped(message, descriptors)) is None:
            come[key] = "the visual worker's embedding of the image can't be used"
        else:
            self._known[key] = come[key] = embedding

    def _mapped(self, message: images.Wanted, descriptors: list[int]) -> ImageEmbedding | None:
        """None: it is not what this engine can use."""
        layers, tokens, hidden = message.shape
        size = layers * tokens * hidden * _ITEM.get(message.data_type, 0)
        fits = min(message.shape) > 0 and size == tokens * self._token_bytes and message.data_type == self._data_type
        try:
            if not fits or len(descriptors) != 1:
                raise ValueError(f"{message.shape} of {message.data_type}")
            (descriptor,) = descriptors
            if fcntl.fcntl(descriptor, fcntl.F_GET_SEALS) & _SEALS != _SEALS or os.fstat(descriptor).st_size != size:
                raise ValueError("a file that may change, or of another size")
            # A private mapping: older kernels allow no shared one of what is sealed against writing.
            memory = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        except (ValueError, OSError) as error:
            log.error("the visual worker's embedding can't be used: %s", str(error))
            return None
        return ImageEmbedding(layers, tokens, memoryview(memory))

    def _ask(self, now: float) -> None:
        """For what is due, over a connection that is made if it is time for that."""
        if not self._unasked or (self._link is None and not self._connect(now)):
            return
        assert self._link is not None
        for key in [key for key, due in self._unasked.items() if due <= now]:
            del self._unasked[key]
            self._link.send(images.Want(key))
        if self._link.closed:
            self._disconnect(now)
            return
        events = select.EPOLLIN | (select.EPOLLOUT if self._link.pending else 0)
        self._poll.modify(self._link.fileno(), events)

    def _connect(self, now: float) -> bool:
        if now < self._connects_at:
            return False
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        sock.setblocking(False)
        try:
            sock.connect(self._path)
        except OSError:
            sock.close()
            self._connects_at, self._patience = now + self._patience, min(2 * self._patience, LAST_RETRY)
            return False
        self._link, self._patience = images.to_visual(sock), FIRST_RETRY
        self._poll.register(self._link.fileno(), select.EPOLLIN)
        return True

    def _disconnect(self, now: float) -> None:
        """What is wanted is asked of the next visual worker."""
        assert self._link is not None
        self._poll.unregister(self._link.fileno())
        self._link.close()
        self._link, self._connects_at = None, now + FIRST_RETRY
        self._unasked = dict.fromkeys(self._wanted, now)

"""The bytes of an image, as it came: in memory without a name that other processes can be handed."""

from __future__ import annotations

import fcntl
import os
import threading
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from lightllmd.errors import InvalidRequest, NotReady

_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SEAL


class ImageRefused(InvalidRequest):
    """An image of a request can't be had or can't be used. The message names what is wrong, its value and its bound;
    which image of the request it is, says who knows."""


def new_memory(name: str) -> int:
    """A memfd, to be written and then sealed. Raises OSError."""
    return os.memfd_create(f"lightllmd-{name}", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def seal(fd: int) -> None:
    """Nothing changes in it any more, for any process that has it. Raises OSError while it is mapped to be written."""
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)


class HeldBytes:
    """How many bytes of images this process holds, at most `most`. For any thread."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.held = 0
        self._changing = threading.Lock()

    def take(self, size: int) -> None:
        """Raises NotReady where there is no room for so many more."""
        with self._changing:
            if self.held + size > self.most:
                raise NotReady(f"images of {self.held} bytes are held; at most {self.most} may be")
            self.held += size

    def give_back(self, size: int) -> None:
        """So many are held no more."""
        with self._changing:
            self.held -= size


@dataclass
class ImageFile:
    """`fd`: a sealed memfd of `size` bytes, which this owns. `held`: where it counts until it is closed."""

    fd: int
    size: int
    held: HeldBytes | None = None

    @classmethod
    def of(cls, data: bytes | memoryview) -> ImageFile:
        """A copy of `data`. Raises OSError."""
        with MemoryWriter() as out:
            out.write([data])
            return out.finish()

    def read(self) -> bytes:
        """All of it, copied."""
        return os.pread(self.fd, self.size, 0)

    def close(self) -> None:
        """Lets go of the memory; others that have the descriptor keep it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)
            if self.held is not None:
                self.held.give_back(self.size)

    def __del__(self) -> None:
        self.close()  # what a thread has made for a task that was cancelled meanwhile

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryWriter:
    """An image's bytes on their way into a memfd, which is closed unless all went well."""

    def __init__(self, held: HeldBytes | None = None) -> None:
        """Raises OSError."""
        self._fd = new_memory("image")
        self._held = held
        self.size = 0  # bytes so far

    def write(self, parts: Iterable[bytes | memoryview]) -> None:
        """Behind what is there. Raises OSError, and NotReady where too much is held."""
        for part in parts:
            view = memoryview(part)
            if self._held is not None:
                self._held.take(len(view))
            self.size += len(view)
            while view:
                view = view[os.write(self._fd, view) :]

    def finish(self) -> ImageFile:
        """Sealed."""
        seal(self._fd)
        fd, self._fd = self._fd, -1
        return ImageFile(fd, self.size, self._held)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            if self._held is not None:
                self._held.give_back(self.size)

"""The bytes of an image, as it came: in memory without a name that other processes can be handed."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from lightllmd.errors import InvalidRequest

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


@dataclass
class ImageFile:
    """`fd`: a sealed memfd of `size` bytes, which this owns."""

    fd: int
    size: int

    @classmethod
    def of(cls, data: bytes | memoryview) -> ImageFile:
        """A copy of `data`. Raises OSError."""
        with MemoryWriter("image") as out:
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

    def __del__(self) -> None:
        self.close()  # what a thread has made for a task that was cancelled meanwhile

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class MemoryWriter:
    """An image's bytes on their way into a memfd, which is closed unless all went well."""

    def __init__(self, name: str) -> None:
        """Raises OSError."""
        self._fd = new_memory(name)
        self.size = 0  # bytes so far

    def write(self, parts: Iterable[bytes | memoryview]) -> None:
        """Behind what is there. Raises OSError."""
        for part in parts:
            view = memoryview(part)
            self.size += len(view)
            while view:
                view = view[os.write(self._fd, view) :]

    def finish(self) -> ImageFile:
        """Sealed."""
        seal(self._fd)
        fd, self._fd = self._fd, -1
        return ImageFile(fd, self.size)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._fd >= 0:
            os.close(self._fd)

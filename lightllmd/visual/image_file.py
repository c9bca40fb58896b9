"""The bytes of an image, as it came: in memory without a name that other processes can be handed."""

from __future__ import annotations

import fcntl
import os
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
        fd = new_memory("image")
        try:
            view = memoryview(data)
            while view:
                view = view[os.write(fd, view) :]
            seal(fd)
        except BaseException:
            os.close(fd)
            raise
        return cls(fd, len(data))

    def read(self) -> bytes:
        """All of it, copied."""
        return os.pread(self.fd, self.size, 0)

    def close(self) -> None:
        """Lets go of the memory; others that have the descriptor keep it."""
        fd, self.fd = self.fd, -1
        if fd >= 0:
            os.close(fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

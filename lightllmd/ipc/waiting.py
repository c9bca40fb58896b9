"""Waiting for descriptors of any number: `select.select` knows those below 1024 alone, and a process may hold more."""

from __future__ import annotations

import select
from collections.abc import Iterable
from typing import Protocol


class HasDescriptor(Protocol):
    """A socket, or what else is one descriptor."""

    def fileno(self) -> int:
        """The descriptor."""


def wait_ready(
    reading: Iterable[int | HasDescriptor], seconds: float | None = None, writing: Iterable[int | HasDescriptor] = ()
) -> bool:
    """Until one can be read, or written, or has ended; at most so long (None: for ever). False: the time has passed."""
    poll = select.poll()
    for source in reading:
        poll.register(source, select.POLLIN)
    for source in writing:
        poll.register(source, select.POLLOUT)
    return bool(poll.poll(None if seconds is None else seconds * 1000))

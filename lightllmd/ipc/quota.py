"""What API keys have used of their limits, in memory that the supervisor makes and all api workers share.

It belongs to none of them: the death of an engine changes nothing, that of an api worker ends the requests that it had.

A limit per minute is a token bucket that holds a minute's worth. Of a bucket one number is kept: when it is full again
if nothing more is taken (GCRA's theoretical arrival time, ITU-T I.371), a minute ahead at most while it is not
overdrawn. A changed limit needs no conversion. Requests in flight are counted in a column for each api worker, which
alone writes it.

Layout, little-endian: for each of `_SLOTS` slots 8 bytes that stand for the name of its key, 0: free; then the slots,
each two buckets in nanoseconds of the monotonic clock and `COLUMNS` counts of 16 bits. What is read and written
together is locked by byte ranges of the file; the kernel drops the locks of a process that dies.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import logging
import mmap
import os
import struct
import time
import weakref
from collections.abc import Callable, Iterator
from typing import Literal

log = logging.getLogger(__name__)

Bucket = Literal["requests", "tokens"]

MINUTE = 60 * 10**9  # nanoseconds
COLUMNS = 256  # api workers at a time: 64, each with replacements on their way in and out
_SLOTS = 8192  # names of keys with limits, over the life of a daemon
_BUCKETS: dict[Bucket, int] = {"requests": 0, "tokens": 8}  # offset in a slot
_COUNTS = 16
_SLOT = _COUNTS + 2 * COLUMNS
_FIRST = 8 * _SLOTS  # offset of the slots
_SIZE = _FIRST + _SLOTS * _SLOT
_TRIES = 100  # to get a lock: a holder that was stopped must not stop the others
_MOST = (1 << 16) - 1


class Quota:
    """One process's view. `clock`: nanoseconds, the same for all processes."""

    def __init__(self, fd: int | None = None, column: int = 0, clock: Callable[[], int] = time.monotonic_ns) -> None:
        """`fd`: of the memory, which this object closes; None: new memory. `column`: where this process counts."""
        self.fd = os.memfd_create("lightllmd-quota") if fd is None else fd
        if fd is None:
            os.ftruncate(self.fd, _SIZE)
        self._closing = weakref.finalize(self, os.close, self.fd)
        self._memory = mmap.mmap(self.fd, _SIZE)
        self._column = column % COLUMNS
        self._clock = clock
        self._places: dict[str, int] = {}  # offset of the slot, by name

    def close(self) -> None:
        """Of this view; else the end of the process, or of the last reference to it, does."""
        self._memory.close()
        self._closing()

    # --- buckets --------------------------------------------------------------------------------------------------

    def take(self, name: str, bucket: Bucket, amount: int, limit: int) -> float | None:
        """Takes `amount` of a bucket of `limit` per minute if it is there. Else nothing is taken: seconds until it will
        be; inf: it never will, as it is more than the limit. None: taken."""
        if amount > limit:
            return float("inf")
        cost = amount * MINUTE // limit
        with self._bucket(name, bucket) as at:
            now = self._clock()
            full_at = max(self._number(at), now) + cost
            if full_at - now > MINUTE:
                return (full_at - now - MINUTE) / 1e9
            self._set(at, full_at)
        return None

    def charge(self, name: str, bucket: Bucket, amount: int, limit: int) -> None:
        """Takes `amount` whether it is there or not: what is overdrawn has to come in first. Negative: gives back."""
        with self._bucket(name, bucket) as at:
            now = self._clock()
            self._set(at, max(max(self._number(at), now) + amount * MINUTE // limit, now))

    def left(self, name: str, bucket: Bucket, limit: int) -> tuple[int, float]:
        """How much may be taken now, and seconds until the bucket is full."""
        ahead = max(0, self._number(self._slot(name) + _BUCKETS[bucket]) - self._clock())
        return max(0, (MINUTE - ahead) * limit // MINUTE), ahead / 1e9

    # --- requests in flight ---------------------------------------------------------------------------------------

    def enter(self, name: str, limit: int) -> bool:
        """Counts a request in flight; False, not counted: `limit` are already. 0: no limit."""
        slot = self._slot(name)
        with self._locked(slot):
            counts = struct.unpack_from(f"<{COLUMNS}H", self._memory, slot + _COUNTS)
            if limit and sum(counts) >= limit:
                return False
            self._count(slot, self._column, counts[self._column] + 1)
        return True

    def leave(self, name: str) -> None:
        """One of them has ended."""
        slot = self._slot(name)
        [count] = struct.unpack_from("<H", self._memory, slot + _COUNTS + 2 * self._column)
        self._count(slot, self._column, count - 1)

    def clear(self, column: int) -> None:
        """The api worker that counted there is dead, or not born yet."""
        for number in range(_SLOTS):
            if self._memory[8 * number : 8 * number + 8] != bytes(8):
                self._count(_FIRST + number * _SLOT, column % COLUMNS, 0)

    # --- memory ---------------------------------------------------------------------------------------------------

    def _slot(self, name: str) -> int:
        """Found by hashing and probing, as in any hash table; a name that is new gets the first free one."""
        if (known := self._places.get(name)) is not None:
            return known
        mark = hashlib.blake2b(name.encode(), digest_size=8).digest()
        mark = mark if any(mark) else b"\1" + bytes(7)
        first = number = int.from_bytes(mark, "little") % _SLOTS
        with self._locked(_SIZE):
            for number in (*range(first, _SLOTS), *range(first)):
                found = self._memory[8 * number : 8 * number + 8]
                if found == bytes(8):
                    self._memory[8 * number : 8 * number + 8] = found = mark
                if found == mark:
                    break
            else:
                log.error("more than %d API keys had limits since the daemon's start: two share theirs", _SLOTS)
        slot = _FIRST + number * _SLOT
        self._places[name] = slot
        return slot

    @contextlib.contextmanager
    def _bucket(self, name: str, bucket: Bucket) -> Iterator[int]:
        slot = self._slot(name)
        with self._locked(slot):
            yield slot + _BUCKETS[bucket]

    @contextlib.contextmanager
    def _locked(self, byte: int) -> Iterator[None]:
        held = False
        for _ in range(_TRIES):
            try:
                fcntl.lockf(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
                held = True
                break
            except OSError:
                os.sched_yield()
        try:
            yield
        finally:
            if held:
                fcntl.lockf(self.fd, fcntl.LOCK_UN, 1, byte)

    def _number(self, at: int) -> int:
        number: int = struct.unpack_from("<q", self._memory, at)[0]
        return number

    def _set(self, at: int, number: int) -> None:
        struct.pack_into("<q", self._memory, at, min(number, (1 << 63) - 1))

    def _count(self, slot: int, column: int, count: int) -> None:
        struct.pack_into("<H", self._memory, slot + _COUNTS + 2 * column, max(0, min(count, _MOST)))

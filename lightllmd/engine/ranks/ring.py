"""A ring of bytes in shared memory, through which one process sends messages of any length to several others.

The memory is a memfd: it has no name and is gone with the last process that has it. Its words have 8 bytes, in the
machine's order; each has one writer, and is read and written as a whole. On x86-64 what is written before a word is
seen before it, which lets a reader spin; elsewhere it waits for its eventfd, whose lock in the kernel orders both.

Word 0: bytes that were written so far, each message's length (8 bytes) and padding (to 8 bytes) included. Word 8: set
while the writer waits. From word 16 on, for each reader: bytes that it has read so far, messages that it has handled,
then `NOTES` words for whatever it tells the writer. Each set fills a cache line. Then come `capacity` bytes of data:
byte n of all lies at n modulo `capacity`. A message that is longer than the ring comes in parts.
"""

from __future__ import annotations

import mmap
import os
import select
from collections.abc import Callable, Sequence

CAPACITY = 4 << 20  # bytes: a hundred steps of many rows, or the masks of as many rows of a large vocabulary
NOTES = 6
_WORD = 8
_LINE = 8  # words of a cache line
_WAITS = _LINE
_FIRST = 2 * _LINE  # of the first reader
_READ, _HANDLED, _NOTE = 0, 1, 2  # among a reader's words
PATIENCE = 0.05  # seconds until who waits for readers looks again, should a wake-up have been missed


class _Ring:
    """One process's view. Owns the descriptors that it is given."""

    def __init__(self, fd: int, readers: int) -> None:
        self.fd = fd
        size = os.fstat(fd).st_size
        self._map = mmap.mmap(fd, size)
        self._bytes = memoryview(self._map)
        self._words = self._bytes.cast("q")
        begin = (_FIRST + readers * _LINE) * _WORD
        self._data = self._bytes[begin:]
        self._lengths = self._words[begin // _WORD :]
        self._capacity = size - begin

    def close(self) -> None:
        """Of this view."""
        for view in (self._lengths, self._data, self._words, self._bytes):
            view.release()
        self._map.close()
        os.close(self.fd)


class RingWriter(_Ring):
    """The writer's end. It makes the memory and the eventfds: one that wakes each reader, and `room`, that wakes the
    writer. Raises OSError where there is no memory for it: taken later, by a write to the mapping, it would end the
    process by SIGBUS."""

    def __init__(self, readers: int, capacity: int = CAPACITY) -> None:
        """`capacity`: a multiple of 8."""
        fd = os.memfd_create("lightllmd-ranks", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(fd, 0, (_FIRST + readers * _LINE) * _WORD + capacity)
        except OSError:
            os.close(fd)
            raise
        super().__init__(fd, readers)
        self.wakes = [os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC) for _ in range(readers)]
        self.room = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._readers = [_FIRST + reader * _LINE for reader in range(readers)]
        self._written = 0  # bytes
        self._oldest = 0  # bytes that all have read, as last looked up
        self.messages = 0  # written so far

    def write(self, body: bytes, wait: Callable[[], None]) -> None:
        """Sends it to all readers. While the slowest one leaves no room, `wait` is called at least every PATIENCE; what
        it raises ends the writing, and the ring can't be used then."""
        size, at = (len(body) + 2 * _WORD - 1) & -_WORD, self._written % self._capacity
        if at + size > self._capacity or self._written + size - self._oldest > self._capacity:
            self._write_in_parts(body, wait)
        else:
            self._lengths[at // _WORD] = len(body)
            self._data[at + _WORD : at + _WORD + len(body)] = body
            self._publish(size)
        self.messages += 1

    def _publish(self, size: int) -> None:
        self._written += size
        self._words[0] = self._written
        for wake in self.wakes:
            os.eventfd_write(wake, 1)

    def _write_in_parts(self, body: bytes, wait: Callable[[], None]) -> None:
        frame = len(body).to_bytes(_WORD, "little") + body + bytes(-len(body) % _WORD)
        rest = memoryview(frame)
        while rest:
            at = self._written % self._capacity
            part = min(len(rest), self._capacity - at, self._room(wait))
            self._data[at : at + part] = rest[:part]
            self._publish(part)
            rest = rest[part:]

    def _room(self, wait: Callable[[], None]) -> int:
        """Bytes that may be written now, at least one."""

        def free() -> int:
            self._oldest = min(self._words[reader + _READ] for reader in self._readers)
            return self._capacity - (self._written - self._oldest)

        self._wait(lambda: free() > 0, wait)
        return free()

    def _wait(self, until: Callable[[], bool], wait: Callable[[], None]) -> None:
        if until():
            return
        poll = select.poll()
        poll.register(self.room, select.POLLIN)
        self._words[_WAITS] = 1
        try:
            while not until():
                wait()
                if poll.poll(PATIENCE * 1000):
                    os.eventfd_read(self.room)
        finally:
            self._words[_WAITS] = 0

    def wait_until_read(self, wait: Callable[[], None]) -> None:
        """Until all readers have taken all that was written."""
        self._wait(lambda: all(self._words[reader + _READ] == self._written for reader in self._readers), wait)

    def wait_until_handled(self, wait: Callable[[], None]) -> None:
        """Until all readers have done what all messages ask for."""
        self._wait(lambda: all(self._words[reader + _HANDLED] >= self.messages for reader in self._readers), wait)

    def notes(self, note: int) -> list[int]:
        """What each reader noted under that number, 0 … NOTES - 1; 0 before it does."""
        return [self._words[reader + _NOTE + note] for reader in self._readers]

    def close(self) -> None:
        """Of the writer's descriptors, too; readers have their own."""
        super().close()
        for fd in (*self.wakes, self.room):
            os.close(fd)


class RingReader(_Ring):
    """The end of reader `index` of `readers`, whose eventfd is `wake`."""

    def __init__(self, fd: int, readers: int, index: int, wake: int, room: int) -> None:
        super().__init__(fd, readers)
        self.wake, self._writer = wake, room
        self._own = _FIRST + index * _LINE
        self._read = self._handled = 0
        self._part = bytearray()  # of a message that is not whole
        self._missing = 0  # its bytes that are still to come, with padding

    def take(self) -> bytes | None:
        """The next message if it is there as a whole."""
        there = self._words[0] - self._read
        if not there:
            return None
        if not self._part and not self._missing:
            at = self._read % self._capacity
            length = self._lengths[at // _WORD]
            size = (length + 2 * _WORD - 1) & -_WORD
            if size <= there and at + size <= self._capacity:
                body = bytes(self._data[at + _WORD : at + _WORD + length])
                self._advance(size)
                return body
            self._missing = size
        return self._take_part(there)

    def _take_part(self, there: int) -> bytes | None:
        while there and self._missing:
            at = self._read % self._capacity
            part = min(there, self._missing, self._capacity - at)
            self._part += self._data[at : at + part]
            self._missing -= part
            there -= part
            self._advance(part)
        if self._missing:
            return None
        frame, self._part = self._part, bytearray()
        return bytes(frame[_WORD : _WORD + int.from_bytes(frame[:_WORD], "little")])

    def _advance(self, size: int) -> None:
        self._read += size
        self._words[self._own + _READ] = self._read
        if self._words[_WAITS]:
            os.eventfd_write(self._writer, 1)

    def sleeps(self) -> bool:
        """Before waiting for `wake` to be readable: True: nothing has come since the last `take`."""
        try:
            os.eventfd_read(self.wake)
        except BlockingIOError:
            pass
        return bool(self._words[0] == self._read)

    def handled(self) -> None:
        """One more message is done."""
        self._handled += 1
        self._words[self._own + _HANDLED] = self._handled
        if self._words[_WAITS]:
            os.eventfd_write(self._writer, 1)

    def note(self, first: int, values: Sequence[int]) -> None:
        """For `RingWriter.notes`: under the numbers from `first` on."""
        for number, value in enumerate(values, first):
            self._words[self._own + _NOTE + number] = value

    def close(self) -> None:
        """Of the reader's descriptors, too."""
        super().close()
        for fd in (self.wake, self._writer):
            os.close(fd)

"""The ring in shared memory: every reader gets every message, whole and in order, whatever their sizes, and a side that
dies leaves the other one able to end."""

from __future__ import annotations

import os
import random
import select
import signal
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightllmd.engine.ranks.ring import RingReader, RingWriter


def reader_of(ring: RingWriter, index: int, readers: int) -> RingReader:
    return RingReader(os.dup(ring.fd), readers, index, os.dup(ring.wakes[index]), os.dup(ring.room))


def never() -> None:
    raise AssertionError("the ring is full")


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(0, 300), max_size=40),
    readers=st.integers(1, 3),
    capacity=st.integers(1, 16).map(lambda words: 8 * words),
    seed=st.integers(0, 1 << 30),
)
def test_every_reader_gets_every_message_in_order(sizes: list[int], readers: int, capacity: int, seed: int) -> None:
    """Readers are as slow as chance has it; messages may be longer than the ring."""
    chance = random.Random(seed)
    sent = [chance.randbytes(size) for size in sizes]
    ring = RingWriter(readers, capacity)
    ends = [reader_of(ring, index, readers) for index in range(readers)]
    taken: list[list[bytes]] = [[] for _ in range(readers)]

    def read_somewhere() -> None:
        """A part of the message that one of the slowest waits for, at least."""
        for index in chance.sample(range(readers), chance.randint(1, readers)):
            if (body := ends[index].take()) is not None:
                taken[index].append(body)

    for body in sent:
        ring.write(body, read_somewhere)
    for end, got in zip(ends, taken, strict=True):
        while (body := end.take()) is not None:
            got.append(body)
        assert end.sleeps()
        end.close()
    ring.close()
    assert taken == [sent] * readers


def in_child(do: Callable[[], None]) -> int:
    pid = os.fork()
    if not pid:
        try:
            do()
        finally:
            os._exit(0)
    return pid


def test_a_sleeping_reader_is_woken_and_a_waiting_writer_too() -> None:
    """Across processes, by eventfds alone: neither side looks by itself as long as the other one sleeps."""
    ring, count = RingWriter(1, 64), 300
    end = reader_of(ring, 0, 1)

    def read_all() -> None:
        for number in range(count):
            while (body := end.take()) is None:
                if end.sleeps():
                    select.select([end.wake], [], [])
            assert body == bytes([number % 256]) * (number % 100)
            end.handled()

    child = in_child(read_all)
    for number in range(count):
        ring.write(bytes([number % 256]) * (number % 100), lambda: None)
    ring.wait_until_handled(lambda: None)
    assert os.waitpid(child, 0)[1] == 0
    ring.close()
    end.close()


class GoneError(Exception):
    pass


def test_a_reader_that_dies_does_not_keep_the_writer() -> None:
    ring = RingWriter(1, 64)
    child = in_child(lambda: signal.pause())
    os.kill(child, signal.SIGKILL)

    def check() -> None:  # the reader's life is watched by the caller
        if os.waitpid(child, os.WNOHANG)[0]:
            raise GoneError

    ring.write(bytes(48), never)
    with pytest.raises(GoneError):
        ring.write(bytes(48), check)
    ring.close()


def test_of_a_writer_that_dies_within_a_message_nothing_is_read() -> None:
    ring = RingWriter(1, 64)
    end = reader_of(ring, 0, 1)

    def write() -> None:
        ring.write(b"whole", never)
        ring.write(bytes(200), lambda: os.kill(os.getpid(), signal.SIGKILL))

    os.waitpid(in_child(write), 0)
    assert end.take() == b"whole"
    assert end.take() is None
    assert end.take() is None
    ring.close()
    end.close()


def test_what_is_handled_and_noted_is_known_of_each_reader() -> None:
    ring = RingWriter(2, 256)
    first, second = (reader_of(ring, index, 2) for index in range(2))
    ring.write(b"a", never)
    handled = []

    def wait() -> None:
        end = (first, second)[len(handled)]
        assert end.take() == b"a"
        end.handled()
        end.note(1, [7 + len(handled), -1])
        handled.append(end)

    ring.wait_until_handled(wait)
    assert len(handled) == 2
    ring.wait_until_read(never)
    assert (ring.notes(0), ring.notes(1), ring.notes(2)) == ([0, 0], [7, 8], [-1, -1])
    for end in (ring, first, second):
        end.close()

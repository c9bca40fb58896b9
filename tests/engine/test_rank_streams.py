"""Messages and acknowledgements between rank 0 and ranks of other hosts, and how these find each other."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from lightllmd.engine.ranks.host_meeting import HostJoin, HostMeeting, join_host, say
from lightllmd.engine.ranks.stream import StreamReader, StreamWriter
from lightllmd.errors import SystemFailure


def patient(seconds: float = 20.0) -> Callable[[], None]:
    """What is called while a writer waits; a bound, never a measure."""
    end = time.monotonic() + seconds

    def wait() -> None:
        assert time.monotonic() < end, "nothing happened"

    return wait


def pair() -> tuple[socket.socket, socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        near = socket.create_connection(server.getsockname())
        far, _ = server.accept()
    return near, far


def read(reader: StreamReader, count: int) -> list[bytes]:
    bodies: list[bytes] = []
    end = time.monotonic() + 20
    while len(bodies) < count:
        assert time.monotonic() < end
        if (body := reader.take()) is not None:
            bodies.append(body)
    return bodies


def write_for_ever(writer: StreamWriter) -> None:
    while True:
        writer.write(bytes(1000), patient())


@pytest.fixture
def two() -> Iterator[tuple[StreamWriter, list[StreamReader]]]:
    pairs = {rank: pair() for rank in (2, 3)}
    writer = StreamWriter({rank: near for rank, (near, _) in pairs.items()})
    readers = [StreamReader(far) for _, far in pairs.values()]
    yield writer, readers
    writer.close()
    for reader in readers:
        reader.close()


def test_messages_of_any_length_come_whole_and_in_order(two: tuple[StreamWriter, list[StreamReader]]) -> None:
    writer, readers = two
    sent = [b"", b"a", b"b" * 100_000, bytes(8 << 20), b"end"]
    got: dict[int, list[bytes]] = {}
    threads = [
        threading.Thread(target=lambda number=number: got.update({number: read(readers[number], len(sent))}))
        for number in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for body in sent:
        writer.write(body, patient())
    for thread in threads:
        thread.join()
    assert got == {0: sent, 1: sent}
    writer.wait_until_read(patient())


def test_the_slowest_reader_is_waited_for_and_notes_are_the_newest(
    two: tuple[StreamWriter, list[StreamReader]],
) -> None:
    writer, (near, far) = two
    writer.write(b"work", patient())
    assert read(near, 1) == read(far, 1) == [b"work"]
    near.handled()
    near.note(2, [5, 6])
    near.note(2, [7])
    with pytest.raises(AssertionError, match="nothing happened"):
        writer.wait_until_handled(patient(0.2))
    far.handled()
    writer.wait_until_handled(patient())
    assert [writer.notes(note) for note in (2, 3)] == [[7, 0], [6, 0]]


def test_unread_acknowledgements_block_nothing(two: tuple[StreamWriter, list[StreamReader]]) -> None:
    """A step says nothing back that rank 0 waits for."""
    writer, readers = two
    for _ in range(3000):
        writer.write(b"step", patient())
        for reader in readers:
            assert read(reader, 1) == [b"step"]
            reader.handled()
    writer.wait_until_handled(patient())


def test_a_write_to_a_rank_that_has_ended_says_so(two: tuple[StreamWriter, list[StreamReader]]) -> None:
    writer, (near, _) = two
    near.close()
    with pytest.raises(SystemFailure, match="has ended"):
        write_for_ever(writer)


# --- the meeting ----------------------------------------------------------------------------------------------------


class Joining(threading.Thread):
    """A rank that joins; `result` or `failure` comes of it."""

    def __init__(self, address: tuple[str, int], rank: int, ranks: int = 4, settings: str = "same") -> None:
        super().__init__(daemon=True)
        self._arguments = (address, rank, ranks, settings)
        self.result: tuple[object, socket.socket, socket.socket] | None = None
        self.failure: SystemFailure | None = None
        self.start()

    def run(self) -> None:
        try:
            self.result = join_host(*self._arguments, time.sleep)
        except SystemFailure as failure:
            self.failure = failure


def test_ranks_of_other_hosts_join_whatever_comes_in_between() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    meeting = HostMeeting(listener, generation=7, ranks=4, remote=range(2, 4), settings="same")
    strangers = [socket.create_connection(address) for _ in range(3)]
    strangers[0].sendall(b"GET / HTTP/1.1\r\n\r\n")  # a message of a gigabyte, as it were
    strangers[1].sendall(b"\x05\x00\x00\x00hello")
    refused = [
        Joining(address, 1),
        Joining(address, 2, ranks=8),
        Joining(address, 2, settings="others"),
    ]
    joining = [Joining(address, 3), Joining(address, 2)]
    steps, life = meeting.gather(4711, patient())
    for one in (*joining, *refused):
        one.join(20)
    assert [str(one.failure) for one in joining] == ["None", "None"]
    for one, why in zip(refused, ("rank 1 is none of 2 to 3", "tp is 8 there and 4 here", "settings"), strict=True):
        assert why in str(one.failure)
    assert list(steps) == list(life) == [2, 3]
    writer = StreamWriter(steps)
    writer.write(b"step", patient())
    for one in joining:
        joined, carried, alive = one.result
        assert (joined.generation, joined.store_port) == (7, 4711)
        reader = StreamReader(carried)
        assert read(reader, 1) == [b"step"]
        alive.close()
        reader.close()
    for connection in life.values():
        assert connection.recv(1) == b""  # the end of its rank is seen
        connection.close()
    writer.close()
    for stranger in strangers:
        stranger.close()


def test_a_rank_that_left_before_all_came_may_come_again() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    meeting = HostMeeting(listener, generation=1, ranks=3, remote=range(1, 3), settings="same")
    early = [socket.create_connection(address) for _ in range(2)]
    for connection, carries in zip(early, ("steps", "life"), strict=True):
        say(connection, HostJoin(1, 3, "same", "early", carries))
    joining: list[Joining] = []
    patience = patient()

    def beat() -> None:
        patience()
        if meeting.here == {1} and not joining:
            for connection in early:
                connection.close()
        elif not meeting.here and early[0].fileno() < 0 and not joining:
            joining.extend([Joining(address, 1, 3), Joining(address, 2, 3)])

    steps, life = meeting.gather(None, beat)
    for one in joining:
        one.join(20)
        assert one.failure is None
        for connection in one.result[1:]:
            connection.close()
    for connection in (*steps.values(), *life.values()):
        connection.close()


def test_a_rank_whose_leader_ends_is_told() -> None:
    listener = socket.create_server(("127.0.0.1", 0))
    address = listener.getsockname()
    meeting = HostMeeting(listener, generation=1, ranks=3, remote=range(1, 3), settings="same")
    joining = Joining(address, 1, 3)  # the other never comes
    end = time.monotonic() + 0.5

    def beat() -> None:
        if time.monotonic() > end:
            raise SystemFailure("stopped")

    with pytest.raises(SystemFailure, match="stopped"):
        meeting.gather(None, beat)
    meeting.close()
    joining.join(20)
    assert "rank 0 at 127.0.0.1" in str(joining.failure)

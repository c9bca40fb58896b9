"""The link between supervisor and child: no message is lost, cut or reordered, and `send` never waits."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import msgspec
import pytest

from lightllmd.ipc import channel, messages
from lightllmd.ipc.channel import Channel

Pair = tuple[Channel[messages.Up], Channel[messages.Down]]


@pytest.fixture
def ends() -> Iterator[Pair]:
    """The supervisor's and the child's, with the smallest buffers that the kernel has."""
    ours, theirs = channel.pair()
    child = Channel(theirs, messages.decode_down)
    for sock in (ours.sock, theirs):
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            sock.setsockopt(socket.SOL_SOCKET, option, 1)
    yield ours, child
    ours.close()
    child.close()


def read_all(sender: Channel, receiver: Channel) -> list:
    found = []
    while sender.pending:
        found += receiver.receive()
        sender.flush()
    return [*found, *receiver.receive()]


@pytest.mark.parametrize("size", [0, 1, 1 << 16, 3 << 20, 20 << 20])
def test_a_message_of_any_size_arrives_whole(size: int, ends: Pair) -> None:
    supervisor, child = ends
    assert supervisor.send(messages.Prepare(1, b"x" * size))
    assert supervisor.send(messages.Commit(1))
    prepare, commit = read_all(supervisor, child)
    assert (len(prepare.plan), commit) == (size, messages.Commit(1))
    assert not child.closed


def test_a_peer_that_does_not_read_loses_no_message_but_heartbeats(ends: Pair) -> None:
    supervisor, child = ends
    for number in range(5000):
        assert child.send(messages.Probed(number, "x" * 100))
    assert child.pending
    assert not child.send(messages.Heartbeat("ready", 1), droppable=True)
    said = read_all(child, supervisor)
    assert [message.number for message in said] == list(range(5000))
    assert child.send(messages.Heartbeat("ready", 2), droppable=True)
    assert [beat.progress for beat in supervisor.receive()] == [2]


def test_a_message_that_is_none_hides_no_other(ends: Pair) -> None:
    supervisor, child = ends
    child.send({"type": "nonsense"})
    child.send(messages.Probed(1))
    with pytest.raises(msgspec.DecodeError):
        list(supervisor.receive())
    assert list(supervisor.receive()) == [messages.Probed(1)]


def test_the_end_is_noticed_after_the_last_whole_message(ends: Pair) -> None:
    supervisor, child = ends
    child.send(messages.Probed(1))
    child.sock.send((100).to_bytes(4) + b"cut off")
    child.close()
    assert list(supervisor.receive()) == [messages.Probed(1)]
    assert supervisor.closed
    assert not supervisor.send(messages.Stop())
    assert not supervisor.pending


def test_what_is_no_peer_of_ours_takes_no_memory(ends: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    supervisor, child = ends
    child.sock.send(b"\xff" * 100)
    assert list(supervisor.receive()) == []
    assert supervisor.closed
    monkeypatch.setattr(channel, "LARGEST", 1000)
    with pytest.raises(ValueError, match="Prepare has 1032 bytes: at most 1000"):
        child.send(messages.Prepare(1, bytes(1000)))

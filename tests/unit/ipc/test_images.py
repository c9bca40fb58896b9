"""The stream of the visual worker: messages of any size with their descriptors, in order, and none left over."""

from __future__ import annotations

import os
import socket

import pytest

from lightllmd.ipc import images
from lightllmd.ipc.images import ImageFacts, ImageSource, NotSeen, Seen, Show, Want, Wanted


def _open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def _memory(content: bytes) -> int:
    fd = os.memfd_create("test")
    os.write(fd, content)
    return fd


def _pair() -> tuple[images.ImageStream[images.ToVisual], images.ImageStream[images.FromVisual]]:
    left, right = socket.socketpair()
    return images.of_client(left), images.to_visual(right)


def test_descriptors_arrive_with_their_message_and_leave_none_behind() -> None:
    before = _open_descriptors()
    worker, client = _pair()
    own = [_memory(b"%d" % number) for number in range(600)]  # more than one call takes
    sources = [ImageSource("bytes") for _ in own] + [ImageSource("url", "http://example.org/" + "x" * 8000)] * 100
    assert client.send(Show(1, sources), own)
    assert client.send(Want(b"k" * 16))
    got: list[tuple[images.ToVisual, list[int]]] = []
    while client.pending or len(got) < 2:
        client.flush()
        got += worker.receive()
    (show, descriptors), (want, none) = got
    assert show == Show(1, sources)
    assert want == Want(b"k" * 16)
    assert none == []
    assert [os.pread(fd, 9, 0) for fd in descriptors] == [b"%d" % number for number in range(600)]
    for fd in own + descriptors:
        os.close(fd)
    for end in (worker, client):
        end.close()
    assert _open_descriptors() == before


def test_each_answer_comes_back_as_it_was_sent() -> None:
    worker, client = _pair()
    sent: list[images.FromVisual] = [
        Seen(1, [ImageFacts(b"k" * 16, 3, 4, 5, (1, 2, 3))]),
        NotSeen(2, 400, "why", 7),
        Wanted(b"k" * 16, (1, 2, 3), "float16"),
        images.Unknown(b"k" * 16),
    ]
    for message in sent:
        assert worker.send(message)
    assert [message for message, _ in client.receive()] == sent
    worker.close()
    assert list(client.receive()) == []
    assert client.closed
    client.close()


def test_what_was_under_way_is_let_go_of() -> None:
    before = _open_descriptors()
    worker, client = _pair()
    memory = _memory(b"x")
    while not client.pending:
        client.send(Show(1, [ImageSource("bytes")]), [memory])
    head = (100).to_bytes(4) + (1).to_bytes(2)
    socket.send_fds(worker.sock, [head], [memory])  # a message that never gets whole
    assert list(client.receive()) == []
    os.close(memory)
    client.close()
    worker.close()
    assert _open_descriptors() == before


@pytest.mark.parametrize(
    "sent",
    [
        (images.LARGEST + 1).to_bytes(4) + bytes(2),
        (0).to_bytes(4) + (images.MOST_DESCRIPTORS + 1).to_bytes(2),
        (1).to_bytes(4) + (1).to_bytes(2) + b"x",  # with no descriptor
        (1).to_bytes(4) + bytes(2) + b"x",  # no message
    ],
)
def test_a_peer_that_keeps_to_no_protocol_is_given_up(sent: bytes) -> None:
    worker, client = _pair()
    client.sock.send(sent)
    assert list(worker.receive()) == []
    assert worker.closed
    client.close()
    worker.close()


def test_a_peer_that_does_not_read_is_given_up_within_bounds() -> None:
    worker, client = _pair()
    message = Show(1, [ImageSource("url", "x" * (4 << 20))])
    sent = 0
    while client.send(message):
        sent += 1
        assert sent < 40
    assert client.closed
    client.close()
    worker.close()

"""sd_notify against a socket that plays systemd."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from leftovers import no_new_descriptors
from lightllmd.supervisor.host.notify import Notifier, is_journal


@pytest.fixture(params=["path", "abstract"])
def systemd(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[socket.socket, str]]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        address = str(tmp_path / "notify") if request.param == "path" else f"@lightllmd-test-{os.getpid()}"
        sock.bind(address.replace("@", "\0", 1))
        sock.settimeout(60)
        yield sock, address
        (tmp_path / "notify").unlink(missing_ok=True)


def test_assignments_arrive_in_one_datagram(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    notifier = Notifier({"NOTIFY_SOCKET": address}, 1)
    assert notifier.send(READY=1, STATUS="Serving demo")
    assert sock.recv(1000) == b"READY=1\nSTATUS=Serving demo"
    notifier.close()


def test_status_is_sent_when_it_changes(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    notifier = Notifier({"NOTIFY_SOCKET": address}, 1)
    for text in ("a", "a", "b"):
        notifier.status(text)
    assert [sock.recv(100), sock.recv(100)] == [b"STATUS=a", b"STATUS=b"]
    notifier.close()


def test_a_reload_is_framed_by_reloading_and_ready(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    notifier = Notifier({"NOTIFY_SOCKET": address}, 1)
    before = time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    notifier.ready()
    notifier.reload_began()
    notifier.reload_ended()
    assert sock.recv(100) == b"READY=1"
    name, _, moment = sock.recv(100).decode().partition("\nMONOTONIC_USEC=")
    assert name == "RELOADING=1"
    assert before <= int(moment) <= time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000
    assert sock.recv(100) == b"READY=1"
    notifier.close()


def test_a_reload_during_the_start_is_not_taken_for_readiness(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    notifier = Notifier({"NOTIFY_SOCKET": address}, 1)
    notifier.reload_began()
    notifier.reload_ended()
    notifier.ready()
    notifier.reload_ended()
    notifier.status("end")
    assert [sock.recv(100), sock.recv(100)] == [b"READY=1", b"STATUS=end"]
    notifier.close()


def test_a_barrier_ends_when_systemd_has_read_it(systemd: tuple[socket.socket, str]) -> None:
    sock, address = systemd
    notifier = Notifier({"NOTIFY_SOCKET": address}, 1)
    with no_new_descriptors():
        assert not notifier.barrier(0.01), "nobody has read it yet"
        reader = threading.Thread(target=_read_barriers, args=(sock, 2))
        reader.start()
        assert notifier.barrier(60)
        reader.join()
    notifier.close()


def _read_barriers(sock: socket.socket, count: int) -> None:
    for _ in range(count):
        message, fds, _, _ = socket.recv_fds(sock, 100, 2)
        assert message == b"BARRIER=1"
        for fd in fds:
            os.close(fd)


def test_nothing_happens_without_systemd() -> None:
    notifier = Notifier({}, 1)
    assert not notifier.active
    assert not notifier.send(READY=1)
    assert not notifier.barrier(60)
    assert notifier.watchdog_interval is None


def test_a_full_or_absent_socket_never_blocks(tmp_path: Path) -> None:
    assert not Notifier({"NOTIFY_SOCKET": str(tmp_path / "none")}, 1).send(READY=1)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "full"))
        notifier = Notifier({"NOTIFY_SOCKET": str(tmp_path / "full")}, 1)
        assert not all(notifier.send(WATCHDOG=1) for _ in range(100_000))
        notifier.close()
    (tmp_path / "full").unlink()


@pytest.mark.parametrize(
    ("environment", "interval"),
    [
        ({"WATCHDOG_USEC": "30000000"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "7"}, 15.0),
        ({"WATCHDOG_USEC": "30000000", "WATCHDOG_PID": "8"}, None),
        ({"WATCHDOG_USEC": "soon"}, None),
        ({}, None),
    ],
)
def test_watchdog_is_fed_at_half_of_what_is_asked(environment: dict[str, str], interval: float | None) -> None:
    assert Notifier({"NOTIFY_SOCKET": "/x", **environment}, 7).watchdog_interval == interval


def test_the_journal_is_known_by_its_stream() -> None:
    reader, writer = os.pipe()
    stat = os.fstat(writer)
    assert is_journal({"JOURNAL_STREAM": f"{stat.st_dev}:{stat.st_ino}"}, writer)
    assert not is_journal({"JOURNAL_STREAM": "1:1"}, writer)
    assert not is_journal({}, writer)
    os.close(reader)
    os.close(writer)

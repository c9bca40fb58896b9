"""HTTP listeners: bound here, or handed over by systemd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from harness import wait_for
from lightllmd.errors import SystemFailure
from lightllmd.supervisor.host import listeners as sockets
from lightllmd.supervisor.host.fd_store import FdStore
from lightllmd.supervisor.host.notify import Notifier
from lightllmd.supervisor.host.unix_listener import UnixAddress


def close(*listeners: socket.socket) -> None:
    for sock in listeners:
        sock.close()


def test_a_port_in_use_is_refused_with_its_holder() -> None:
    with socket.create_server(("127.0.0.1", 0)) as holder:
        port = holder.getsockname()[1]
        with pytest.raises(SystemFailure, match=f"127.0.0.1:{port} is in use by pid {os.getpid()}") as refusal:
            sockets.bind("127.0.0.1", port, sleep=lambda _: None)
    assert refusal.value.exit_code == 71


def test_a_dying_predecessor_is_waited_for() -> None:
    holder = socket.create_server(("127.0.0.1", 0))
    port = holder.getsockname()[1]
    close(*sockets.bind("127.0.0.1", port, sleep=lambda _: holder.close()))


def test_ipv6_and_its_url() -> None:
    try:
        (sock,) = sockets.bind("::1", 0)
    except SystemFailure:
        pytest.skip("this host has no IPv6")
    assert sockets.url(sock) == f"http://[::1]:{sock.getsockname()[1]}"
    assert not sockets.beyond_loopback(sock)
    close(sock)


def test_every_address_of_a_name_gets_the_same_port() -> None:
    listeners = sockets.bind("localhost", 0)
    assert len({sock.getsockname()[1] for sock in listeners}) == 1
    close(*listeners)


@pytest.mark.parametrize(("host", "beyond"), [("127.0.0.1", False), ("0.0.0.0", True), ("", True)])
def test_listening_beyond_loopback_is_noticed(host: str, beyond: bool) -> None:
    listeners = sockets.bind(host, 0)
    assert any(sockets.beyond_loopback(sock) for sock in listeners) == beyond
    close(*listeners)


def test_an_unknown_host_is_refused_by_name() -> None:
    with pytest.raises(SystemFailure, match="resolve host"):
        sockets.bind("nowhere.invalid", 0)


INHERITED = """
import os, sys
from lightllmd.supervisor.host import listeners as sockets
os.environ["LISTEN_PID"] = str(os.getpid())
taken = sockets.inherited(os.environ, os.getpid())
for name, sock in taken:
    print(name, sockets.url(sock), os.get_inheritable(sock.fileno()), "LISTEN_FDS" in os.environ)
"""


def test_sockets_of_systemd_are_taken_and_the_variables_too() -> None:
    with (
        socket.create_server(("127.0.0.1", 0)) as one,
        socket.create_server(("127.0.0.1", 0)) as two,
        socket.socket(socket.AF_UNIX) as three,
    ):
        three.bind("")  # a name of the kernel's choice, without a file
        three.listen()
        # As systemd does it: the sockets are descriptors 3 to 5 of the daemon.
        copies = " ".join(f"{number}<&{sock.fileno()}" for number, sock in enumerate((one, two, three), 3))
        shell = f'exec {copies}; LISTEN_FDS=3 LISTEN_FDNAMES=http:http-0:local exec "$0" -c "$1"'
        answer = subprocess.run(
            ["bash", "-c", shell, sys.executable, INHERITED],
            pass_fds=(one.fileno(), two.fileno(), three.fileno()),
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert answer.stdout.splitlines() == [
            f"http http://127.0.0.1:{one.getsockname()[1]} False False",
            f"http-0 http://127.0.0.1:{two.getsockname()[1]} False False",
            f"local unix:@{three.getsockname()[1:].decode()} False False",
        ], answer.stderr


def test_sockets_meant_for_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
    assert sockets.inherited(environment, 2) == []
    assert not environment, "children must not take them for theirs"


# --- the descriptor store -----------------------------------------------------------------------------------------


class Systemd:
    """The service manager's side: keeps by name what a daemon stores, and hands it to the next daemon."""

    def __init__(self, folder: Path) -> None:
        self.stored: dict[str, int] = {}
        self.units: list[socket.socket] = []  # of a .socket unit
        self._address = str(folder / "notify")
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._socket.bind(self._address)
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def start(
        self, host: str | None, port: int, monkeypatch: pytest.MonkeyPatch, unix: UnixAddress | None = None
    ) -> tuple[list[socket.socket], FdStore]:
        """What a daemon's start does with its listeners."""
        handed = [("http", sock.dup()) for sock in self.units]
        handed += [(name, socket.socket(fileno=os.dup(fd))) for name, fd in self.stored.items()]
        monkeypatch.setattr(sockets, "inherited", lambda environment, pid: handed)
        store = FdStore(Notifier({"NOTIFY_SOCKET": self._address}, 1))
        listeners, _ = sockets.opened(sockets.Where(host, port, unix), {}, 1, store)
        return listeners, store

    def ports(self) -> dict[str, int]:
        """Of what is stored, once everything sent so far is read."""
        assert Notifier({"NOTIFY_SOCKET": self._address}, 1).barrier(60)
        found = {}
        for name, fd in self.stored.items():
            with socket.socket(fileno=os.dup(fd)) as sock:
                found[name] = sock.getsockname()[1]
        return found

    def close(self) -> None:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"END", self._address)
        self._thread.join()
        self._socket.close()
        os.unlink(self._address)
        for fd in self.stored.values():
            os.close(fd)
        close(*self.units)

    def _listen(self) -> None:
        while True:
            message, fds, _, _ = socket.recv_fds(self._socket, 1000, 4)
            if message == b"END":
                return
            words = dict(line.split("=") for line in message.decode().splitlines())
            if words.get("FDSTORE"):
                assert ":" not in words["FDNAME"]
                assert words["FDNAME"] not in self.stored, "systemd removes by name, so a name must mean one descriptor"
                self.stored[words["FDNAME"]] = fds.pop()
            if words.get("FDSTOREREMOVE"):
                os.close(self.stored.pop(words["FDNAME"]))
            for fd in fds:
                os.close(fd)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    systemd = Systemd(tmp_path)
    yield systemd
    systemd.close()


def ports(listeners: list[socket.socket]) -> list[int]:
    return [sock.getsockname()[1] for sock in listeners]


def test_a_unix_socket_outlives_the_daemon_and_goes_where_another_path_is_configured(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tempfile.mkdtemp(prefix="unix-")
    old, new = (UnixAddress(f"{folder}/{name}", 0o660) for name in ("old", "new"))
    first, _ = systemd.start(None, 0, monkeypatch, old)
    assert Notifier({"NOTIFY_SOCKET": systemd._address}, 1).barrier(60)
    close(*first)  # as kill -9 does
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(old.path)
        second, store = systemd.start(None, 0, monkeypatch, old)
        assert [store.holds(sock) for sock in second] == [True]
        accepted = wait_for(lambda: _accept(second[0]))
    close(*second, accepted)
    third, _ = systemd.start(None, 0, monkeypatch, new)
    assert os.listdir(folder) == ["new"]
    sockets.close(third)
    os.rmdir(folder)


def test_a_listener_outlives_the_daemon(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = systemd.start("127.0.0.1", 0, monkeypatch)
    port = ports(first)[0]
    assert systemd.ports() == {"http-0": port}
    close(*first)
    with socket.create_connection(("127.0.0.1", port), timeout=60):
        second, _ = systemd.start("127.0.0.1", port, monkeypatch)
        accepted = wait_for(lambda: _accept(second[0]))
    assert systemd.ports() == {"http-0": port}, "it is there already"
    close(*second, accepted)


def _accept(sock: socket.socket) -> socket.socket | None:
    try:
        return sock.accept()[0]
    except BlockingIOError:
        return None


def test_a_port_chosen_by_the_kernel_stays_over_a_restart(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = systemd.start("localhost", 0, monkeypatch)
    chosen = ports(first)
    close(*first)
    second, _ = systemd.start("localhost", 0, monkeypatch)
    assert ports(second) == chosen
    close(*second)


def test_a_listener_that_fits_the_configuration_no_more_is_given_up(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, _ = systemd.start("127.0.0.1", 0, monkeypatch)
    old = ports(first)[0]
    close(*first)
    second, _ = systemd.start("127.0.0.2", 0, monkeypatch)
    assert list(systemd.ports().values()) == ports(second)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", old), timeout=60)
    close(*second)


def test_the_listeners_of_a_reload_replace_those_in_the_store(
    systemd: Systemd, monkeypatch: pytest.MonkeyPatch
) -> None:
    old, store = systemd.start("127.0.0.1", 0, monkeypatch)
    new = sockets.bind("127.0.0.1", 0)
    store.keep(new)
    assert systemd.ports() == {"http-0": ports(old)[0], "http-1": ports(new)[0]}, "both while either may be needed"
    store.forget(old)
    assert systemd.ports() == {"http-1": ports(new)[0]}
    store.keep(new)
    newer = sockets.bind("127.0.0.1", 0)
    store.keep(newer)
    store.forget(new)
    assert systemd.ports() == {"http-0": ports(newer)[0]}
    close(*old, *new, *newer)


def test_a_socket_unit_takes_the_place_of_host_and_port(systemd: Systemd, monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = systemd.start("127.0.0.1", 0, monkeypatch)
    close(*first)
    systemd.units = sockets.bind("127.0.0.1", 0)
    second, _ = systemd.start("127.0.0.1", ports(systemd.units)[0], monkeypatch)
    assert ports(second) == ports(systemd.units)
    assert systemd.ports() == {}, "the unit keeps its own sockets; those from before it was enabled are gone"
    close(*second)


@pytest.mark.parametrize(("before", "after"), [("127.0.0.1", "0.0.0.0"), ("0.0.0.0", "127.0.0.1")])
def test_our_own_listener_is_not_in_the_way_of_one_beside_it(before: str, after: str) -> None:
    kept = sockets.bind(before, 0)
    port = ports(kept)[0]
    new = sockets.bind(after, port, kept, patience=0)
    assert new[0].getsockname() == (after, port)
    assert new[0] not in kept
    with pytest.raises(SystemFailure, match="in use"):
        sockets.bind(after, port, patience=0)  # as a second daemon would
    close(*kept)
    with socket.create_connection(("127.0.0.1", port), timeout=60):
        close(wait_for(lambda: _accept(new[0])))
    close(*new)


def test_a_listener_that_fits_stays_when_others_are_added() -> None:
    kept = sockets.bind("127.0.0.1", 0)
    listeners = sockets.bind("localhost", ports(kept)[0], kept)
    assert kept[0] in listeners
    close(*listeners)


def test_a_refusal_leaves_those_open_that_were_there() -> None:
    kept = sockets.bind("127.0.0.1", 0)
    with socket.create_server(("127.0.0.1", 0)) as holder, pytest.raises(SystemFailure, match="in use"):
        sockets.bind("127.0.0.1", holder.getsockname()[1], kept, patience=0)
    assert kept[0].fileno() >= 0
    close(*kept)


def test_nothing_is_stored_without_systemd() -> None:
    listeners, activated = sockets.opened(sockets.Where("127.0.0.1", 0, None), {}, 1, FdStore(Notifier({}, 1)))
    assert not activated
    close(*listeners)

"""HTTP listeners: bound here, or handed over by systemd."""

from __future__ import annotations

import os
import socket
import subprocess
import sys

import pytest

from lightllmd.errors import SystemFailure
from lightllmd.supervisor import sockets


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


ACTIVATED = """
import os, sys
from lightllmd.supervisor import sockets
os.environ["LISTEN_PID"] = str(os.getpid())
taken = sockets.activated(os.environ, os.getpid())
print([sockets.url(s) for s in taken], "LISTEN_FDS" in os.environ, [os.get_inheritable(s.fileno()) for s in taken])
"""


def test_sockets_of_systemd_are_taken_and_the_variables_too() -> None:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port, fd = sock.getsockname()[1], sock.fileno()
        # As systemd does it: the socket is descriptor 3 of the daemon.
        shell = f'exec 3<&{fd}; LISTEN_FDS=1 exec "$0" -c "$1"'
        answer = subprocess.run(
            ["bash", "-c", shell, sys.executable, ACTIVATED], pass_fds=(fd,), capture_output=True, text=True, timeout=60
        )
    assert answer.stdout.strip() == f"['http://127.0.0.1:{port}'] False [False]", answer.stderr


def test_sockets_meant_for_another_process_are_left_alone() -> None:
    environment = {"LISTEN_PID": "1", "LISTEN_FDS": "1", "LISTEN_FDNAMES": "x"}
    assert sockets.activated(environment, 2) == []
    assert not environment, "children must not take them for theirs"

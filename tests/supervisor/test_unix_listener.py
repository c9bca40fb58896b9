"""A Unix socket as listener: a stale one is replaced, another's is left alone, and ours is removed."""

from __future__ import annotations

import contextlib
import grp
import os
import shutil
import socket
import stat
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllmd.config.load import load
from lightllmd.errors import ConfigInvalid, SystemFailure
from lightllmd.supervisor.change import preflight
from lightllmd.supervisor.host import listeners, unix_listener
from lightllmd.supervisor.host.listeners import Where
from lightllmd.supervisor.host.unix_listener import UnixAddress


@pytest.fixture
def folder() -> Iterator[Path]:
    """A short name: a socket's path has 107 bytes."""
    made = Path(tempfile.mkdtemp(prefix="unix-"))
    yield made
    shutil.rmtree(made)


@pytest.fixture
def address(folder: Path) -> UnixAddress:
    return UnixAddress(str(folder / "http.sock"), 0o660)


def answers(path: str) -> bool:
    with socket.socket(socket.AF_UNIX) as client:
        try:
            client.connect(path)
        except OSError:
            return False
        return True


@contextlib.contextmanager
def listening_process(path: str) -> Iterator[subprocess.Popen[str]]:
    code = f"import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind({path!r}); s.listen(); print(1, flush=True)"
    words = [sys.executable, "-c", f"{code}; sys.stdin.read()"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None
        other.stdout.readline()
        yield other
        assert other.stdin is not None
        other.stdin.close()


def test_a_socket_has_its_mode_from_the_start_and_goes_at_the_end(address: UnixAddress) -> None:
    sock = unix_listener.bind(address)
    found = os.stat(address.path)
    assert (stat.S_ISSOCK(found.st_mode), stat.S_IMODE(found.st_mode)) == (True, 0o660)
    assert answers(address.path)
    assert listeners.url(sock, tls=True) == f"unix:{address.path}"
    assert not listeners.beyond_loopback(sock)
    listeners.close([sock])
    assert not os.path.exists(address.path)


def test_a_stale_socket_is_replaced(address: UnixAddress) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address.path)
        dead.listen()
    assert not answers(address.path)
    sock = unix_listener.bind(address)
    assert answers(address.path)
    listeners.close([sock])


def test_a_living_ones_is_refused_by_its_process_and_stays(address: UnixAddress) -> None:
    with listening_process(address.path) as other:
        with pytest.raises(SystemFailure, match=rf"{address.path} is in use by pid {other.pid} \(python") as refusal:
            unix_listener.bind(address)
        assert refusal.value.exit_code == 71
        assert answers(address.path)


def test_a_dying_predecessor_is_waited_for(address: UnixAddress) -> None:
    holder = socket.socket(socket.AF_UNIX)
    holder.bind(address.path)
    holder.listen()
    sock = unix_listener.bind(address, patience=30, sleep=lambda _: holder.close())
    assert answers(address.path)
    listeners.close([sock])


@pytest.mark.parametrize("kind", ["file", "folder", "link"])
def test_what_is_no_socket_is_left_alone(address: UnixAddress, kind: str) -> None:
    path = Path(address.path)
    if kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_text("precious")
    else:
        path.symlink_to("elsewhere")
    with pytest.raises(SystemFailure, match="exists and is not a socket"):
        unix_listener.bind(address)
    assert os.path.lexists(path)


def test_a_folder_that_is_not_there_is_told(folder: Path) -> None:
    with pytest.raises(SystemFailure, match=r"none: No such file"):
        unix_listener.bind(UnixAddress(str(folder / "none" / "s"), 0o660))


def test_one_that_is_kept_goes_on_and_may_get_another_mode(address: UnixAddress) -> None:
    sock = unix_listener.bind(address)
    same = unix_listener.bind(UnixAddress(address.path, 0o600), [sock])
    assert same is sock
    assert stat.S_IMODE(os.stat(address.path).st_mode) == 0o600
    # Its path was taken away: clients don't reach it any more.
    os.unlink(address.path)
    other = unix_listener.bind(address, [sock])
    assert other is not sock
    sock.close()
    assert answers(address.path)
    listeners.close([other])


def test_what_another_put_in_its_place_stays(address: UnixAddress) -> None:
    sock = unix_listener.bind(address)
    os.unlink(address.path)
    with listening_process(address.path):
        listeners.close([sock])
        assert answers(address.path)


def test_of_many_that_begin_at_once_one_listens(address: UnixAddress) -> None:
    made: list[socket.socket] = []
    refused: list[str] = []

    def begin() -> None:
        try:
            made.append(unix_listener.bind(address))
        except SystemFailure as failure:
            refused.append(failure.message)

    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(address.path)
        dead.listen()
    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (len(made), len(refused)) == (1, 7)
    assert answers(address.path)
    listeners.close(made)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_socket_gets_its_owner(address: UnixAddress) -> None:
    group = grp.getgrgid(1).gr_name
    sock = unix_listener.bind(UnixAddress(address.path, 0o660, f"1:{group}"))
    found = os.stat(address.path)
    assert (found.st_uid, found.st_gid) == (1, 1)
    listeners.close([sock])


def test_beside_tcp_and_instead_of_it(address: UnixAddress) -> None:
    both = listeners.listen(Where("127.0.0.1", 0, address))
    assert [sock.family for sock in both] == [socket.AF_INET, socket.AF_UNIX]
    alone = listeners.listen(Where(None, 0, address), both)
    assert alone == both[1:]
    listeners.close(both)


def test_where_the_socket_cant_be_had_no_port_stays_taken(address: UnixAddress) -> None:
    Path(address.path).write_text("")
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    with pytest.raises(SystemFailure, match="not a socket"):
        listeners.listen(Where("127.0.0.1", port, address))
    with socket.create_server(("127.0.0.1", port)):
        pass


@pytest.mark.parametrize(
    ("settings", "key", "part"),
    [
        ({"unix_socket": "relative.sock"}, "unix_socket", "is not an absolute path"),
        ({"unix_socket": f"/{'x' * 107}"}, "unix_socket", "a socket path of 108 bytes; at most 107 are possible"),
        ({"unix_socket": "/s", "unix_socket_mode": "0888"}, "unix_socket_mode", "three octal digits"),
        (
            {"unix_socket": "/s", "unix_socket_owner": "nobody-here:none-such"},
            "unix_socket_owner",
            "no user nobody-here",
        ),
        ({"unix_socket": "/s", "unix_socket_owner": "a b"}, "unix_socket_owner", 'of the form "user:group"'),
        ({"tcp": False}, "tcp", "needs http.unix_socket"),
    ],
)
def test_what_cant_be_is_refused_with_the_configuration(settings: dict[str, object], key: str, part: str) -> None:
    flags = {f"http.{name}": value for name, value in settings.items()}
    with pytest.raises(ConfigInvalid) as refused:
        load(None, {"engine.backend": "fake", **flags})
    [problem] = [problem for problem in refused.value.problems if problem.key == f"http.{key}"]
    assert part in problem.message


def test_it_is_not_the_control_socket() -> None:
    flags = {"engine.backend": "fake", "http.unix_socket": "/s", "supervisor.control_socket": "/s"}
    with pytest.raises(ConfigInvalid, match="/s is the control socket"):
        load(None, flags)


def test_a_check_says_where_a_start_could_not_listen(
    address: UnixAddress, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "_facts", lambda *_: pytest.fail("the host is asked first"))
    flags = {"engine.backend": "fake", "http.tcp": False, "http.unix_socket": str(folder / "none" / "s")}
    with pytest.raises(SystemFailure, match="No such file or directory"):
        preflight.look(load(None, flags), None)
    Path(address.path).write_text("")
    with pytest.raises(SystemFailure, match="is not a socket"):
        preflight.look(load(None, flags | {"http.unix_socket": address.path}), None)
    # The folder of the control socket is made by a start.
    flags["supervisor.control_socket"] = str(folder / "none" / "control.sock")
    with pytest.raises(pytest.fail.Exception, match="the host is asked first"):
        preflight.look(load(None, flags), None)

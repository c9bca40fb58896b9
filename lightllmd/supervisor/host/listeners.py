"""The HTTP listeners: bound here or handed to us by systemd; api workers inherit them, connections outlive those.

Two kinds come from systemd: those of a .socket unit, which take the place of host and port, and those that a daemon
before us left in the service's descriptor store (fd_store.py), which are ours again where they fit what is configured.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Callable, Iterable, Iterator, MutableMapping, Sequence
from itertools import zip_longest
from typing import NamedTuple

from lightllmd.config.parameters import Config
from lightllmd.errors import SystemFailure, show
from lightllmd.supervisor.host import unix_listener
from lightllmd.supervisor.host.fd_store import FdStore
from lightllmd.supervisor.host.unix_listener import BACKLOG, UnixAddress

_FIRST_FD = 3  # SD_LISTEN_FDS_START
_PATIENCE = 1.0  # seconds for a predecessor's dying workers to let go of the port


class Where(NamedTuple):
    """What is listened on."""

    host: str | None  # None: no TCP
    port: int
    unix: UnixAddress | None

    @classmethod
    def of(cls, config: Config) -> Where:
        """As it is configured."""
        params, http = config.params, config.http
        return cls(params.host if http.tcp else None, params.port, UnixAddress.of(http))


def opened(
    where: Where, environment: MutableMapping[str, str], pid: int, store: FdStore
) -> tuple[list[socket.socket], bool]:
    """The listeners of a starting daemon, and whether they are a .socket unit's, which then decides where to listen.

    Our own are kept in `store` when this returns. Raises SystemFailure.
    """
    handed = inherited(environment, pid)
    back = store.returned(handed)
    listeners = [sock for _, sock in handed if sock not in back]
    activated = bool(listeners)
    if not activated:
        listeners = listen(where, back)
        store.keep(listeners)
    unused = [sock for sock in back if sock not in listeners]
    store.forget(unused)
    close(unused)
    store.confirm()
    return listeners, activated


def inherited(environment: MutableMapping[str, str], pid: int) -> list[tuple[str, socket.socket]]:
    """Names and sockets of sd_listen_fds_with_names(3), in order; the variables are taken out of `environment`."""
    meant_for_us = environment.get("LISTEN_PID") == str(pid)
    count = environment.get("LISTEN_FDS", "0")
    names = environment.get("LISTEN_FDNAMES", "").split(":")
    for name in ("LISTEN_PID", "LISTEN_FDS", "LISTEN_FDNAMES"):
        environment.pop(name, None)
    if not meant_for_us or not count.isdigit():
        return []
    sockets = []
    for fd, name in zip_longest(range(_FIRST_FD, _FIRST_FD + int(count)), names[: int(count)], fillvalue=""):
        try:
            sock = socket.socket(fileno=int(fd))
        except OSError as broken:
            raise SystemFailure(f"LISTEN_FDS={count}, but descriptor {fd} is no socket: {broken}") from broken
        os.set_inheritable(sock.fileno(), False)
        if sock.type != socket.SOCK_STREAM or not sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise SystemFailure(f"LISTEN_FDS: descriptor {fd} is no listening stream socket")
        sock.setblocking(False)
        sockets.append((name, sock))
    return sockets


def listen(where: Where, kept: Sequence[socket.socket] = (), *, patience: float = _PATIENCE) -> list[socket.socket]:
    """TCP's listeners first, then the Unix socket's; those of `kept` that fit are among them. Raises SystemFailure, and
    then none was added."""
    sockets = [] if where.host is None else bind(where.host, where.port, kept, patience=patience)
    if where.unix is None:
        return sockets
    try:
        return [*sockets, unix_listener.bind(where.unix, kept, patience=patience)]
    except SystemFailure:
        close(sock for sock in sockets if sock not in kept)
        raise


def close(listeners: Iterable[socket.socket]) -> None:
    """Of ours, which nothing shall reach any more: paths of Unix sockets go, too."""
    for sock in listeners:
        if sock.family == socket.AF_UNIX:
            unix_listener.remove(sock)
        sock.close()


def bind(
    host: str,
    port: int,
    kept: Sequence[socket.socket] = (),
    *,
    patience: float = _PATIENCE,
    sleep: Callable[[float], None] = time.sleep,
) -> list[socket.socket]:
    """Listens on every address of `host`; port 0 is chosen once for all of them. Raises SystemFailure.

    `kept` are ours and listen: those that do so where it is asked for are among the result, and none of them is in the
    way (0.0.0.0 beside 127.0.0.1, on the same port). `patience`: seconds for others to let go of the port.
    """
    try:
        found = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
    except socket.gaierror as unknown:
        raise SystemFailure(f"can't resolve host {show(host)}: {unknown.strerror}") from unknown
    except ValueError as impossible:  # no name at all: a label of more than 63 letters, a NUL
        raise SystemFailure(f"can't resolve host {show(host)}: {impossible}") from impossible
    sockets: list[socket.socket] = []
    both_families = len({entry[0] for entry in found}) > 1  # one socket each; else "::" takes IPv4 as well
    deadline = time.monotonic() + patience
    for family, address in dict.fromkeys((entry[0], entry[4]) for entry in found):
        if sockets and port == 0:
            address = (address[0], sockets[0].getsockname()[1], *address[2:])
        if present := next((sock for sock in kept if _listens(sock, family, address, both_families)), None):
            sockets.append(present)
            continue
        while True:
            try:
                with _out_of_the_way(kept):
                    sockets.append(_listen(family, address, both_families, beside=bool(kept)))
                break
            except OSError as refused:
                if refused.errno == errno.EADDRINUSE and time.monotonic() < deadline:
                    sleep(0.05)
                    continue
                # A name may stand for an address that this host doesn't have (::1 without IPv6): the others do.
                if refused.errno in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT) and len(found) > 1:
                    break
                for sock in sockets:
                    if sock not in kept:
                        sock.close()
                raise SystemFailure(_why(refused, host, int(address[1]))) from refused
    if not sockets:
        raise SystemFailure(f"no address of {host!r} can be listened on")
    return sockets


def _listens(sock: socket.socket, family: int, address: tuple, v6_only: bool) -> bool:
    """Whether it listens on `address`, whose port 0 stands for any, in the way that `_listen` would."""
    if sock.family != family:
        return False
    own = sock.getsockname()
    if family == socket.AF_INET6 and bool(sock.getsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY)) != v6_only:
        return False
    return own[0] == address[0] and own[2:] == address[2:] and address[1] in (0, own[1])


@contextlib.contextmanager
def _out_of_the_way(kept: Sequence[socket.socket]) -> Iterator[None]:
    """The kernel lets a wildcard and an address listen beside each other where both say SO_REUSEPORT. They say it for
    this moment only: else a second daemon of this user could take the port as well and get half of the connections.
    """
    ours = [sock for sock in kept if sock.family != socket.AF_UNIX]
    for sock in ours:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    try:
        yield
    finally:
        for sock in ours:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)


def _listen(family: int, address: tuple, v6_only: bool, beside: bool) -> socket.socket:
    """`beside`: others of ours may listen on an overlapping address."""
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, beside)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, v6_only)
        sock.bind(address)
        sock.listen(BACKLOG)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 0)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def _why(refused: OSError, host: str, port: int) -> str:
    if refused.errno == errno.EADDRINUSE:
        return f"{host}:{port} is in use by {holder(port) or 'another process'}"
    if refused.errno == errno.EACCES:
        return f"no permission to listen on {host}:{port}"
    return f"can't listen on {host}:{port}: {refused.strerror}"


def holder(port: int) -> str | None:
    """Who listens on this port, as "pid 812 (nginx)"; None where the host doesn't tell."""
    import psutil  # costs memory that only this failure is worth

    try:
        connections = psutil.net_connections(kind="tcp")
    except psutil.Error:
        return None
    for connection in connections:
        if connection.status == psutil.CONN_LISTEN and connection.laddr.port == port and connection.pid:
            try:
                return f"pid {connection.pid} ({psutil.Process(connection.pid).name()})"
            except psutil.Error:
                return f"pid {connection.pid}"
    return None


def url(sock: socket.socket, tls: bool = False) -> str:
    """As a client writes it; "unix:PATH" for a Unix socket, "unix:@NAME" where it has no path."""
    if sock.family == socket.AF_UNIX:
        name = sock.getsockname()
        return f"unix:{name}" if isinstance(name, str) else f"unix:@{name[1:].decode(errors='replace')}"  # abstract
    address, port = sock.getsockname()[:2]
    scheme = "https" if tls else "http"
    return f"{scheme}://[{address}]:{port}" if sock.family == socket.AF_INET6 else f"{scheme}://{address}:{port}"


def beyond_loopback(sock: socket.socket) -> bool:
    """Whether other hosts can reach it."""
    if sock.family not in (socket.AF_INET, socket.AF_INET6):
        return False
    return not ipaddress.ip_address(sock.getsockname()[0].split("%")[0]).is_loopback

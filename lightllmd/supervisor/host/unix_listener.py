"""A Unix socket that api workers listen on: made where none is, a stale one replaced, and removed when it is ours.

Whose a path is, is asked of the kernel: a connection tells which process called listen(2) (SO_PEERCRED, unix(7)), and
is refused where that socket is closed. Daemons that begin or end at the same moment take turns by a lock on the folder.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import grp
import os
import pwd
import socket
import stat
import struct
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lightllmd.config.parameters import HttpSettings
from lightllmd.errors import SystemFailure

BACKLOG = 4096  # connections that wait while no api worker lives
_STEP = 0.05  # seconds between two looks at whether a path is free
_TRIES, _PAUSE = 20, 0.01  # to get the lock of a folder; seconds between them
_CREDENTIALS = "3i"  # pid, uid, gid


@dataclass(frozen=True)
class UnixAddress:
    """Where to listen, and who may connect: to write to the socket is to connect."""

    path: str
    mode: int
    owner: str = ""  # "user:group", either may be missing; empty: who starts the daemon

    @classmethod
    def of(cls, http: HttpSettings) -> UnixAddress | None:
        """None where none is configured."""
        if not http.unix_socket:
            return None
        return cls(http.unix_socket, int(http.unix_socket_mode, 8), http.unix_socket_owner)


def bind(
    address: UnixAddress,
    kept: Sequence[socket.socket] = (),
    *,
    patience: float = 0.0,
    sleep: Callable[[float], None] = time.sleep,
) -> socket.socket:
    """Listens at `address`. One of `kept` that does so already is the result. `patience`: seconds for another to let go
    of the path. Raises SystemFailure."""
    present = next((sock for sock in kept if _is_at(sock, address.path)), None)
    if present is not None:
        permit(address)
        return present
    deadline = time.monotonic() + patience
    while True:
        with _turn(address.path):
            holder = _listening(address.path)
            if holder is None:
                return _listen(address)
        if time.monotonic() >= deadline:
            raise SystemFailure(f"{address.path} is in use by {_named(holder)}")
        sleep(_STEP)


def check(address: UnixAddress) -> None:
    """Whether it could be listened on, but for a daemon that does: raises SystemFailure."""
    with _turn(address.path):
        _listening(address.path)
        if not os.access(os.path.dirname(address.path), os.W_OK | os.X_OK):
            raise SystemFailure(f"can't listen on {address.path}: its folder can't be written")


def _is_at(sock: socket.socket, path: str) -> bool:
    """Whether it listens there; clients reach it, unless another took the path."""
    if sock.family != socket.AF_UNIX or sock.getsockname() != path:
        return False
    sock.listen(BACKLOG)  # again: from now on it is this process that is told of
    try:
        return _listening(path) == os.getpid()
    except SystemFailure:
        return False


def _listen(address: UnixAddress) -> socket.socket:
    path = address.path
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)  # until it has its owner and mode, no client of another user gets in
    try:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(path)
        sock.bind(path)
        permit(address)
        sock.listen(BACKLOG)
    except OSError as refused:
        sock.close()
        raise SystemFailure(f"can't listen on {path}: {refused.strerror}") from refused
    except SystemFailure:
        os.unlink(path)
        sock.close()
        raise
    finally:
        os.umask(old)
    sock.setblocking(False)
    return sock


def permit(address: UnixAddress) -> None:
    """Gives the socket its owner and mode. Raises SystemFailure."""
    try:
        found = os.stat(address.path)
        uid, gid = ids(address.owner)
        if uid not in (-1, found.st_uid) or gid not in (-1, found.st_gid):  # a sandbox may have no chown
            os.chown(address.path, uid, gid)
        os.chmod(address.path, address.mode)
    except KeyError as unknown:
        raise SystemFailure(f"http.unix_socket_owner: {unknown.args[0]}") from None
    except OSError as refused:
        to = f" to {address.owner}" if address.owner else ""
        raise SystemFailure(f"can't give {address.path}{to} mode {address.mode:04o}: {refused.strerror}") from refused


def ids(owner: str) -> tuple[int, int]:
    """Numbers of "user:group"; -1: not said. Raises KeyError, which says which is unknown."""
    user, _, group = owner.partition(":")
    return (
        -1 if not user else int(user) if user.isdecimal() else pwd.getpwnam(user).pw_uid,
        -1 if not group else int(group) if group.isdecimal() else grp.getgrnam(group).gr_gid,
    )


def remove(sock: socket.socket) -> None:
    """Takes the path of a listener of ours away, before it is closed. What another has put there stays."""
    path = sock.getsockname()
    with contextlib.suppress(OSError, SystemFailure), _turn(path):
        sock.listen(BACKLOG)  # as in `_is_at`
        if _listening(path) in (None, os.getpid()):
            os.unlink(path)


def _listening(path: str) -> int | None:
    """The process that listens there; None: there is nothing, or a socket that no process has open. Raises
    SystemFailure for what is no socket."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return None
    except OSError as refused:
        raise SystemFailure(f"can't look at {path}: {refused.strerror}") from refused
    if not stat.S_ISSOCK(found.st_mode):
        raise SystemFailure(f"{path} exists and is not a socket")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            return None
        except BlockingIOError:
            return 0  # it has all the connections that may wait
        except OSError as refused:
            if refused.errno == errno.ENOENT:
                return None
            raise SystemFailure(f"can't tell whose {path} is: {refused.strerror}") from refused
        size = struct.calcsize(_CREDENTIALS)
        pid, _, _ = struct.unpack(_CREDENTIALS, probe.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size))
    return int(pid)


def _named(pid: int | None) -> str:
    if not pid:
        return "another process"
    import psutil  # costs memory that only this failure is worth

    try:
        return f"pid {pid} ({psutil.Process(pid).name()})"
    except psutil.Error:
        return f"pid {pid}, which is gone, and left it to others"


@contextlib.contextmanager
def _turn(path: str) -> Iterator[None]:
    """Of several daemons that look and bind. Raises SystemFailure."""
    folder = os.path.dirname(path)
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as refused:
        raise SystemFailure(f"can't listen on {path}: {folder}: {refused.strerror}") from refused
    try:
        for _ in range(_TRIES):  # held for moments only; who else holds it is not waited for
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(_PAUSE)
        yield
    finally:
        os.close(fd)

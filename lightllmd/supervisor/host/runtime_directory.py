"""The runtime directory: where the control socket, the engines' sockets and the metrics files of a daemon live.

Several daemons may share one: each has its own control socket with a lock beside it, and whatever else it makes
carries its process number, so that a later start can tell what belongs to the dead.
"""

from __future__ import annotations

import fcntl
import grp
import itertools
import os
import re
import shutil
import socket
import stat
from collections.abc import Mapping
from pathlib import Path

from lightllmd.errors import SystemFailure

GROUP = "lightllmd"
LONGEST_PATH = 107  # bytes of a Unix socket's path (sun_path less its final zero)
_LONGEST_OWN = "ipc/4194304-99999.engine"  # the longest name that is made in the directory


def control_socket_path(configured: str, environment: Mapping[str, str], uid: int) -> Path:
    """Where the control socket is bound: as configured, else in systemd's runtime directory, else root's or the
    user's own."""
    if configured:
        return Path(configured).absolute()
    if environment.get("RUNTIME_DIRECTORY"):
        # systemd lists several separated by colons; ours is the first
        return Path(environment["RUNTIME_DIRECTORY"].split(":")[0]) / "control.sock"
    if uid == 0:
        return Path("/run/lightllmd/control.sock")
    if environment.get("XDG_RUNTIME_DIR"):
        return Path(environment["XDG_RUNTIME_DIR"]) / "lightllmd" / "control.sock"
    return Path(f"/tmp/lightllmd-{uid}/control.sock")


def group_id() -> int | None:
    """Of the group whose members may use the control socket; None where the host has no such group."""
    try:
        return grp.getgrnam(GROUP).gr_gid
    except KeyError:
        return None


class RuntimeDirectory:
    """Holds the lock from construction to `close`. Raises SystemFailure where the place can't be had."""

    def __init__(self, control_socket: Path) -> None:
        self.control_socket = control_socket
        self.directory = control_socket.parent
        self.pid = os.getpid()
        self._metrics_ids: set[str] = set()
        for path in (control_socket, self.directory / _LONGEST_OWN, self._bind_name()):
            if len(os.fsencode(path)) > LONGEST_PATH:
                raise SystemFailure(
                    f"the path {path} is longer than the {LONGEST_PATH} bytes that a Unix socket may have: "
                    "choose a shorter [supervisor] control_socket"
                )
        _make_directory(self.directory)
        if control_socket.exists() and not control_socket.is_socket():
            raise SystemFailure(f"{control_socket} exists and is not a socket")
        self._lock_path = control_socket.with_name(control_socket.name + ".lock")
        self._lock = _lock(self._lock_path, self.pid)
        try:
            self._clear_stale()
            self.ipc.mkdir(mode=0o700, exist_ok=True)
            self.ipc.chmod(0o700)
            self.metrics.mkdir(mode=0o700)
            self.responses.mkdir(mode=0o700)
        except OSError as refused:
            os.close(self._lock)
            raise SystemFailure(f"can't use the runtime directory {self.directory}: {refused}") from refused

    @property
    def ipc(self) -> Path:
        """The directory of the engines' sockets, shared by the daemons of this runtime directory."""
        return self.directory / "ipc"

    @property
    def metrics(self) -> Path:
        """The directory of this daemon's metrics files."""
        return self.directory / f"metrics-{self.pid}"

    @property
    def responses(self) -> Path:
        """The directory of the responses that this daemon's api workers keep."""
        return self.directory / f"responses-{self.pid}"

    def endpoint_path(self, generation: int) -> Path:
        """The socket of one engine generation."""
        return self.ipc / f"{self.pid}-{generation}.engine"

    def take_metrics_id(self, kind: str) -> str:
        """A name for a new worker's metrics files: the first that no living worker of its kind has."""
        metrics_id = next(name for number in itertools.count() if (name := f"{kind}-{number}") not in self._metrics_ids)
        self._metrics_ids.add(metrics_id)
        return metrics_id

    def release_metrics_id(self, metrics_id: str) -> None:
        """Its counters stay for the next worker that takes it; gauges count for living processes only."""
        self._metrics_ids.discard(metrics_id)
        for path in self.metrics.glob(f"gauge_live*_{metrics_id}.db"):
            path.unlink(missing_ok=True)

    def bind_control(self) -> socket.socket:
        """The control socket, listening: 0660 from its first moment, complete when it appears under its name."""
        temporary = self._bind_name()
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        old = os.umask(0o117)
        try:
            sock.bind(str(temporary))
            sock.listen(64)
            group = group_id()
            # Not where it is so already: the unit's sandbox has no chown.
            if group not in (None, temporary.stat().st_gid) and (os.getuid() == 0 or group in os.getgroups()):
                os.chown(temporary, -1, group)
            temporary.rename(self.control_socket)
        except OSError as refused:
            sock.close()
            temporary.unlink(missing_ok=True)
            raise SystemFailure(f"can't make the control socket {self.control_socket}: {refused}") from refused
        finally:
            os.umask(old)
        sock.setblocking(False)
        return sock

    def close(self) -> None:
        """Removes all that is ours, the lock last."""
        for path in self.ipc.glob(f"{self.pid}-*"):
            path.unlink(missing_ok=True)
        for folder in (self.metrics, self.responses):
            shutil.rmtree(folder, ignore_errors=True)
        self.control_socket.unlink(missing_ok=True)
        try:
            self.ipc.rmdir()
        except OSError:
            pass  # another daemon's sockets are in it
        self._lock_path.unlink(missing_ok=True)
        os.close(self._lock)

    def _bind_name(self) -> Path:
        return self.directory / f".{self.pid}"

    def _clear_stale(self) -> None:
        """What daemons left behind that are dead (or had our number before us)."""
        for path in (*self.ipc.glob("*-*.*"), *self.directory.glob("*-*"), *self.directory.glob(".*")):
            match = re.fullmatch(r"\.(\d+)|(?:metrics|responses)-(\d+)|(\d+)-\d+\.(?:engine|ranks)", path.name)
            if match is None:
                continue
            owner = int(next(filter(None, match.groups())))
            if owner != self.pid and _alive(owner):
                continue
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        self.control_socket.unlink(missing_ok=True)


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # alive, another user's
    return True


def _make_directory(directory: Path) -> None:
    try:
        directory.mkdir(mode=0o750, parents=True, exist_ok=True)
        found = directory.lstat()
    except OSError as refused:
        raise SystemFailure(f"can't make the runtime directory {directory}: {refused}") from refused
    # Below /tmp anybody could have made it before us, to read or replace our sockets.
    if str(directory).startswith("/tmp/lightllmd-") and (
        stat.S_ISLNK(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022
    ):
        raise SystemFailure(f"the runtime directory {directory} is not ours alone: another user made or can change it")


def _lock(path: Path, pid: int) -> int:
    """An exclusive lock on `path`, which names its holder. The descriptor; closing it releases the lock."""
    while True:
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o640)
        except OSError as refused:
            raise SystemFailure(f"can't open {path}: {refused}") from refused
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(fd, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(fd)
            raise SystemFailure(
                f"another daemon, pid {holder}, owns {path.with_suffix('')}; "
                "give this one a [supervisor] control_socket of its own"
            ) from None
        # The holder before us may have unlinked the file between our open and our lock.
        try:
            if os.stat(path).st_ino == os.fstat(fd).st_ino:
                break
        except FileNotFoundError:
            pass
        os.close(fd)
    try:
        os.ftruncate(fd, 0)
        os.pwrite(fd, f"{pid}\n".encode(), 0)
    except OSError as refused:
        os.close(fd)
        raise SystemFailure(f"can't write {path}: {refused.strerror}") from refused
    return fd

"""sd_notify: telling systemd how the daemon is (sd_notify(3), sd_watchdog_enabled(3)). A no-op outside of it."""

from __future__ import annotations

import array
import os
import select
import socket
import time
from collections.abc import Mapping, Sequence


class Notifier:
    """Sends to $NOTIFY_SOCKET; an address that begins with '@' is in the abstract namespace."""

    def __init__(self, environment: Mapping[str, str], pid: int) -> None:
        address = environment.get("NOTIFY_SOCKET", "")
        self._address = "\0" + address[1:] if address.startswith("@") else address
        self._socket: socket.socket | None = None
        if address[:1] in ("/", "@"):
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)
        self.watchdog_interval = _watchdog_interval(environment, pid) if self._socket else None
        self._status = ""
        self._started = False  # systemd has been told READY=1
        self.reloading = False  # and RELOADING=1

    @property
    def active(self) -> bool:
        """Whether systemd listens."""
        return self._socket is not None

    def send(self, *, fds: Sequence[int] = (), **assignments: str | int) -> bool:
        """One datagram of NAME=value lines, with copies of `fds`.

        False when it was not taken; a full queue at systemd is no reason to wait.
        """
        if self._socket is None:
            return False
        body = "\n".join(f"{name}={value}" for name, value in assignments.items())
        ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
        try:
            self._socket.sendmsg([body.encode()], ancillary, 0, self._address)
        except OSError:
            return False
        return True

    def status(self, text: str) -> None:
        """STATUS=, when it changed."""
        if text != self._status and self.send(STATUS=text):
            self._status = text

    def ready(self) -> None:
        """The start is over."""
        self._started = self.send(READY=1) or self._started

    def reload_began(self) -> None:
        """`reload_ended` must follow, whatever comes of it. A reload during the start is not told."""
        if self._started:
            self.reloading = True
            self.send(RELOADING=1, MONOTONIC_USEC=time.clock_gettime_ns(time.CLOCK_MONOTONIC) // 1000)

    def reload_ended(self) -> None:
        """To systemd, the end of a reload and of a start are the same word: it must not be said before `ready`."""
        if self.reloading:
            self.reloading = False
            self.send(READY=1)

    def barrier(self, patience: float) -> bool:
        """Waits up to `patience` seconds until systemd has read all that was sent before; whether it has."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        try:
            # The only assignment of its datagram: systemd closes its copy of the descriptor when it gets to it.
            sent = self.send(fds=[writer], BARRIER=1)
        finally:
            os.close(writer)
        try:
            reply = select.poll()
            reply.register(reader)
            return sent and bool(reply.poll(patience * 1000))
        finally:
            os.close(reader)

    def close(self) -> None:
        """Nothing is sent any more."""
        if self._socket is not None:
            self._socket.close()
            self._socket = None


def _watchdog_interval(environment: Mapping[str, str], pid: int) -> float | None:
    """Seconds between two signs of life, half of what is asked; None where no watchdog waits for this process."""
    if environment.get("WATCHDOG_PID", str(pid)) != str(pid):
        return None
    try:
        microseconds = int(environment.get("WATCHDOG_USEC", "0"))
    except ValueError:
        return None
    return microseconds / 2e6 if microseconds > 0 else None


def is_journal(environment: Mapping[str, str], fd: int) -> bool:
    """Whether `fd` is connected to the journal, which reads sd-daemon(3) priority prefixes."""
    try:
        stat = os.fstat(fd)
    except OSError:
        return False
    return environment.get("JOURNAL_STREAM") == f"{stat.st_dev}:{stat.st_ino}"

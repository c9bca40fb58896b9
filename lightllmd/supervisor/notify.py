"""sd_notify: telling systemd how the daemon is (sd_notify(3), sd_watchdog_enabled(3)). A no-op outside of it."""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping


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

    @property
    def active(self) -> bool:
        return self._socket is not None

    def send(self, **assignments: str | int) -> bool:
        """One datagram of NAME=value lines. False when nobody took it; a full queue at systemd is no reason to wait."""
        if self._socket is None:
            return False
        body = "\n".join(f"{name}={value}" for name, value in assignments.items())
        try:
            self._socket.sendto(body.encode(), self._address)
        except OSError:
            return False
        return True

    def status(self, text: str) -> None:
        """STATUS=, when it changed."""
        if text != self._status and self.send(STATUS=text):
            self._status = text

    def close(self) -> None:
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

"""systemd's descriptor store for this service: listeners in it outlive the daemon, kill -9 included.

Connections that arrive meanwhile wait in them. A stored listener is named http-N: no other descriptor has its name,
because systemd removes by name, and the number of one that is given up is free again.
"""

from __future__ import annotations

import itertools
import logging
import re
import socket
from collections.abc import Iterable

from lightllmd.supervisor.host.notify import Notifier

_PATIENCE = 5.0  # seconds for systemd to confirm; it is only ever that slow while it is swamped

log = logging.getLogger(__name__)


class FdStore:
    """What the store holds, by our account. Does nothing without systemd, or in a unit without a store."""

    def __init__(self, notifier: Notifier) -> None:
        self._notifier = notifier
        self._names: dict[socket.socket, str] = {}

    def returned(self, inherited: Iterable[tuple[str, socket.socket]]) -> list[socket.socket]:
        """Takes what came back from the store out of `sockets.inherited`'s answer; it stays stored until `forget`."""
        back = {sock: name for name, sock in inherited if re.fullmatch(r"http-\d+", name)}
        self._names |= back
        return list(back)

    def keep(self, listeners: Iterable[socket.socket]) -> None:
        """Stores those that are not in the store yet. Never waits."""
        for sock in listeners:
            if sock not in self._names:
                name = next(name for n in itertools.count() if (name := f"http-{n}") not in self._names.values())
                if self._notifier.send(FDSTORE=1, FDNAME=name, fds=[sock.fileno()]):
                    self._names[sock] = name

    def forget(self, listeners: Iterable[socket.socket]) -> None:
        """Removes those that are stored; closing our own descriptors is the caller's. Never waits."""
        for sock in listeners:
            if name := self._names.pop(sock, None):
                self._notifier.send(FDSTOREREMOVE=1, FDNAME=name)

    def holds(self, listener: socket.socket) -> bool:
        """Whether it is stored."""
        return listener in self._names

    def confirm(self) -> None:
        """Waits until systemd has done what was asked: from then on the listeners outlive us."""
        if self._notifier.active and not self._notifier.barrier(_PATIENCE):
            log.warning("systemd didn't confirm within %.0f s that it keeps the listeners over a restart", _PATIENCE)

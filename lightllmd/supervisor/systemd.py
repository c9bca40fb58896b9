"""What systemd is told of the daemon: that it lives, starts, serves, reloads and stops, each at its time."""

from __future__ import annotations

from lightllmd.supervisor.control import status
from lightllmd.supervisor.daemon import Daemon
from lightllmd.supervisor.host.notify import Notifier

_EXTENSION = 30  # seconds to start or stop asked of systemd at a time; our own deadlines are the ones that rule
_EXTEND_EVERY = 1.0  # seconds between two times that it is asked
_STATUS_EVERY = 0.5  # seconds between two looks at the line for `systemctl status`


class SystemdReport:
    """Belongs to the single-writer loop."""

    def __init__(self, daemon: Daemon, notifier: Notifier) -> None:
        self._daemon, self._notifier = daemon, notifier
        # Running clock: when it was last told.
        self._watchdog = self._extended = self._status = float("-inf")
        self._stopping = False  # it has been told

    def reload(self) -> None:
        """Tells that a reload has begun or ended; called before and after jobs are stepped."""
        if self._notifier.reloading == self._daemon.verbs.reloading:
            return
        if self._daemon.verbs.reloading:
            self._notifier.reload_began()
        else:
            self._notifier.reload_ended()

    def ready(self) -> None:
        """The first readiness: the start is over."""
        self._notifier.ready()

    def stopping(self) -> None:
        """Tells once that a stop has been asked for."""
        if self._daemon.verbs.stopping is not None and not self._stopping:
            self._stopping = True
            self._notifier.send(STOPPING=1)

    def tick(self, period: float) -> None:
        """Feeds the watchdog, asks for more time to start or stop, and says how things stand. `period`: seconds
        between two calls."""
        if not self._notifier.active:
            return
        now, interval = self._daemon.context.clock.now, self._notifier.watchdog_interval
        if interval is not None and now - self._watchdog >= interval - period:
            self._watchdog = now
            self._notifier.send(WATCHDOG=1)
        if (
            self._daemon.starting or self._daemon.verbs.stopping
        ) and now - self._extended >= _EXTEND_EVERY - period / 2:
            self._extended = now
            self._notifier.send(EXTEND_TIMEOUT_USEC=_EXTENSION * 1_000_000)
        if now - self._status >= _STATUS_EVERY - period / 2:
            self._status = now
            self._notifier.status(status.sentence(self._daemon))

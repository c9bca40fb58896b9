"""What the api workers' page shows of the daemon: told them when it changed, once a second or with its health."""

from __future__ import annotations

from collections import deque

from lightllmd.ipc.messages import Overview, WorkerSeen
from lightllmd.supervisor.change.handover import describe
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.control import status
from lightllmd.supervisor.daemon import Daemon

_LOOKS = 4  # at the engine's count of tokens, a second apart, between the first and last of which the rate is taken
_APART = 0.9  # seconds, at least


class OverviewFeed:
    """Called by the supervisor's loop once a second, and when the health is another one."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._looks: deque[tuple[float, float]] = deque(maxlen=_LOOKS)  # running clock, tokens
        self._missed = False  # a worker that doesn't read now has not been told of the last
        self._processes: list[int] = []  # the pids of the engines that they count

    def tell(self) -> None:
        """Tells the api workers, if there is something new to tell."""
        daemon = self._daemon
        if not daemon.context.config.http.page:
            daemon.overview = None
            return
        overview = self._overview()
        if overview != daemon.overview or self._missed:
            daemon.overview = overview
            told = [child.keep_told(overview) for child in daemon.front.children()]
            self._missed = not all(told)

    def _overview(self) -> Overview:
        daemon = self._daemon
        front = daemon.front
        places = [*(api.worker for api in front.apis), *(engine.worker for engine in daemon.engines)]
        return Overview(
            started=daemon.started,
            sentence=status.sentence(daemon),
            tokens_per_second=self._rate(),
            in_flight=front.now("in_flight"),
            held=front.now("held"),
            ok=front.total("ok"),
            cancelled=front.total("cancelled"),
            failed=front.total("failed"),
            resumed=front.total("resumed"),
            workers=[_seen(worker) for worker in places],
        )

    def _rate(self) -> float:
        """Tokens per second; counts of an engine that is gone are of no use."""
        engines = [engine.child for engine in self._daemon.engines.serving.engines if engine.ready]
        children = [child for child in engines if child is not None]
        if not children:
            self._looks.clear()
            return 0.0
        if (processes := [child.pid for child in children]) != self._processes:
            self._looks.clear()
            self._processes = processes
        now = self._daemon.context.clock.now
        if not self._looks or now - self._looks[-1][0] >= _APART:
            self._looks.append((now, sum(child.stats.get("tokens_out", 0.0) for child in children)))
        (first, before), (last, after) = self._looks[0], self._looks[-1]
        return round((after - before) / (last - first), 1) if last > first else 0.0


def _seen(worker: Worker) -> WorkerSeen:
    said = worker.trouble if worker.state in ("fatal", "backoff") else describe(worker)
    return WorkerSeen(worker.name, worker.state, said, worker.restarts, worker.ready)

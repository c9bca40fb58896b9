"""Which workers a verb acts on, by the names that an operator gives them."""

from __future__ import annotations

from dataclasses import dataclass

from lightllmd.errors import NoSuchWorker
from lightllmd.supervisor.children.worker import Worker
from lightllmd.supervisor.workers.api_workers import Api
from lightllmd.supervisor.workers.generation import Engine
from lightllmd.supervisor.workers.pusher import Pusher


@dataclass(frozen=True)
class Targets:
    """Some of the workers in service, or all of them."""

    engines: list[Engine]
    apis: list[Api]
    pusher: Pusher | None
    visual: Worker | None = None

    @property
    def workers(self) -> list[Worker]:
        """Of all of them."""
        pusher = [self.pusher.worker] if self.pusher is not None else []
        visual = [self.visual] if self.visual is not None else []
        return [*(engine.worker for engine in self.engines), *(api.worker for api in self.apis), *visual, *pusher]

    def named(self, target: str) -> Targets:
        """Those of the kind or name `target`; empty: all. Raises NoSuchWorker."""
        if not target:
            return self
        chosen = [worker for worker in self.workers if target in (worker.kind, worker.name)]
        # No rank can be replaced alone.
        chosen += [one.worker for one in self.engines if target in [child.worker for child in one.children[1:]]]
        if not chosen:
            names = [worker.name for worker in self.workers]
            raise NoSuchWorker(f"no worker {target!r}: there are {', '.join(names)}", worker=target, candidates=names)
        return Targets(
            [engine for engine in self.engines if engine.worker in chosen],
            [api for api in self.apis if api.worker in chosen],
            self.pusher if self.pusher is not None and self.pusher.worker in chosen else None,
            self.visual if self.visual in chosen else None,
        )

"""The daemon as it stands: its parts, and the state that follows from theirs."""

from __future__ import annotations

import asyncio
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from lightllmd.config.plan import Plan
from lightllmd.ipc.messages import Drain, Health, Models, Overview
from lightllmd.supervisor.change.api_keys import KeysInForce
from lightllmd.supervisor.change.certificate import CertificateInForce
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.children import crashes
from lightllmd.supervisor.children.child import Child
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.control.verbs import Verbs
from lightllmd.supervisor.host import listeners as http_listeners
from lightllmd.supervisor.workers.api_workers import ApiWorkers
from lightllmd.supervisor.workers.engines import Engines
from lightllmd.supervisor.workers.health_monitor import Monitor
from lightllmd.supervisor.workers.lost_devices import LostDevices
from lightllmd.supervisor.workers.pusher import Pusher
from lightllmd.supervisor.workers.visuals import Visuals


@dataclass(frozen=True)
class Requested:
    """Event: a control request that changes something; its answer goes into `answer`."""

    act: Callable[[], Any]
    answer: asyncio.Future[Any]


class Daemon:
    """Changed by the supervisor's loop only. The control plane reads it at any moment and changes it by `call`."""

    def __init__(self, context: Context, settings: Settings) -> None:
        self.context = context
        self.settings = settings
        self.config_file = settings.invocation.config_file
        self.pid = os.getpid()
        self.started = self.since = time.time()  # Unix time of the start, and of the last change of `state`
        self.state = "starting"
        self.served_since: float | None = None  # Unix time of the first readiness
        self.health: tuple[bool, str] = (False, "")  # as the api workers were last told
        self.overview: Overview | None = None  # as well; None: they show no page
        self.front = ApiWorkers(context, context.config.http.workers, self._send_state)
        self.engines = Engines(context, self.front.tell)
        self.lost = LostDevices(context, self.engines)
        self.pusher = Pusher(context)
        self.visuals = Visuals(context, self.engines)
        self.certificate = CertificateInForce(context, self.front.tell)
        self.verbs = Verbs(context, self.engines, self.front, self.pusher, settings, self.certificate, self._relisten)
        self.keys = KeysInForce(context, settings, self.verbs.put_in_force)
        self.monitor = Monitor(context, self.engines, self.front)
        self.crashes = crashes.open_crashes(context.events, os.environ.get("STATE_DIRECTORY", ""))

    @property
    def plan(self) -> Plan | None:
        """In force; None before it is made."""
        return self.engines.serving.plan

    @property
    def urls(self) -> list[str]:
        """Where clients reach the api workers."""
        tls = bool(self.context.config.http.tls_certificate)
        return [http_listeners.url(sock, tls) for sock in self.context.listeners]

    @property
    def starting(self) -> bool:
        """On the way to the first readiness; beyond the start limit systemd's own patience shall decide."""
        stuck = any(api.worker.limited or api.worker.fatal for api in self.front.apis) or self.engines.serving.given_up
        on_the_way = self.plan is None or not stuck
        return self.served_since is None and self.verbs.stopping is None and on_the_way

    def children(self) -> list[Child]:
        """All processes of workers, the spare's and those on their way out included."""
        return [*self.front.children(), *self.engines.children(), *self.visuals.children(), *self.pusher.children()]

    async def call(self, act: Callable[[], Any]) -> Any:
        """Runs `act` inside the single-writer loop and returns (or raises) what it does."""
        answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.context.post(Requested(act, answer))
        return await answer

    def _send_state(self, child: Child) -> None:
        """Tells a new api worker how things stand."""
        child.send(Health(*self.health))
        if self.overview is not None:
            child.send(self.overview)
        if self.verbs.draining:
            child.send(Drain())
        if self.context.config.models:
            child.send(Models(list(self.context.config.models)))
        if self.certificate.fault and (tls := self.context.tls_message(broken=True)) is not None:
            child.send(tls)
        for engine in self.engines:
            if up := engine.up():
                child.send(up)

    def _relisten(self, listeners: list[socket.socket]) -> None:
        """Api workers that start from now on get these; the caller closes the others."""
        self.context.listeners = listeners
        self.context.fd_store.keep(listeners)
        self.context.log.own("info", f"listening on {', '.join(self.urls)}")

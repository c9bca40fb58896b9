"""One api worker: uvicorn on the inherited listeners, the ledger, and the supervisor's channel, on one event loop."""

from __future__ import annotations

import asyncio
import gc
import logging
import socket
from collections.abc import Callable, Coroutine
from typing import Any

import msgspec
import zmq

from lightllmd.api.app import build_app, dialects_of, error_answers
from lightllmd.api.images.client import VisualClient
from lightllmd.api.images.held import KeptImageBytes
from lightllmd.api.inflight.accounts import Accounts
from lightllmd.api.inflight.ledger import Ledger
from lightllmd.api.inflight.link import EngineLink
from lightllmd.api.inflight.revision import Revision
from lightllmd.api.inflight.revisions import Revisions
from lightllmd.api.inflight.tally import Tally
from lightllmd.api.server import ApiServer
from lightllmd.api.web.auth import AcceptedKeys
from lightllmd.api.web.limits import Leases
from lightllmd.config import keys, tls
from lightllmd.config.plan import Plan
from lightllmd.errors import NotReady, RequestError
from lightllmd.ipc import messages
from lightllmd.ipc.channel import Channel
from lightllmd.ipc.images import visual_path
from lightllmd.ipc.quota import Quota
from lightllmd.observe.metrics import ApiMetrics
from lightllmd.requests.limits import RequestLimits
from lightllmd.text import load_tokenizer

log = logging.getLogger(__name__)

BEAT = 0.2  # seconds between heartbeats, time-out checks and looks at quiet streams


class ApiWorker:
    """Raises ConfigInvalid for a tokenizer that can't be read."""

    def __init__(self, channel: Channel[messages.Down], configure: messages.ApiConfigure, plan: Plan) -> None:
        http = plan.config.http
        self._channel = channel
        self._stop_timeout = plan.config.supervisor.stop_timeout
        self._context = zmq.Context(io_threads=1)
        self._visual_dir = configure.visual_dir
        self._held_images = KeptImageBytes(plan.config.images.max_held_bytes)
        self._tally = Tally(configure.api, configure.epoch)
        self._accounts = Accounts(
            ApiMetrics(plan.config.params.max_req_input_len, plan.config.params.max_req_total_len)
        )
        self.revisions = Revisions(configure.revision, plan, self._revision, self._tally, self._accounts)
        self._keys = AcceptedKeys(plan.config.keys)
        quota = Quota(configure.quota_fd, configure.column)
        quota.clear(configure.column)
        self._leases = Leases(quota)
        dialects = dialects_of(plan, configure.store_dir)
        self._closing = [dialect.close for dialect in dialects if dialect.close is not None]
        app = build_app(
            self.revisions, metrics_dir=configure.metrics_dir, keys=self._keys, leases=self._leases, dialects=dialects
        )
        sockets = [socket.socket(fileno=fd) for fd in configure.listener_fds]
        self._pair: tls.TlsPair | None = None  # what TLS is served with
        self._server = ApiServer(app, http, sockets, error_answers(dialects))
        if configure.tls is not None:
            self._serve_tls(configure.tls)
        self._tasks: set[asyncio.Task[None]] = set()  # answers to the supervisor that take a while
        self._broken: asyncio.Future[None] | None = None  # ends with the first exception in a callback
        self.revisions.current.texts.processes.start()  # last, but before any thread

    def _revision(self, number: int, plan: Plan) -> Revision:
        """May run in a thread."""
        tokenizer = load_tokenizer(plan, limits=msgspec.to_builtins(RequestLimits.of(plan)))
        for warning in tokenizer.warnings:
            log.warning("tokenizer: %s", warning)
        api, epoch, http = self._tally.api, self._tally.epoch, plan.config.http

        def connect(endpoint: str) -> EngineLink:
            return EngineLink(endpoint, api, epoch, self._context, lambda: self._guarded(ledger.receive))

        ledger = Ledger(
            self._tally,
            hold_timeout=http.hold_timeout,
            max_held=http.max_held,
            connect=connect,
            on_end=self._accounts.ended,
            cached=plan.config.params.use_dynamic_prompt_cache,
        )
        return Revision(plan, tokenizer, ledger, self._accounts, self._sight(number, plan))

    def _sight(self, number: int, plan: Plan) -> VisualClient | None:
        """The way to the visual worker of this revision."""
        if plan.vision is None:
            return None
        self._held_images.most = plan.config.images.max_held_bytes  # of the newest revision
        path = visual_path(self._visual_dir, number)
        return VisualClient(path, plan.config.http.hold_timeout, self._held_images)

    async def run(self) -> None:
        """Serves until told to retire or to stop."""
        loop = asyncio.get_running_loop()
        self._broken = loop.create_future()
        loop.add_reader(self._channel.fileno(), self._guarded, self._heard)
        beating = asyncio.create_task(self._beat())
        gc.collect()
        gc.freeze()  # what was imported lives for ever; collections need not look at it
        serving = asyncio.create_task(self._server.serve(sockets=self._server.sockets))
        self._guarded(self._heard)
        try:
            await asyncio.wait((serving, beating, self._broken), return_when=asyncio.FIRST_COMPLETED)
            for ended in (serving, beating, self._broken):
                if ended.done():
                    ended.result()
        finally:
            for task in (beating, serving, *self._tasks):
                task.cancel()
            loop.remove_reader(self._channel.fileno())
            self._heartbeat()
            self._context.destroy(linger=0)
            self.revisions.stop_helpers()
            for close in self._closing:
                close()

    def _guarded(self, work: Callable[[], None]) -> None:
        """A callback that fails ends the worker: with half a message read, streams would wait for ever."""
        try:
            work()
        except Exception as failure:
            if self._broken is None or self._broken.done():
                raise
            self._broken.set_exception(failure)

    # --- the supervisor ---------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._heartbeat()
            self.revisions.tick(loop.time())
            self._leases.tick()
            await asyncio.sleep(BEAT)

    def _heartbeat(self) -> None:
        stats = self.revisions.stats()
        stats |= self._server.traffic.stats()
        stats["draining"] = float(self.revisions.gate.refusal is not None)
        phase = "ready" if self._server.started else "boot"
        self._channel.send(messages.Heartbeat(phase, progress=0, busy=False, stats=stats), droppable=True)

    def _heard(self) -> None:
        for message in self._channel.receive():
            self._handle_message(message)
        if self._channel.closed:
            self._leave("the supervisor is gone")

    def _handle_message(self, message: messages.Down) -> None:
        revisions = self.revisions
        match message:
            case messages.EngineUp():
                revisions.engine_up(message)
            case messages.EngineDown():
                revisions.engine_down(message)
            case messages.Prepare():
                revisions.expect(message.revision)
                self._start(self._prepare(message))
            case messages.Commit():
                revisions.commit(message.revision, message.carry)
                self._heartbeat()
            case messages.Forget():
                revisions.forget(message.revision, message.reason)
                self._heartbeat()
            case messages.Cut():
                revisions.cut(message.revision, message.reason)
                self._heartbeat()
            case messages.Hold():
                revisions.gate.hold()
                self._heartbeat()
            case messages.Release():
                revisions.gate.release()
            case messages.Models():
                revisions.names = message.names
            case messages.Probe():
                self._start(self._probe(message))
            case messages.Tune():
                logging.getLogger().setLevel(message.log_level.upper())
                self._stop_timeout = message.stop_timeout
            case messages.Keys():
                self._keys.accept(keys.decode(message.ring))
            case messages.Tls():
                self._serve_tls(message)
            case messages.Health():
                revisions.health = message
            case messages.Overview():
                revisions.overview = message
            case messages.Drain():
                revisions.refuse("the server is draining: it takes no new requests")
                self._heartbeat()
            case messages.Resume():
                revisions.refuse(None)
                self._heartbeat()
            case messages.Retire():
                self._server.retire()
            case messages.Stop():
                self._leave("the server is stopping")
            case _:
                log.error("a message that is not for an api worker: %s", type(message).__name__)

    def _serve_tls(self, message: messages.Tls) -> None:
        """The supervisor has tried it."""
        pair = tls.TlsPair(message.certificate, message.key, message.client_ca, message.expires)
        if pair != self._pair:
            self._pair = pair
            self._server.tls = tls.context(pair)
        self._accounts.certificate(message.expires, message.broken)

    def _start(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled():
            self._guarded(task.result)

    async def _prepare(self, message: messages.Prepare) -> None:
        error = await self.revisions.prepare(message.revision, message.plan)
        self._channel.send(messages.Prepared(message.revision, error))

    async def _probe(self, message: messages.Probe) -> None:
        error = ""
        try:
            await self.revisions.current.probe(message.generation)
        except RequestError as failure:
            error = failure.message
        self._channel.send(messages.Probed(message.number, error))

    def _leave(self, reason: str) -> None:
        """Streams end with an error frame; responses that clients don't read are cut at the end."""
        self.revisions.refuse(reason)
        self.revisions.fail_all(NotReady(reason))
        self._server.leave(self._stop_timeout / 2)

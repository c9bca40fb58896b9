"""One api worker: uvicorn on the inherited listeners, the ledger, and the supervisor's channel, on one event loop."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
from collections.abc import Callable, Iterator

import uvicorn
import zmq
from starlette.types import ASGIApp

from lightllmd.api.accounts import Accounts
from lightllmd.api.app import build_app
from lightllmd.api.auth import read_keys
from lightllmd.api.frontend import FrontEnd
from lightllmd.api.ledger import Ledger
from lightllmd.api.link import EngineLink
from lightllmd.config.parameters import HttpSettings
from lightllmd.config.plan import Plan
from lightllmd.errors import ConfigInvalid, NotReady, Problem
from lightllmd.ipc import messages
from lightllmd.ipc.channel import Channel
from lightllmd.observe.metrics import ApiMetrics
from lightllmd.text import load_tokenizer

log = logging.getLogger(__name__)

BEAT = 0.2  # seconds between heartbeats, time-out checks and looks at quiet streams
KEEP_ALIVE = 30  # seconds that an idle HTTP connection stays open
BACKLOG = 4096  # as the supervisor's; the kernel caps it at net.core.somaxconn


def _uvicorn_config(app: ASGIApp, http: HttpSettings) -> uvicorn.Config:
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        interface="asgi3",
        log_config=None,
        log_level=logging.WARNING,
        access_log=False,
        proxy_headers=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        backlog=BACKLOG,
        ssl_certfile=http.tls_certificate or None,
        ssl_keyfile=http.tls_key or None,
    )
    try:
        config.load()
    except OSError as failure:  # ssl.SSLError is one
        message = f"{http.tls_certificate} with key {http.tls_key or 'in the same file'} can't be used: {failure}"
        raise ConfigInvalid([Problem("http.tls_certificate", message)]) from failure
    return config


class Server(uvicorn.Server):
    """Signals are the supervisor's business, not uvicorn's."""

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield

    def leave(self, timeout: float | None) -> None:
        """Stops accepting; open responses may finish, for `timeout` seconds at most."""
        self.config.timeout_graceful_shutdown = timeout  # type: ignore[assignment]
        self.should_exit = True


class Worker:
    """Raises ConfigInvalid for a keys file, certificate or tokenizer that can't be read."""

    def __init__(self, channel: Channel[messages.Down], configure: messages.ApiConfigure, plan: Plan) -> None:
        http = plan.config.http
        self._channel = channel
        self._stop_timeout = plan.config.supervisor.stop_timeout
        self._context = zmq.Context(io_threads=1)
        self._sockets = [socket.socket(fileno=fd) for fd in configure.listener_fds]
        accounts = Accounts(ApiMetrics(plan.config.params.max_req_input_len, plan.config.params.max_req_total_len))
        self.ledger = Ledger(
            configure.api,
            configure.epoch,
            hold_timeout=http.hold_timeout,
            max_held=http.max_held,
            connect=lambda endpoint: EngineLink(
                endpoint, configure.api, configure.epoch, self._context, self._received
            ),
            on_end=accounts.ended,
        )
        tokenizer = load_tokenizer(plan)
        for warning in tokenizer.warnings:
            log.warning("tokenizer: %s", warning)
        self.front = FrontEnd(plan, tokenizer, self.ledger, accounts)
        keys = read_keys(http.api_keys_file) if http.api_keys_file else []
        app = build_app(self.front, metrics_dir=configure.metrics_dir, api_keys=keys)
        self._server = Server(_uvicorn_config(app, http))
        self._broken: asyncio.Future[None] | None = None  # ends with the first exception that nobody can handle

    async def run(self) -> None:
        """Serves until told to retire or to stop."""
        loop = asyncio.get_running_loop()
        self._broken = loop.create_future()
        loop.add_reader(self._channel.fileno(), self._guarded, self._heard)
        beating = asyncio.create_task(self._beat())
        gc.collect()
        gc.freeze()  # what was imported lives for ever; collections need not look at it
        serving = asyncio.create_task(self._server.serve(sockets=self._sockets))
        self._guarded(self._heard)
        try:
            await asyncio.wait((serving, beating, self._broken), return_when=asyncio.FIRST_COMPLETED)
            for ended in (serving, beating, self._broken):
                if ended.done():
                    ended.result()
        finally:
            beating.cancel()
            serving.cancel()
            loop.remove_reader(self._channel.fileno())
            self._heartbeat()
            self._context.destroy(linger=0)

    def _guarded(self, work: Callable[[], None]) -> None:
        """A callback that fails ends the worker: with half a message read, streams would wait for ever."""
        try:
            work()
        except Exception as failure:
            if self._broken is None or self._broken.done():
                raise
            self._broken.set_exception(failure)

    def _received(self) -> None:
        self._guarded(self.ledger.receive)

    # --- the supervisor ---------------------------------------------------------------------------------------

    async def _beat(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            self._heartbeat()
            self.front.tick(loop.time())
            await asyncio.sleep(BEAT)

    def _heartbeat(self) -> None:
        stats = self.ledger.stats()
        stats["draining"] = float(self.ledger.refusal is not None)
        phase = "ready" if self._server.started else "boot"
        self._channel.send(messages.Heartbeat(phase, progress=0, busy=False, stats=stats))

    def _heard(self) -> None:
        for message in self._channel.receive():
            self._obey(message)
        if self._channel.closed:
            self._leave("the supervisor is gone")

    def _obey(self, message: messages.Down) -> None:
        ledger, front = self.ledger, self.front
        match message:
            case messages.EngineUp():
                ledger.engine_up(message.generation, message.endpoint)
            case messages.EngineDown():
                ledger.engine_down(message.generation, message.unproven, message.self_inflicted)
            case messages.Health():
                front.healthy = message.ready
                front.reason = message.reason
                front.retry_after = message.retry_after
            case messages.Drain():
                ledger.refuse("the server is draining: it takes no new requests")
                self._heartbeat()
            case messages.Resume():
                ledger.refuse(None)
                self._heartbeat()
            case messages.Retire():
                self._server.leave(None)
            case messages.Stop():
                self._leave("the server is stopping")
            case _:
                log.error("a message that is not for an api worker: %s", type(message).__name__)

    def _leave(self, reason: str) -> None:
        """Streams end with an error frame; responses that clients don't read are cut at the end."""
        self.ledger.refuse(reason)
        self.ledger.fail_all(NotReady(reason))
        self._server.leave(self._stop_timeout / 2)

"""The control plane: HTTP and JSON on a Unix socket, served by the supervisor's own loop. Shapes: see `snapshot`.

Reads are answered from the state as it is; mutations are put into the supervisor's queue and decided there.
"""

from __future__ import annotations

import asyncio
import os
import platform
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route

from lightllmd import __version__
from lightllmd.config.load import load
from lightllmd.config.parameters import Config
from lightllmd.config.report import places, report
from lightllmd.errors import LightllmdError, NoSuchWorker, NotPermitted, TryAgain, Usage
from lightllmd.http import server as http
from lightllmd.http.traffic import Traffic
from lightllmd.supervisor import snapshot
from lightllmd.supervisor.change.handover import Terms
from lightllmd.supervisor.control import parsing, status
from lightllmd.supervisor.control.jobs import RunningJob
from lightllmd.supervisor.control.peers import ControlConnection, Peer, bounds, may_mutate
from lightllmd.supervisor.control.verbs import Caller
from lightllmd.supervisor.daemon import Daemon
from lightllmd.supervisor.journal import logs

KEEP_ALIVE = 10.0  # seconds between empty lines on a quiet stream
DEFAULT_LINES = 100
VALUES = (
    "max_total_token_num",
    "batch_max_tokens",
    "eos_id",
    "data_type",
    "kv_scheme",
    "decode_kernel",
    "tokenizer_mode",
    "log_stats_interval",
    "vocab_size",
    "model_name",
    "ranks",
    "replicas",
)  # of a plan: what is in force where the configuration may say "auto" or nothing


class ControlServer:
    """The listening end, bound when it is made. Raises SystemFailure where the socket can't be bound."""

    def __init__(self, daemon: Daemon) -> None:
        self._socket = daemon.context.runtime.bind_control()
        config = uvicorn.Config(
            ControlPlane(daemon).app(),
            http=ControlConnection,  # type: ignore[arg-type]
            ws="none",
            lifespan="off",
            access_log=False,
            log_config=None,
            server_header=False,
            timeout_graceful_shutdown=1,
        )
        config.load()
        self._server = http.Server(config, Traffic(bounds(), _render, _is_reserved), ControlConnection)
        self._task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Returns once requests are answered."""
        self._task = asyncio.get_running_loop().create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started and not self._task.done():
            await asyncio.sleep(0.005)

    async def stop(self) -> None:
        """Ends every connection, the one whose answer is under way within a second."""
        self._server.end()
        if self._task is not None:
            await self._task


class ControlPlane:
    """The routes; their answers and errors are listed in `snapshot`."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    def app(self) -> Starlette:
        """The ASGI application. Every LightllmdError becomes JSON with its status."""
        routes = [
            Route("/v1/status", self.status),
            Route("/v1/version", self.version),
            Route("/v1/workers", self.workers),
            Route("/v1/config", self.config),
            Route("/v1/check", self.check, methods=["POST"]),
            Route("/v1/restart", self.restart, methods=["POST"]),
            Route("/v1/reload", self.reload, methods=["POST"]),
            Route("/v1/swap", self.swap, methods=["POST"]),
            Route("/v1/models", self.models),
            Route("/v1/cache", self.cache),
            Route("/v1/cache/flush", self.flush_cache, methods=["POST"]),
            Route("/v1/drain", self.drain, methods=["POST"]),
            Route("/v1/resume", self.resume, methods=["POST"]),
            Route("/v1/reset-failed", self.reset_failed, methods=["POST"]),
            Route("/v1/stop", self.stop, methods=["POST"]),
            Route("/v1/jobs", self.jobs),
            Route("/v1/jobs/{id}", self.job),
            Route("/v1/events", self.events),
            Route("/v1/logs", self.logs),
            Route("/v1/crashes", self.crashes),
            Route("/v1/crashes/{id}", self.crash),
        ]
        handlers = {LightllmdError: _refuse, HTTPException: _no_route, Exception: _broken}
        return Starlette(routes=routes, exception_handlers=handlers)

    # --- reads ---------------------------------------------------------------------------------------------------
    async def status(self, request: Request) -> Response:
        """`GET /v1/status`. Never waits."""
        return _json(status.build(self._daemon))

    async def version(self, request: Request) -> Response:
        """`GET /v1/version`."""
        return _json(snapshot.Version(version=__version__, python=platform.python_version(), pid=self._daemon.pid))

    async def workers(self, request: Request) -> Response:
        """`GET /v1/workers`."""
        return _json(status.workers(self._daemon))

    async def models(self, request: Request) -> Response:
        """`GET /v1/models`."""
        return _json(status.models(self._daemon))

    async def cache(self, request: Request) -> Response:
        """`GET /v1/cache`. Raises PromptCacheOff, TryAgain."""
        self._daemon.verbs.check_cached()
        return _json(status.cache(self._daemon))

    async def config(self, request: Request) -> Response:
        """`GET /v1/config`, as written, or `Effective`. Raises TryAgain before the plan is made."""
        if not parsing.switch(request, "effective"):
            return _json(_told(self._daemon.context.config))
        plan = self._daemon.plan
        if plan is None:
            raise TryAgain("the plan is not made yet")
        return _json(
            snapshot.Effective(
                config=msgspec.to_builtins(_told(plan.config)),
                values={name: getattr(plan, name) for name in VALUES},
                derived=plan.derived,
                budget=plan.budget,
                budget_needed=plan.budget.needed,
                devices=places(plan),
                measured=status.measured_memory(self._daemon),
                report=report(plan),
            )
        )

    async def check(self, request: Request) -> Response:
        """`POST /v1/check`. The file is read in a thread. Raises Usage, ConfigInvalid."""
        file = parsing.text(await parsing.body(request, {"file"}), "file")
        if file is None or not file.startswith("/"):
            raise Usage('check needs {"file": an absolute path}')
        await self._daemon.context.file_threads.run(f"reading {file}", load, file, None, os.environ)
        return _json(snapshot.Checked(file=file))

    async def jobs(self, request: Request) -> Response:
        """`GET /v1/jobs`."""
        return _json(self._daemon.verbs.jobs.all())

    async def job(self, request: Request) -> Response:
        """`GET /v1/jobs/{id}`. Raises NoSuchJob."""
        job = self._daemon.verbs.jobs.get(parsing.number(request))
        return _stream(job.follow(KEEP_ALIVE))

    async def events(self, request: Request) -> Response:
        """`GET /v1/events`. Raises Usage."""
        feed = self._daemon.context.events.feed
        lines = parsing.count(request, "lines", DEFAULT_LINES)
        following = feed.follow(KEEP_ALIVE) if parsing.switch(request, "follow") else None
        return _stream(_history(feed.last(lines), following))

    async def logs(self, request: Request) -> Response:
        """`GET /v1/logs`. Raises Usage, NoSuchWorker."""
        book, worker = self._daemon.context.log, request.query_params.get("worker") or None
        names = [logs.OWN, *(worker.name for worker in status.workers(self._daemon))]
        if worker is not None and worker not in names:
            raise NoSuchWorker(f"no worker {worker!r}: there are {', '.join(names)}", worker=worker, candidates=names)
        following = book.feed.follow(KEEP_ALIVE) if parsing.switch(request, "follow") else None
        if following is not None and worker is not None:
            following = _only(following, worker)
        text = request.query_params.get("format") == "text"
        lines = _history(book.last(parsing.count(request, "lines", DEFAULT_LINES), worker), following)
        return _stream(lines, logs.text_line if text else None)

    async def crashes(self, request: Request) -> Response:
        """`GET /v1/crashes`."""
        return _json(self._daemon.crashes.all())

    async def crash(self, request: Request) -> Response:
        """`GET /v1/crashes/{id}`. Raises NoSuchCrash."""
        return _json(self._daemon.crashes.get(parsing.number(request)))

    # --- mutations -----------------------------------------------------------------------------------------------
    async def restart(self, request: Request) -> Response:
        """`POST /v1/restart`."""
        asked = self._mutation(request)
        worker = await parsing.worker(request)
        return await self._job(lambda: self._daemon.verbs.restart(asked, worker))

    async def reset_failed(self, request: Request) -> Response:
        """`POST /v1/reset-failed`."""
        asked = self._mutation(request)
        worker = await parsing.worker(request)
        return await self._job(lambda: self._daemon.verbs.reset_failed(asked, worker))

    async def reload(self, request: Request) -> Response:
        """`POST /v1/reload`."""
        asked = self._mutation(request)
        body = await parsing.body(request, {"dry_run"})
        dry_run = parsing.boolean(body, "dry_run")
        return await self._job(lambda: self._daemon.verbs.reload(asked, dry_run))

    async def swap(self, request: Request) -> Response:
        """`POST /v1/swap`."""
        asked = self._mutation(request)
        body = await parsing.body(request, {"model", "plan", "drain_timeout", "force", "on_failure"})
        model, timeout = parsing.text(body, "model"), parsing.seconds(body, "drain_timeout")
        if not model:
            raise Usage("model is the name of a model in [models], or a path")
        if body.get("on_failure", "rollback") not in ("rollback", "keep"):
            raise Usage("on_failure is rollback or keep")
        terms = Terms(timeout, parsing.boolean(body, "force"), body.get("on_failure") == "keep")
        plan_only = parsing.boolean(body, "plan")
        return await self._job(lambda: self._daemon.verbs.swap(asked, model, terms, plan_only))

    async def flush_cache(self, request: Request) -> Response:
        """`POST /v1/cache/flush`."""
        asked = self._mutation(request)
        await parsing.body(request, set())
        return await self._job(lambda: self._daemon.verbs.flush_cache(asked))

    async def drain(self, request: Request) -> Response:
        """`POST /v1/drain`."""
        asked = self._mutation(request)
        await parsing.body(request, set())
        return await self._job(lambda: self._daemon.verbs.drain(asked))

    async def resume(self, request: Request) -> Response:
        """`POST /v1/resume`."""
        asked = self._mutation(request)
        await parsing.body(request, set())
        return await self._job(lambda: self._daemon.verbs.resume(asked))

    async def stop(self, request: Request) -> Response:
        """`POST /v1/stop`."""
        asked = self._mutation(request)
        now = parsing.boolean(await parsing.body(request, {"now"}), "now")
        return await self._job(lambda: self._daemon.verbs.stop(asked, now))

    def _mutation(self, request: Request) -> Caller:
        """Who asks, if they may."""
        peer: Peer = request.state.peer
        if not may_mutate(peer):
            self._daemon.context.log.own("warning", f"{request.url.path} refused to uid {peer.uid}, pid {peer.pid}")
            raise NotPermitted(
                f"uid {peer.uid} may not do this: only root, the daemon's user and members of group lightllmd may",
                uid=peer.uid,
            )
        premise = request.headers.get("if-match")
        seen = None if premise is None else parsing.digits(premise.strip('"'))
        if premise is not None and seen is None:
            raise Usage("If-Match carries a generation number")
        return Caller(peer.uid, peer.pid, seen)

    async def _job(self, act: Callable[[], RunningJob]) -> Response:
        job = await self._daemon.call(act)
        return _json(job.snapshot, status=202)


# --- helpers -----------------------------------------------------------------------------------------------------


def _json(body: Any, status: int = 200) -> Response:
    return Response(msgspec.json.encode(body), status, media_type="application/json")


async def _refuse(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, LightllmdError)
    headers = {"Retry-After": f"{refusal.retry_after:g}"} if refusal.retry_after is not None else None
    return Response(msgspec.json.encode(refusal.as_dict()), refusal.status, headers, "application/json")


def _told(config: Config) -> Config:
    """Without the hashes of API keys, which are no settings."""
    return msgspec.structs.replace(config, held_keys=None)


def _render(refusal: LightllmdError, path: str) -> bytes:
    return msgspec.json.encode(refusal.as_dict())


def _is_reserved(path: str) -> bool:
    """All but what goes on for as long as a client likes."""
    return not path.startswith(("/v1/logs", "/v1/events"))


async def _no_route(request: Request, refusal: Exception) -> Response:
    """Unknown path or method."""
    assert isinstance(refusal, HTTPException)
    message = f"{request.method} {request.url.path}: {refusal.detail}"
    return _json({"error": "Usage", "message": message}, refusal.status_code)


async def _broken(request: Request, fault: Exception) -> Response:
    """A fault of ours: the log has its traceback, the client only its name."""
    return _json({"error": "LightllmdError", "message": f"internal error: {type(fault).__name__}"}, 500)


async def _history(past: list[Any], following: AsyncIterator[list[Any]] | None) -> AsyncIterator[list[Any]]:
    yield past
    if following is not None:
        async for batch in following:
            yield batch


async def _only(batches: AsyncIterator[list[snapshot.LogLine]], worker: str) -> AsyncIterator[list[snapshot.LogLine]]:
    async for batch in batches:
        yield [line for line in batch if line.worker == worker]


def _stream(batches: AsyncIterator[list[Any]], render: Callable[[Any], str] | None = None) -> Response:
    """One item a line; an empty line for an empty batch, so that a vanished reader is noticed."""

    async def body() -> AsyncIterator[bytes]:
        async for batch in batches:
            encoded = [render(item).encode() if render else msgspec.json.encode(item) for item in batch]
            yield b"\n".join(encoded) + b"\n"

    media_type = "text/plain; charset=utf-8" if render else "application/x-ndjson"
    return StreamingResponse(body(), media_type=media_type)

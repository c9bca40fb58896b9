"""A replica of the Ray Serve application without Ray: a daemon of its own, and the proxy before it."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import httpx
import psutil
import pytest
from starlette.requests import Request

from harness import wait_for
from lightllmd.errors import ConfigInvalid, EngineError
from lightllmd.ray_serve import arguments
from lightllmd.ray_serve.daemon import checked
from lightllmd.ray_serve.replica import Replica

FAKE = {"engine": {"backend": "fake", "fake": {"tokens_per_second": 100}}, "supervisor.spare_engine": False}


def asked_of(replica: Replica) -> httpx.AsyncClient:
    """A client of the proxy, in this process: chunks come as they are sent."""

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await (await replica(Request(scope, receive)))(scope, receive, send)

    return httpx.AsyncClient(transport=_Streaming(app), base_url="http://served", timeout=60)


class _Streaming(httpx.AsyncBaseTransport):
    """httpx's own gathers an answer before it hands it on."""

    def __init__(self, app: Callable[[Any, Any, Any], Awaitable[None]]) -> None:
        self._app = app

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body, sent = await request.aread(), asyncio.Queue[dict[str, Any]]()
        scope = {
            "type": "http",
            "method": request.method,
            "path": request.url.path,
            "query_string": request.url.query,
            "headers": [(name.lower(), value) for name, value in request.headers.raw],
            "client": ("203.0.113.9", 4711),
            "root_path": "",
            "scheme": "http",
            "server": ("served", 80),
        }
        gone = asyncio.Event()
        asked = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive() -> dict[str, Any]:
            if (message := next(asked, None)) is None:
                await gone.wait()
                return {"type": "http.disconnect"}
            return message

        async def run() -> None:
            try:
                await self._app(scope, receive, sent.put)
            except Exception as broken:
                await sent.put({"type": "broken", "by": broken})

        running = asyncio.create_task(run())
        start = await sent.get()
        assert start["type"] == "http.response.start", start

        async def chunks() -> AsyncIterator[bytes]:
            try:
                while True:
                    message = await sent.get()
                    if message["type"] == "broken":
                        raise httpx.ReadError(str(message["by"]))
                    yield message["body"]
                    if not message.get("more_body"):
                        break
            finally:
                gone.set()
                await running

        return httpx.Response(start["status"], headers=start["headers"], stream=_Stream(chunks()))


class _Stream(httpx.AsyncByteStream):
    def __init__(self, chunks: AsyncIterator[bytes]) -> None:
        self._chunks = chunks

    async def __aiter__(self) -> AsyncIterator[bytes]:
        async for chunk in self._chunks:
            yield chunk

    async def aclose(self) -> None:
        await self._chunks.aclose()


def engine_of(replica: Replica) -> psutil.Process:
    return next(
        child for child in psutil.Process(replica.daemon.pid).children() if "lightllmd.engine" in child.cmdline()
    )


async def tokens_of(client: httpx.AsyncClient, count: int, begun: asyncio.Event | None = None) -> int:
    body = {"inputs": "a", "parameters": {"max_new_tokens": count, "ignore_eos": True}}
    got = 0
    async with client.stream("POST", "/generate_stream", json=body) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        async for line in answer.aiter_lines():
            got += '"token"' in line
            if '"status":503' in line:  # an api worker that outlived its supervisor for a moment says so
                raise httpx.ReadError(line)
            if got and begun:
                begun.set()
    return got


async def eventually(condition: Callable[[], Awaitable[bool]]) -> None:
    for _ in range(600):
        if await condition():
            return
        await asyncio.sleep(0.1)
    raise AssertionError("did not happen")


def test_a_replica_passes_everything_on_and_ends_with_its_daemon() -> None:
    lost: list[int] = []

    async def scene() -> None:
        replica = Replica(None, FAKE, on_lost=lost.append)
        await replica.start()
        async with asked_of(replica) as client:
            # Methods, queries, statuses, headers and errors are the daemon's.
            models = await client.get("/v1/models", headers={"x-request-id": "abc"})
            assert (models.status_code, models.headers["x-request-id"]) == (200, "abc")
            refused = await client.post("/v1/chat/completions?a=1", json={"messages": []})
            assert refused.status_code == 400
            assert (await client.get("/nowhere")).status_code == 404

            # A killed engine is no reason to end the replica, whose streams wait for the next one.
            begun = asyncio.Event()
            stream = asyncio.create_task(tokens_of(client, 60, begun))
            await begun.wait()
            (engine := engine_of(replica)).kill()
            await replica.check_health()
            assert await stream == 60
            assert engine_of(replica).pid != engine.pid

            # A client that goes takes its request along.
            begun = asyncio.Event()
            stream = asyncio.create_task(tokens_of(client, 2000, begun))
            await begun.wait()
            stream.cancel()

            async def idle() -> bool:
                return "lightllm_request_cancelled_total 1.0" in (await client.get("/metrics")).text

            await eventually(idle)

            # With the daemon the stream breaks off or tells an error, and the replica has to end.
            begun = asyncio.Event()
            stream = asyncio.create_task(tokens_of(client, 2000, begun))
            await begun.wait()
            os.kill(replica.daemon.pid, signal.SIGKILL)
            with pytest.raises(httpx.TransportError):
                await stream
            assert (await client.get("/v1/models")).status_code == 503
            with pytest.raises(EngineError, match="does not answer"):
                await replica.check_health()

            async def told() -> bool:
                return lost == [-signal.SIGKILL]

            await eventually(told)
        replica.stop()

    asyncio.run(scene())


def test_a_daemon_that_cannot_start_fails_the_replica_by_its_exit_code() -> None:
    async def scene() -> None:
        replica = Replica(None, FAKE | {"engine.fake.fault": "config"}, on_lost=print)
        with pytest.raises(EngineError, match="exit code 78"):
            await replica.start()
        replica.stop()

    asyncio.run(scene())


def test_no_daemon_outlives_its_replica() -> None:
    program = (
        "import asyncio, sys, time\n"
        "from lightllmd.ray_serve.daemon import ReplicaDaemon\n"
        f"daemon = ReplicaDaemon(None, {FAKE!r})\n"
        "daemon.start(); print(daemon.pid, daemon._folder, flush=True); time.sleep(60)\n"
    )
    replica = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pid, folder = replica.stdout.readline().split()
    daemon = psutil.Process(int(pid))
    replica.kill()
    replica.wait()
    wait_for(lambda: not daemon.is_running() or daemon.status() == psutil.STATUS_ZOMBIE, what="the daemon's end")
    subprocess.run(["rm", "-r", folder], check=True)


def test_what_a_replica_says_itself_is_refused() -> None:
    with pytest.raises(ConfigInvalid, match=r"http.unix_socket: is the replica's own"):
        checked(None, FAKE | {"http": {"unix_socket": "/run/http.sock"}})
    with pytest.raises(ConfigInvalid, match=r"http.wrkers: unknown key"):
        checked(None, FAKE | {"http.wrkers": 1})
    with pytest.raises(ConfigInvalid, match="not both"):
        checked("/etc/lightllmd/lightllmd.toml", FAKE)
    assert checked(None, FAKE | {"eos_id": [2, 7], "http": {"workers": 2}}).http.workers == 2


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"max_replica": 2}, "max_replica: unknown argument; nearest: max_replicas"),
        ({"max_replicas": "2"}, "Expected `int`, got `str` - at `$.max_replicas`"),
        ({"min_replicas": 3, "max_replicas": 2}, "min_replicas 3, max_replicas 2"),
        ({"max_replicas": 0, "min_replicas": 0}, "at least 1"),
    ],
)
def test_a_wrong_argument_is_named(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigInvalid) as refused:
        arguments.read(given)
    assert message in refused.value.message


def test_a_replica_asks_for_the_gpus_that_its_daemon_plans_with() -> None:
    asked = arguments.read({})
    assert arguments.gpus(asked, checked(None, FAKE)) == 0
    assert arguments.gpus(asked, checked(None, {"model_dir": "/models/m"})) == 1
    several = {"model_dir": "/models/m", "tp": 2, "engine.replicas": 2}
    assert arguments.gpus(asked, checked(None, several)) == 4
    assert arguments.gpus(asked, checked(None, {"model_dir": "/models/m", "engine.device": "cpu"})) == 0
    assert arguments.gpus(arguments.read({"num_gpus": 0.5}), checked(None, FAKE)) == 0.5

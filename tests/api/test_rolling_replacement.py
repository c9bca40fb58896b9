"""Api workers are replaced under clients that keep their connections: none of them notices."""

from __future__ import annotations

import asyncio
import http.client
import json
import threading
from pathlib import Path
from typing import Any

import httpx

from api.frontend_harness import expected, frames, make_plan, until
from api.frontend_harness import run as run_here
from api.test_api_process import Process, process, until_token
from harness import Daemon, run, wait_for
from lightllmd.api.server import KEEP_ALIVE_RETIRED
from lightllmd.ipc import messages
from long_run import LONG

REPLACEMENTS, KEPT = (4, 12) if LONG else (2, 6)  # KEPT: clients that keep their connections
TOKENS = 5


def whole(body: str | bytes) -> list[str]:
    return json.loads(body).get("generated_text", [])


class Clients:
    """Closed loops over kept connections until `stop`: each asks as soon as it was answered."""

    def __init__(self, daemon: Daemon) -> None:
        self.url, self.port = daemon.url, daemon.port
        self.stop = threading.Event()
        self.answers = 0
        self.connections = 0  # that the raw clients made
        self.failures: list[str] = []

    def _body(self, prompt: str) -> dict[str, Any]:
        return {"inputs": prompt, "parameters": {"max_new_tokens": TOKENS, "ignore_eos": True}}

    def _check(self, prompt: str, status: int, text: str) -> None:
        self.answers += 1
        if status != 200 or text != expected(prompt, TOKENS):
            self.failures.append(f"{prompt}: {status} {text}")

    async def _kept(self, number: int) -> None:
        """Streams and whole answers by turns."""
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=1)) as client:
            turn = 0
            while not self.stop.is_set():
                turn += 1
                prompt = f"h{number}.{turn}"
                path = "/generate_stream" if turn % 2 else "/generate"
                try:
                    answer = await client.post(f"{self.url}{path}", json=self._body(prompt))
                except httpx.HTTPError as failure:
                    self.failures.append(f"{prompt}: {failure!r}")
                    continue
                parts = [frame["token"]["text"] for frame in frames(answer.text)] if turn % 2 else whole(answer.text)
                self._check(prompt, answer.status_code, "".join(parts))

    def _raw(self, number: int) -> None:
        """http.client: no pool, no look at the connection before it is used again, no retry."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        turn = 0
        while not self.stop.is_set():
            turn += 1
            prompt = f"r{number}.{turn}"
            try:
                if connection.sock is None:
                    self.connections += 1
                body = json.dumps(self._body(prompt))
                connection.request("POST", "/generate", body, {"Content-Type": "application/json"})
                answer = connection.getresponse()
                self._check(prompt, answer.status, "".join(whole(answer.read())))
            except (OSError, http.client.HTTPException) as failure:
                self.failures.append(f"{prompt}: {failure!r}")
                connection.close()
        connection.close()

    async def loop(self) -> None:
        raw = [asyncio.to_thread(self._raw, number) for number in range(4)]
        await asyncio.gather(*raw, *(self._kept(number) for number in range(KEPT)))


def test_rolling_replacements_under_closed_loop_clients_lose_no_request(tmp_path: Path) -> None:
    with Daemon(tmp_path, "--http.workers", "2") as daemon:
        clients = Clients(daemon)

        def replace() -> None:
            try:
                for _ in range(REPLACEMENTS):
                    before, pids = clients.answers, {worker["pid"] for worker in daemon.workers("api")}
                    with daemon.control_client() as control:
                        job = control.post("/v1/restart", json={"worker": "api"}).json()["id"]
                    wait_for(lambda job=job: ended(daemon, job), what="the end of the restart")
                    assert not pids & {worker["pid"] for worker in daemon.workers("api")}
                    wait_for(lambda before=before: clients.answers > before + 50, what="answers")
            finally:
                clients.stop.set()

        async def scenario() -> None:
            await asyncio.gather(clients.loop(), asyncio.to_thread(replace))

        run(scenario())
        assert not clients.failures, clients.failures[:10]
        assert clients.connections >= 4, "the raw clients were on connections that outlived no worker"
        status = daemon.status()
        assert status["requests"]["failed"] == 0
        assert daemon.stop() == 0


def ended(daemon: Daemon, job: int) -> bool:
    with daemon.control_client() as control:
        shown = control.get(f"/v1/jobs/{job}").text.splitlines()[-1]
    outcome = json.loads(shown)["outcome"]
    assert outcome in (None, "done"), shown
    return outcome == "done"


# --- one process ----------------------------------------------------------------------------------------------------


def test_retired_worker_answers_on_open_connections_and_asks_for_new_ones(tmp_path: Path) -> None:
    """Also after a stream that could not say so any more, and on a connection that has brought nothing yet."""

    async def scenario() -> None:
        async with process(tmp_path, make_plan(hold_keepalive=0.1)) as old:
            engine = await old.engine(1)
            assert (await old.client.get("/liveness")).headers.get("connection") != "close"
            fresh_reader, fresh_writer = await asyncio.open_connection("127.0.0.1", old.port)
            async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{old.port}", timeout=60) as streaming:
                body = {"inputs": "s", "parameters": {"max_new_tokens": 6}}
                async with streaming.stream("POST", "/generate_stream", json=body) as answer:
                    await engine.submitted(1)
                    engine.step()
                    text = answer.aiter_text()
                    await until_token(text)
                    waiting = asyncio.create_task(old.client.post("/generate", json={"inputs": "w"}))
                    await engine.submitted(2)
                    old.tell(messages.Retire())
                    old.tell(messages.Hold())  # heard in order: `gated` below says that Retire was, too
                    fresh_writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\n\r\n")
                    fresh_writer.write(b'{"inputs":"f"}')
                    await until(lambda: old.beat() and old.beat().stats["gated"] == 1)
                    old.tell(messages.Release())
                    engine.free_run = True
                    async for _ in text:
                        pass
                assert answer.headers.get("connection") != "close"
                again = await streaming.post("/generate", json={"inputs": "again"})
                for answer in (again, await waiting):
                    assert (answer.status_code, answer.headers["connection"]) == (200, "close")
                head = await fresh_reader.read()
                assert head.startswith(b"HTTP/1.1 200")
                assert b"connection: close\r\n" in head
                fresh_writer.close()
            assert await old.exit_code() == 0
            assert old.log.read_text() == ""
            engine.die()

    run_here(scenario())


def test_request_that_is_still_on_its_way_when_a_worker_retires_is_answered(tmp_path: Path) -> None:
    """Its head is here, its body is not."""

    async def scenario() -> None:
        async with process(tmp_path) as old:
            engine = await old.engine(1)
            engine.free_run = True
            reader, writer = await asyncio.open_connection("127.0.0.1", old.port)
            writer.write(b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 14\r\nExpect: 100-continue\r\n\r\n")
            assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 100")
            old.tell(messages.Retire())
            old.tell(messages.Tune("info", 1.0, 10.0))
            count = len(old.beats)
            await until(lambda: old.beat() and len(old.beats) > count + 1)
            writer.write(b'{"inputs":"f"}')
            assert (await reader.read()).startswith(b"HTTP/1.1 200")
            writer.close()
            assert await old.exit_code() == 0
            engine.die()

    run_here(scenario())


def test_idle_connections_keep_a_retired_worker_for_a_while_only(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with process(tmp_path) as one:
            unused_reader, unused = await asyncio.open_connection("127.0.0.1", one.port)
            reader, writer = await asyncio.open_connection("127.0.0.1", one.port)
            writer.write(b"GET /liveness HTTP/1.1\r\nHost: x\r\n\r\n")
            await reader.readuntil(b"}")
            one.tell(messages.Retire())
            begun = asyncio.get_running_loop().time()
            assert await one.exit_code() == 0
            assert asyncio.get_running_loop().time() - begun > KEEP_ALIVE_RETIRED * 0.9
            assert await reader.read() == await unused_reader.read() == b""
            writer.close()
            unused.close()

    run_here(scenario())


def test_connections_of_the_moment_of_retirement_are_answered_by_one_or_the_other(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with process(tmp_path) as old:
            first = await old.engine(1)
            first.free_run = True
            new = Process(tmp_path, listener=old.listener, epoch=2)
            try:
                await new.ready()

                async def ask() -> int:
                    async with httpx.AsyncClient(timeout=60) as client:
                        return (await client.get(f"http://127.0.0.1:{old.port}/liveness")).status_code

                asking = [asyncio.create_task(ask()) for _ in range(100)]
                await asyncio.sleep(0)
                old.tell(messages.Retire())
                assert set(await asyncio.gather(*asking)) == {200}
                assert await old.exit_code() == 0
            finally:
                await new.close()
            first.die()

    run_here(scenario())

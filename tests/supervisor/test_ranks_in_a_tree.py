"""Generations of several ranks as real processes, with stand-ins in the place of engines."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import psutil

from harness import wait_for
from leftovers import wait_ended
from lightllmd.errors import EXIT_CONFIG
from stand_ins import StandInDaemon

TP = ("--tp", "3")


def ranks(daemon: StandInDaemon) -> list[psutil.Process]:
    """Once all are in service."""

    def found() -> list[psutil.Process] | None:
        rows = daemon.workers("engine")
        ready = len(rows) == 3 and all(row["state"] == "running" and row["phase"] == "ready" for row in rows)
        return [psutil.Process(row["pid"]) for row in rows] if ready else None

    return wait_for(found, what="three ranks")


def crashes(daemon: StandInDaemon) -> list[dict[str, object]]:
    with daemon.control_client() as client:
        return client.get("/v1/crashes").json()


def test_a_signal_at_any_rank_ends_all_and_nothing_is_left(tmp_path: Path) -> None:
    """SIGTERM, SIGKILL, SIGSTOP, a hang, a restart, a stop."""
    with StandInDaemon(tmp_path, *TP, "--supervisor.hang_timeout", "2") as daemon:
        told = [
            (2, signal.SIGKILL, "killed by SIGKILL"),
            (1, signal.SIGTERM, "killed by SIGTERM"),
            (0, signal.SIGSEGV, "killed by SIGSEGV"),
            (1, signal.SIGSTOP, "hung: "),
        ]
        for generation, (rank, number, cause) in enumerate(told, 1):
            group = ranks(daemon)
            os.kill(group[rank].pid, number)
            down = wait_for(
                lambda n=generation: [m for m in daemon.heard("api-1", "EngineDown") if m["generation"] == n]
            )
            assert len(down) == 1
            assert down[0]["cause"].startswith(f"rank {rank} (pid {group[rank].pid}): {cause}")
            wait_ended(group)
            last = wait_for(lambda: (w := daemon.worker("engine-0"))["state"] == "running" and w["last_exit"])
            assert last["cause"].startswith(down[0]["cause"])
        group = ranks(daemon)
        assert [row["name"] for row in daemon.workers("engine")] == ["engine-0", "engine-0.1", "engine-0.2"]
        assert [crash["worker"] for crash in reversed(crashes(daemon))] == [
            "engine-0.2",
            "engine-0.1",
            "engine-0",
            "engine-0.1",
        ]
        daemon.order("live", hang="engine.2")
        wait_ended(group)
        daemon.order("live")
        assert "rank 2 " in daemon.heard("api-1", "EngineDown")[-1]["cause"]
        group = ranks(daemon)
        assert daemon.wait_job(daemon.ask("restart", {"worker": "engine-0.1"}))["outcome"] == "done"
        wait_ended(group)
        assert len(crashes(daemon)) == 5, "nothing that was asked for is a crash"
        group = ranks(daemon)
        assert daemon.stop() == 0
        wait_ended(group)


def test_a_rank_that_can_never_run_ends_a_daemon_that_never_served(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path, *TP)
    daemon.order("engine", load_seconds=100)
    daemon.order("engine.1", fail={"kind": "config", "message": "because"}, exit=EXIT_CONFIG)
    daemon.start(ready=False)
    assert daemon.exit_code() == EXIT_CONFIG
    log = daemon.log_text()
    assert "engine-0.1: rank 1 (pid " in log
    assert "configuration error: because" in log

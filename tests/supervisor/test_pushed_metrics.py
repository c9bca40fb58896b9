"""The process that pushes metrics, in the daemon: kept, told, ended; and what it can't do to those that serve."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from closed_loop import ctl
from gateway_stand_in import Gateway
from harness import Daemon, wait_for
from real_gateway import samples
from stand_ins import StandInDaemon

AUTHORIZED = {"USERNAME": "operator", "PASSWORD": "s3cret"}


def settings(gateway: str, **more: Any) -> dict[str, Any]:
    return {"engine.backend": "fake", "metric_gateway": gateway, "push_interval": 1, **more}


def file_of(daemon: Daemon, told: dict[str, Any]) -> None:
    tables: dict[str, list[str]] = {"": []}
    for key, value in told.items():
        table, _, name = key.rpartition(".")
        tables.setdefault(table, []).append(f"{name} = {json.dumps(value)}")
    text = "\n".join("\n".join([f"[{table}]"] * bool(table) + lines) for table, lines in tables.items())
    (daemon.folder / "lightllmd.toml").write_text(text + "\n")


def serving(daemon: Daemon) -> list[tuple[str, int]]:
    return [(one["name"], one["pid"]) for one in daemon.status()["workers"] if one["kind"] != "push"]


def reload(daemon: StandInDaemon) -> dict[str, str]:
    """The class of each change."""
    job = daemon.wait_job(daemon.ask("reload"))
    assert job["outcome"] == "done", job
    return {change["key"]: change["reload"] for change in job["details"]["changes"]}


def test_all_five_are_live_and_what_pushes_may_die_without_harm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in AUTHORIZED.items():
        monkeypatch.setenv(name, value)
    with Gateway() as old, Gateway() as new:
        daemon = StandInDaemon(tmp_path)
        file_of(daemon, {"engine.backend": "fake"})
        with daemon.start():
            before = serving(daemon)
            assert daemon.status()["push"] is None
            file_of(daemon, settings(old.address))
            assert reload(daemon) == {"metric_gateway": "live", "push_interval": "live"}
            assert old.next().group == {"job": "lightllm"}

            # all five at once
            told = settings(new.address, job_name="x", grouping_key=["instance=a/b"], enable_monitor_auth=True)
            file_of(daemon, told | {"push_interval": 2})
            assert set(reload(daemon).values()) == {"live"}
            pushed = new.next()
            assert pushed.group == {"job": "x", "instance": "a/b"}
            assert pushed.headers["Authorization"].startswith("Basic ")
            status = wait_for(lambda: (now := daemon.status()["push"])["pushed_at"] and not now["failing"] and now)
            assert (status["gateway"], status["job"]) == (new.address, "x")

            # the password is the pushing process's alone, and is told nowhere
            with daemon.control_client() as control:
                assert "s3cret" not in control.get("/v1/config").text + control.get("/v1/status").text
            for name, pid in serving(daemon):
                assert "PASSWORD" not in psutil.Process(pid).environ(), name

            # it yields to those that serve
            assert all(psutil.Process(daemon.pid("push")).nice() > psutil.Process(pid).nice() for _, pid in before)

            # killed: counted, started again, and health does not change
            pushes = samples(pushed.body)["lightllm_push_count_total"]
            pid = daemon.kill("push")
            while samples(new.next().body)["lightllm_push_count_total"] <= pushes:
                pass
            assert daemon.pid("push") != pid
            daemon.wait_worker("push-0", state="running", restarts=1)
            assert (daemon.status()["state"], daemon.status()["health"]) == ("serving", "ready")

            # no gateway any more
            file_of(daemon, {"engine.backend": "fake"})
            assert set(reload(daemon).values()) == {"live"}
            wait_for(lambda: not daemon.workers("push"))
            assert daemon.status()["push"] is None
            assert serving(daemon) == before
            assert "s3cret" not in daemon.log_text()
            assert daemon.stop() == 0
        assert old.pushes.empty() or old.next().method == "PUT"
        assert {push.method for push in new.pushes.queue} <= {"PUT"}, "nothing is deleted"


def test_a_reload_that_lacks_user_and_password_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in AUTHORIZED:
        monkeypatch.delenv(name, raising=False)
    with Gateway() as gateway:
        daemon = StandInDaemon(tmp_path)
        file_of(daemon, settings(gateway.address))
        with daemon.start():
            gateway.next()
            file_of(daemon, settings(gateway.address, enable_monitor_auth=True))
            done = ctl(daemon, "reload")
            assert done.code == 6, done
            assert "enable_monitor_auth: true: the environment variables USERNAME and PASSWORD" in done.errors
            assert "Authorization" not in gateway.next().headers


def test_what_pushes_may_not_come_up_at_all(tmp_path: Path) -> None:
    with Gateway() as gateway:
        slow = ("--supervisor.backoff_initial", "60", "--supervisor.backoff_max", "60")
        daemon = StandInDaemon(tmp_path, "--metric_gateway", gateway.address, *slow)
        daemon.order("push")
        with daemon.start():
            broken = daemon.wait_worker("push-0", state="backoff", restarts=1)
            assert broken["last_exit"]["cause"] == "ended by itself with exit 1"
            status = daemon.status()
            assert (status["state"], status["health"], status["ready"]) == ("serving", "ready", True)
            assert (status["push"]["failing"], status["push"]["pushed_at"]) == (True, None)
            (daemon.home / "push.json").unlink()
            assert daemon.wait_job(daemon.ask("restart", {"worker": "push-0"}))["message"] == "push-0 was replaced"
            assert gateway.next().group == {"job": "lightllm"}
            daemon.order("push")
            daemon.kill("push")
            daemon.wait_worker("push-0", state="backoff")
            (daemon.home / "push.json").unlink()
            daemon.wait_job(daemon.ask("reset-failed"))
            daemon.wait_worker("push-0", state="running")


def test_a_stop_at_once_waits_for_no_push(tmp_path: Path) -> None:
    with Gateway() as gateway:
        with StandInDaemon(tmp_path, "--metric_gateway", gateway.address, "--push_interval", "3600") as daemon:
            gateway.next()
            daemon.wait_worker("push-0", state="running")
            daemon.process.send_signal(signal.SIGQUIT)
            assert daemon.process.wait(30) == 0
        assert gateway.pushes.empty()

"""The spare engine: a restart takes it, its own life and death touch nobody, and it never stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from harness import Daemon, SpareDaemon, wait_for
from leftovers import wait_ended
from lightllmd.supervisor.context import CPU_IMPORTS, GPU_IMPORTS, Commands
from stand_ins import StandInDaemon
from tiny_models import plan_for, write_model

OWN_MODULES = """
import importlib, json, os, sys
for module in sys.argv[1:]:
    importlib.import_module(module)
import torch
files = []
for fd in os.listdir("/proc/self/fd"):
    try:
        files.append(os.readlink(f"/proc/self/fd/{fd}"))
    except OSError:
        pass
print(json.dumps([torch.cuda.is_initialized(), "prometheus_client" in sys.modules, files]))
"""


def on_gpu(folder: Path, *flags: str) -> StandInDaemon:
    daemon = StandInDaemon(folder, *flags)
    daemon.order("probe", free=80 * 10**9)
    return daemon


def spare(daemon: Daemon) -> int:
    return wait_for(daemon.spare, what="a spare engine")


def kill(daemon: StandInDaemon, number: int = signal.SIGKILL) -> None:
    os.kill(daemon.worker("engine-0")["pid"], number)


def test_a_restart_takes_the_spare_and_gets_another(tmp_path: Path) -> None:
    with on_gpu(tmp_path).start() as daemon:
        for generation in (2, 3):
            kept = spare(daemon)
            assert [worker["name"] for worker in daemon.status()["workers"] if worker["kind"] == "engine"] == [
                "engine-0"
            ]
            kill(daemon)
            worker = daemon.wait_worker("engine-0", state="running", generation=generation)
            assert worker["pid"] == kept
            assert worker["restarts"] == generation - 1
            assert time.time() - worker["started"] < time.time() - psutil.Process(kept).create_time()
            assert spare(daemon) != kept
        assert daemon.wait_job(daemon.ask("restart", {"worker": "engine"}))["outcome"] == "done"
        assert daemon.stop() == 0


def test_a_dead_spare_is_let_go_and_the_next_generation_brings_another(tmp_path: Path) -> None:
    with on_gpu(tmp_path).start() as daemon:
        kept = spare(daemon)
        os.kill(kept, signal.SIGKILL)
        wait_for(lambda: "the spare engine: killed by SIGKILL" in daemon.log_text())
        wait_for(lambda: not psutil.pid_exists(kept))
        assert daemon.wait_ready()["generation"] == 1
        assert daemon.spare() is None, "one that can't live isn't tried in a loop"
        kill(daemon)
        worker = daemon.wait_worker("engine-0", state="running", generation=2)
        assert worker["restarts"] == 1
        assert spare(daemon) != worker["pid"]


def test_a_stopped_spare_is_not_taken(tmp_path: Path) -> None:
    with on_gpu(tmp_path).start() as daemon:
        kept = spare(daemon)
        os.kill(kept, signal.SIGSTOP)
        kill(daemon)
        assert daemon.wait_worker("engine-0", state="running", generation=2)["pid"] != kept
        wait_for(lambda: not psutil.pid_exists(kept))


def test_a_spare_may_wait_longer_than_a_boot(tmp_path: Path) -> None:
    with on_gpu(tmp_path, "--supervisor.boot_timeout", "8").start() as daemon:
        kept = spare(daemon)
        wait_for(lambda: time.time() - psutil.Process(kept).create_time() > 9)
        kill(daemon)
        assert daemon.wait_worker("engine-0", state="running", generation=2)["pid"] == kept
        assert "SIGABRT" not in daemon.log_text()


@pytest.mark.parametrize(("gpu", "flags"), [(False, ()), (True, ("--supervisor.spare_engine", "false"))])
def test_none_is_kept_where_it_saves_nothing_or_isnt_wanted(tmp_path: Path, gpu: bool, flags: tuple[str, ...]) -> None:
    daemon = on_gpu(tmp_path, *flags) if gpu else StandInDaemon(tmp_path, *flags)
    with daemon.start():
        kill(daemon)
        daemon.wait_worker("engine-0", state="running", generation=2)
        assert daemon.spare() is None


def test_a_real_engine_goes_on_from_its_spare(tmp_path: Path) -> None:
    with SpareDaemon(tmp_path) as daemon:
        kept = spare(daemon)
        daemon.kill("engine")
        wait_for(lambda: daemon.pid("engine") == kept and daemon.status()["ready"])
        os.kill(spare(daemon), signal.SIGTERM)
        wait_for(lambda: daemon.spare() is None)
        assert daemon.stop() == 0


def test_a_spare_that_cant_import_disturbs_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SPARE_IMPORTS", "lightllmd.engine.nowhere")
    with SpareDaemon(tmp_path) as daemon:
        wait_for(lambda: "the spare engine: No module named 'lightllmd.engine.nowhere'" in daemon.log_text())
        assert daemon.wait_ready()["generation"] == 1
        assert daemon.stop() == 0


def test_a_killed_supervisor_leaves_no_spare(tmp_path: Path) -> None:
    with SpareDaemon(tmp_path) as daemon:
        kept = psutil.Process(spare(daemon))
        daemon.process.kill()
        daemon.process.wait()
        wait_ended([kept])
    with Daemon(tmp_path) as again:  # clears up
        assert again.stop() == 0


@pytest.mark.parametrize("imports", [CPU_IMPORTS, GPU_IMPORTS], ids=["CPU", "GPU"])
def test_what_a_spare_imports_touches_no_device_and_needs_no_configuration(imports: tuple[str, ...]) -> None:
    if imports is GPU_IMPORTS:
        pytest.importorskip("triton")
    command = [sys.executable, "-c", OWN_MODULES, *imports]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    on_device, metrics, files = json.loads(run.stdout)
    assert not on_device
    assert not metrics
    assert not [file for file in files if file.startswith("/dev/nvidia")]


def test_a_spare_imports_what_the_device_of_its_plan_needs(tmp_path: Path) -> None:
    model = write_model(tmp_path)
    on_cpu, on_a_gpu = plan_for(model), plan_for(model, device="cuda")
    engine = msgspec.structs.replace(on_cpu.config.engine, backend="fake")
    fake = msgspec.structs.replace(on_cpu, config=msgspec.structs.replace(on_cpu.config, engine=engine))
    assert [Commands().early(plan) for plan in (on_cpu, on_a_gpu, fake)] == [CPU_IMPORTS, GPU_IMPORTS, ()]


def test_a_spare_is_told_where_to_make_a_context_before_what_to_import() -> None:
    commands = Commands("python")
    fixed = ["python", "-m", "lightllmd.engine", "3", str(os.getpid()), "4"]
    assert commands.engine(3, 4) == fixed
    assert commands.engine(3, 4, GPU_IMPORTS) == [*fixed, *GPU_IMPORTS]
    assert commands.engine(3, 4, GPU_IMPORTS, "cuda") == [*fixed, "--context", "cuda", *GPU_IMPORTS]


def test_a_spare_that_cant_make_its_context_ends_and_disturbs_nobody(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SPARE_CONTEXT", "cuda:99")
    with SpareDaemon(tmp_path) as daemon:
        wait_for(lambda: "the spare engine: can't make a context on cuda:99" in daemon.log_text())
        assert daemon.spare() is None
        engine = daemon.pid("engine")
        assert daemon.wait_ready()["generation"] == 1
        assert daemon.stop() == 0
        assert daemon.log_text().count("the spare engine: ") == 1, "it isn't tried in a loop"
        assert f"pid {engine}" in daemon.log_text()


def test_the_status_shows_the_spare_as_a_worker_of_its_own_kind(tmp_path: Path) -> None:
    def shown(state: str) -> dict[str, Any] | None:
        found = [worker for worker in daemon.workers("spare") if worker["state"] == state and worker["memory_bytes"]]
        return found[0] if found else None

    with SpareDaemon(tmp_path) as daemon:
        worker = wait_for(lambda: shown("running"), what="a spare that has done what it can")
        assert (worker["name"], worker["pid"], worker["phase"]) == ("spare", spare(daemon), "ready")
        assert worker["memory_bytes"] > 1_000_000
        assert daemon.status()["restarts"] == 0
        daemon.kill("engine")
        wait_for(lambda: daemon.pid("engine") == worker["pid"] and daemon.status()["ready"])
        assert wait_for(lambda: shown("running"))["pid"] != worker["pid"]
    with on_gpu(tmp_path).start() as daemon:  # whose stand-in never says that it's done
        assert wait_for(lambda: shown("starting"))["pid"] == spare(daemon)
        assert [worker["kind"] for worker in daemon.status()["workers"]] == ["api", "engine", "spare"]


def test_a_reload_lets_the_spare_go_and_brings_one_back(tmp_path: Path) -> None:
    with on_gpu(tmp_path).start() as daemon:
        kept = spare(daemon)
        file = tmp_path / "lightllmd.toml"
        file.write_text("[supervisor]\nspare_engine = false\nstop_timeout = 5\n")
        assert daemon.wait_job(daemon.ask("reload"))["outcome"] == "done"
        wait_for(lambda: not psutil.pid_exists(kept), what="the spare's end")
        assert daemon.spare() is None
        file.write_text("")
        assert daemon.wait_job(daemon.ask("reload"))["outcome"] == "done"
        assert spare(daemon) != kept
        assert daemon.stop() == 0

"""The supervisor's process handling, with stand-in children: deaths, hangs, drains, restarts, ends."""

from __future__ import annotations

import os
import signal
import socket
import time
from pathlib import Path

import httpx
import psutil

from harness import wait_for
from leftovers import wait_ended
from lightllmd.errors import EXIT_OK
from lightllmd.ipc.signals import MEANINGLESS
from stand_ins import StandInDaemon


def test_an_engine_that_the_kernel_is_still_taking_down_is_not_ready(tmp_path: Path) -> None:
    """The end of its channel tells of a death before the pidfd does."""
    with StandInDaemon(tmp_path) as daemon:
        descriptors = Path(f"/proc/{daemon.worker('engine-0')['pid']}/fd")
        highest = max(int(path.name) for path in descriptors.iterdir())
        assert os.readlink(descriptors / str(highest)).startswith("socket:"), "let go of first, so told first"
        daemon.order("live", dying="engine")
        told = wait_for(lambda: [m for m in daemon.heard("api-1", "Health") if m["reason"] == "the engine is dying"])
        assert not told[0]["ready"]
        assert not daemon.heard("api-1", "EngineDown"), "nothing is decided before it is dead"
        daemon.order("live")
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)
        daemon.wait_heard("api-1", "EngineDown")
        daemon.wait_worker("engine-0", state="running", generation=2)


def test_a_fault_of_its_own_is_told_as_such(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path) as daemon:
        daemon.order("engine", unproven=[7, 9])
        daemon.wait_job(daemon.ask("restart", {"worker": "engine"}))
        daemon.wait_worker("engine-0", state="running", generation=2)
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGSEGV)
        down = wait_for(lambda: [m for m in daemon.heard("api-1", "EngineDown") if m["generation"] == 2])[0]
        assert (down["cause"], down["unproven"], down["quarantined"]) == ("killed by SIGSEGV", [7, 9], 9)
        exit_ = daemon.wait_worker("engine-0", state="running")["last_exit"]
        assert any("most recent call first" in line for line in exit_["stderr"]), "faulthandler's stack is kept"


def test_a_hung_worker_is_aborted_and_its_stacks_are_kept(tmp_path: Path) -> None:
    patient = ("--supervisor.abort_grace", "30")  # with a process that writes its stacks and ends
    with StandInDaemon(tmp_path, "--supervisor.hang_timeout", "3", *patient) as daemon:
        daemon.order("live", hang="engine")
        down = daemon.wait_heard("api-1", "EngineDown")
        daemon.order("live")
        assert down["cause"] == "hung: no progress for 3 s in phase ready", "told before it is dead"
        exit_ = daemon.wait_worker("engine-0", state="running", generation=2)["last_exit"]
        assert exit_["cause"] == f"{down['cause']}; ended by SIGABRT"
        assert any("most recent call first" in line for line in exit_["stderr"])


def test_a_stopped_worker_is_killed(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--supervisor.hang_timeout", "3") as daemon:
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGSTOP)
        down = daemon.wait_heard("api-1", "EngineDown")
        assert down["cause"].startswith("hung: ")
        assert down["cause"].endswith(" for 3 s in phase ready")
        api = daemon.wait_worker("api-0", state="running")["pid"]
        os.kill(api, signal.SIGSTOP)
        assert daemon.wait_worker("api-0", state="running", generation=2)["pid"] != api
        assert daemon.wait_heard("engine-2", "ApiGone")["epoch"] == 1


def test_a_worker_stopped_before_its_first_word_is_killed_too(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--supervisor.hang_timeout", "3") as daemon:
        daemon.order("engine", stop_self=True)
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)
        down = wait_for(lambda: (downs := daemon.heard("api-1", "EngineDown"))[1:] and downs[1])
        daemon.order("engine")
        assert down["cause"] == "hung: stopped by a signal for 3 s in phase boot"
        daemon.wait_worker("engine-0", state="running")


def test_a_paused_supervisor_kills_no_healthy_worker(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--supervisor.hang_timeout", "4") as daemon:
        before = [worker["pid"] for worker in daemon.status()["workers"]]
        os.kill(daemon.process.pid, signal.SIGSTOP)
        time.sleep(4.5)  # the pause itself, longer than the deadline
        os.kill(daemon.process.pid, signal.SIGCONT)
        seen = len(daemon.heard("api-1"))
        wait_for(lambda: daemon.status()["heartbeat_age_s"] < 0.5)
        assert [worker["pid"] for worker in daemon.status()["workers"]] == before
        assert len(daemon.heard("api-1")) == seen


def test_a_dead_api_worker_comes_back_on_the_same_listener_with_its_next_epoch(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path) as daemon:
        daemon.order("live", api={"ok": 5, "failed": 1})
        wait_for(lambda: daemon.status()["requests"]["ok"] == 5)
        os.kill(daemon.worker("api-0")["pid"], signal.SIGKILL)
        with socket.create_connection(("127.0.0.1", daemon.port)):
            assert daemon.wait_heard("engine-1", "ApiGone")["epoch"] == 1
            assert daemon.wait_heard("api-2", "EngineUp")["generation"] == 1
        wait_for(lambda: daemon.status()["requests"]["ok"] == 10, what="the sums of dead epochs are kept")


def test_crash_loop_backs_off_then_retries_slowly_and_says_when(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path, "--supervisor.start_limit_burst", "3", "--supervisor.retry_interval", "300")
    daemon.order("engine", exit=1)
    daemon.start(ready=False)
    try:
        worker = daemon.wait_worker("engine-0", state="backoff", generation=4)
        assert 200 < worker["next_try_at"] - time.time() <= 300
        assert worker["last_exit"]["stderr"] == ["last words"]
        status = daemon.status()
        assert not status["ready"]
        assert "ended by itself with exit 1" in status["health"]
        daemon.order("engine")
        assert daemon.wait_job(daemon.ask("restart", {"worker": "engine-0"}))["outcome"] == "done"
        assert daemon.wait_ready()["generation"] == 5
    finally:
        daemon.stop()


def test_a_permanent_failure_before_service_ends_the_daemon_with_its_code(tmp_path: Path) -> None:
    for kind, code in (("config", 78), ("weights", 78), ("device", 69), ("memory", 1)):
        daemon = StandInDaemon(tmp_path / kind)
        daemon.order("engine", fail={"kind": kind, "message": "because"}, exit=3)
        daemon.start(ready=False)
        assert daemon.exit_code() == code
        assert "because" in daemon.log_text()


def test_a_permanent_failure_after_service_leaves_a_degraded_daemon_that_says_why(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path) as daemon:
        daemon.order("engine", exit=80)
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)
        daemon.wait_worker("engine-0", state="fatal")
        status = daemon.status()
        assert (status["state"], status["ready"], status["model"]["state"]) == ("degraded", False, "failed")
        assert "out of memory" in status["health"]
        assert not daemon.wait_heard("api-1", "Health")["ready"]
        daemon.order("engine")
        assert daemon.wait_job(daemon.ask("restart"))["outcome"] == "done"
        assert daemon.wait_ready()["state"] == "serving"


def test_status_answers_during_load_with_progress(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path)
    daemon.order("engine", load_seconds=100)
    daemon.start(ready=False)
    try:
        status = wait_for(lambda: (s := daemon.status())["model"] and s["model"]["progress"] and s)
        assert (status["state"], status["ready"]) == ("starting", False)
        assert 0 < status["model"]["progress"] < 1
        assert status["workers"][1]["phase"] == "load"
        daemon.order("live", loaded=True)
        daemon.wait_ready()
        wait_for(lambda: any(message["ready"] for message in daemon.heard("api-1", "Health")))
        ready = [message["ready"] for message in daemon.heard("api-1", "Health")]
        assert ready == sorted(ready), "not ready, then ready"
    finally:
        daemon.stop()


def test_sigterm_drains_before_it_ends(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path) as daemon:
        daemon.order("live", api={"in_flight": 2})
        wait_for(lambda: daemon.status()["requests"]["in_flight"] == 2)
        daemon.process.terminate()
        daemon.wait_heard("api-1", "Drain")
        status = daemon.status()
        assert (status["state"], status["ready"], status["jobs"][0]["verb"]) == ("draining", False, "stop")
        assert not daemon.wait_heard("api-1", "Health")["ready"]
        daemon.order("live", api={"in_flight": 0})
        assert daemon.exit_code() == 0
        assert [message["message"] for message in daemon.heard("api-1")][-1] == "Stop"
        assert not daemon.control.exists()


def test_drain_ends_at_its_deadline(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--supervisor.drain_timeout", "0.5") as daemon:
        daemon.order("live", api={"in_flight": 2})
        wait_for(lambda: daemon.status()["requests"]["in_flight"] == 2)
        daemon.process.send_signal(signal.SIGINT)
        assert daemon.exit_code() == 0


def test_second_sigterm_stops_now(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--supervisor.drain_timeout", "300") as daemon:
        daemon.order("live", api={"in_flight": 2})
        wait_for(lambda: daemon.status()["requests"]["in_flight"] == 2)
        daemon.process.terminate()
        daemon.wait_heard("api-1", "Drain")
        daemon.process.terminate()
        assert daemon.exit_code() == 0


def test_a_worker_that_ignores_every_order_is_killed_at_the_stop_timeout(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path, "--supervisor.stop_timeout", "0.5")
    daemon.order("engine", ignore_term=True, ignore_stop=True)
    daemon.order("api", ignore_term=True, ignore_stop=True)
    with daemon:
        daemon.process.terminate()
        assert daemon.exit_code() == 0


def test_sighup_reloads(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path) as daemon:
        daemon.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "reload done: nothing changed" in daemon.log_text())
        assert daemon.status()["ready"]


def test_no_signal_that_means_nothing_ends_daemon_or_worker(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path).start() as daemon:
        pids = [daemon.process.pid, daemon.pid("api"), daemon.pid("engine")]
        for pid in pids:
            for number in set(MEANINGLESS) - {signal.SIGHUP}:
                os.kill(pid, number)
        for pid in pids[1:]:
            for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT):
                os.kill(pid, number)
        daemon.kill("engine")
        daemon.wait_worker("engine-0", restarts=1, state="running")
        assert [daemon.process.pid, daemon.pid("api")] == pids[:2]
        daemon.process.send_signal(signal.SIGQUIT)
        assert daemon.exit_code() == EXIT_OK
        assert "SIGQUIT: stopping" in daemon.log_text()


def test_a_killed_supervisor_leaves_nothing_and_the_next_start_clears_up(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path).start()
    shm = set(os.listdir("/dev/shm"))
    family = daemon.processes()
    daemon.process.kill()
    daemon.process.wait()
    wait_ended(family[1:])
    wait_for(lambda: set(os.listdir("/dev/shm")) <= shm, what="no new file in /dev/shm")
    assert daemon.control.exists()
    assert (tmp_path / f"metrics-{family[0].pid}").exists()
    with StandInDaemon(tmp_path, port=daemon.port) as again:
        assert not (tmp_path / f"metrics-{family[0].pid}").exists()
        assert again.stop() == 0
    assert {path.name for path in tmp_path.iterdir()} == {"home", "lightllmd.toml", "log.txt"}


def test_a_second_daemon_on_the_same_socket_or_port_is_refused(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path) as daemon:
        second = StandInDaemon(tmp_path)
        second.log = tmp_path / "second.txt"
        second.start(ready=False)
        assert second.exit_code() == 71
        assert f"pid {daemon.process.pid}" in second.log_text()
        third = StandInDaemon(tmp_path / "third", port=daemon.port)
        third.start(ready=False)
        assert third.exit_code() == 71
        assert f"127.0.0.1:{daemon.port} is in use by pid" in third.log_text()
        assert daemon.status()["ready"]


def test_orphans_of_a_worker_are_reaped(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path)
    daemon.order("engine", orphan=0.2)
    with daemon:
        pid = int(wait_for(lambda: (daemon.home / "orphan").read_text().strip()))
        wait_for(lambda: not psutil.pid_exists(pid), what="the orphan's end: a zombie would stay")


def test_a_dead_workers_children_die_with_it(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path)
    daemon.order("engine", orphan=1000)
    with daemon:
        pid = int(wait_for(lambda: (daemon.home / "orphan").read_text().strip()))
        daemon.order("engine")
        os.kill(daemon.worker("engine-0")["pid"], signal.SIGKILL)
        wait_for(lambda: not psutil.pid_exists(pid), what="the end of the dead worker's group")


def test_listening_beyond_loopback_without_keys_is_warned_of(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path, "--host", "0.0.0.0") as daemon:
        assert "asks for no key" in daemon.log_text()


def test_systemd_is_told_of_load_readiness_life_and_end(tmp_path: Path, monkeypatch: object) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as systemd:
        systemd.bind(str(tmp_path / "notify"))
        systemd.settimeout(30)
        environment = {"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"}
        os.environ.update(environment)
        try:
            daemon = StandInDaemon(tmp_path)
            daemon.order("engine", load_seconds=2)
            daemon.start(ready=False)
        finally:
            for name in environment:
                del os.environ[name]
        said: list[str] = []
        while "READY=1" not in said:
            said += systemd.recv(1000).decode().splitlines()
        before = "\n".join(said)
        assert "EXTEND_TIMEOUT_USEC=" in before
        assert "STATUS=Loading weights" in before
        assert "/20.0 GB)" in before
        assert "WATCHDOG=1" in before
        daemon.process.terminate()
        while "STOPPING=1" not in said:
            said += systemd.recv(1000).decode().splitlines()
        assert daemon.exit_code() == 0
    (tmp_path / "notify").unlink()


def test_a_probe_that_finds_no_model_ends_the_daemon_with_78(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path, "--model_dir", str(tmp_path / "nothing"), fake=False)
    daemon.start(ready=False)
    assert daemon.exit_code() == 78
    assert "model_dir" in daemon.log_text()


def test_a_plan_of_any_size_reaches_every_child(tmp_path: Path) -> None:
    """A model's config.json is in it."""
    daemon = StandInDaemon(tmp_path)
    daemon.order("probe", free=10**10, padding=20_000_000)
    with daemon.start() as daemon:
        daemon.kill("engine")
        daemon.kill("api")
        daemon.wait_worker("engine-0", restarts=1, state="running")
        daemon.wait_worker("api-0", restarts=1, state="running")


def test_http_port_is_open_while_the_model_loads(tmp_path: Path) -> None:
    daemon = StandInDaemon(tmp_path)
    daemon.order("engine", load_seconds=30)
    daemon.start(ready=False)
    try:
        with socket.create_connection(("127.0.0.1", daemon.port)):
            wait_for(lambda: daemon.status()["workers"][0]["state"] == "running")
    finally:
        assert daemon.stop() == 0


def test_stop_verb_ends_the_daemon(tmp_path: Path) -> None:
    with StandInDaemon(tmp_path) as daemon:
        try:
            daemon.wait_job(daemon.ask("stop"))
        except httpx.TransportError:
            pass  # the stream may end with the daemon itself
        assert daemon.exit_code() == 0

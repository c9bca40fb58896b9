"""`systemctl reload`: returns when it is done or has failed, and says which; the service goes on either way."""

from __future__ import annotations

import pytest

from harness import free_port
from systemd_machine import Load, Service


def processes(service: Service) -> list[str]:
    return service.machine.run("pgrep", "--euid", "lightllmd").stdout.split()


def reload(service: Service) -> int:
    code = service.machine.systemctl("reload", service.unit, check=False).returncode
    assert service.show("ActiveState") == "active"
    assert service.show("NRestarts") == "0"
    return code


def test_a_reload_is_in_force_when_it_returns(service: Service) -> None:
    service.start()
    supervisor, workers = service.main_pid, processes(service)
    with Load(service) as load:
        service.configure(http='served_model_name = "renamed"')
        assert reload(service) == 0
        answer = service.machine.run("lightllmctl", "status", "--json").stdout
        load.wait_answered()
    assert '"renamed"' in answer
    assert set(load.outcomes) == {"200"}
    assert service.main_pid == supervisor
    assert set(processes(service)) != set(workers), "a front end of its own has that name"


def test_a_file_with_a_fault_changes_nothing_and_fails_the_reload(service: Service) -> None:
    service.start()
    before = processes(service)
    service.configure("max_req_total_len = -1")
    with Load(service) as load:
        assert reload(service) == 1
        load.wait_answered()
    assert set(load.outcomes) == {"200"}
    assert processes(service) == before
    assert "max_req_total_len" in service.machine.journal(f"--unit={service.unit}")


def test_an_unchanged_file_is_reloaded_at_once(service: Service) -> None:
    service.start()
    before = processes(service)
    assert reload(service) == 0
    assert processes(service) == before


def test_another_port_is_the_one_that_outlives_the_daemon(service: Service) -> None:
    service.start()
    old, service.port = service.port, free_port()
    service.configure()
    assert reload(service) == 0
    with Load(service) as load:
        service.kill("KILL")
        service.wait_running(restarts=1)
        load.wait_answered()
    assert "ConnectionRefusedError" not in load.outcomes
    assert service.show("NFileDescriptorStore") == "1"
    service.port = old
    with pytest.raises(ConnectionRefusedError):
        service.ask()

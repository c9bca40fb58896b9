"""The daemon ends and comes back under load: connections wait, and clients see no refusal."""

from __future__ import annotations

import pytest

from harness import wait_for
from systemd_machine import Load, Service

# How clients see that a process ended that had their connection, wherever they were. None of it is a refusal.
BROKEN = {"BrokenPipeError", "ConnectionResetError", "IncompleteRead", "RemoteDisconnected"}


def test_a_killed_daemon_refuses_no_connection(service: Service) -> None:
    service.start()
    with Load(service) as load:
        for restarts in (1, 2):
            service.kill("KILL")
            service.wait_running(restarts)
            load.wait_answered()
    assert set(load.outcomes) <= {"200", "503"} | BROKEN
    assert service.show("NFileDescriptorStore") == "1"


def test_a_restart_refuses_no_connection(service: Service) -> None:
    service.start()
    with Load(service) as load:
        for _ in range(2):
            service.machine.systemctl("restart", service.unit)
            load.wait_answered()
    assert set(load.outcomes) <= {"200", "503"}, "while it drains, a request is refused but not its connection"


def test_a_frozen_supervisor_is_replaced(service: Service) -> None:
    service.drop_in("[Service]\nWatchdogSec=6s\n")
    service.start()
    frozen = service.main_pid
    service.kill("STOP")
    service.wait_running(restarts=1)
    assert service.main_pid != frozen
    assert service.ask() == 200
    journal = service.machine.journal(f"--unit={service.unit}")
    assert "Watchdog timeout" in journal
    assert "most recent call first" in journal, "the stack tells where it was frozen"


def test_another_port_in_the_file_lets_go_of_the_old_one(service: Service) -> None:
    service.start()
    old = service.port
    moved = Service(service.machine)
    moved.machine.systemctl("restart", service.unit)
    assert moved.ask() == 200
    assert service.show("NFileDescriptorStore") == "1"
    assert service.port == old
    with pytest.raises(ConnectionRefusedError):
        service.ask()


def test_a_socket_unit_keeps_its_port_over_a_kill(service: Service) -> None:
    socket_unit = "lightllmd.socket"
    service.drop_in(f"[Socket]\nListenStream=\nListenStream=127.0.0.1:{service.port}\n", socket_unit)
    service.configure(port=1)  # which the daemon could not open
    service.machine.systemctl("start", socket_unit)
    assert service.show("ActiveState") == "inactive"
    with Load(service) as load:  # the first connection starts the service
        service.kill("KILL")
        service.wait_running(restarts=1)
        load.wait_answered()
    assert set(load.outcomes) <= {"200", "503"} | BROKEN
    assert service.show("NFileDescriptorStore") == "0", "the socket unit keeps it"


def test_the_daemon_is_back_before_its_workers_are_missed(service: Service) -> None:
    """Nothing of the killed daemon's tree lives beside the next one."""
    service.start()
    before = service.machine.run("pgrep", "--euid", "lightllmd").stdout.split()
    service.kill("KILL")
    service.wait_running(restarts=1)
    after = service.machine.run("pgrep", "--euid", "lightllmd").stdout.split()
    assert not set(before) & set(after)
    wait_for(lambda: service.ask() == 200)

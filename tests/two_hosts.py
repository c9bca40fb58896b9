"""Two hosts with a network between them, as network namespaces of this machine. Needs root and iproute2."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest


class TwoHosts:
    """Hosts 0 and 1, at `ADDRESSES`, joined by one link. Use as a context manager; skips where there can be none."""

    ADDRESSES = ("10.201.0.1", "10.201.0.2")  # within the namespaces alone

    def __init__(self) -> None:
        self._names = [f"lightllmd-{os.getpid()}-{host}" for host in (0, 1)]
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> TwoHosts:
        if os.getuid() != 0 or shutil.which("ip") is None:
            pytest.skip("needs root and ip (iproute2)")
        try:
            for name in self._names:
                _ip("netns", "add", name)
            first, second = self._names
            _ip("link", "add", "link0", "netns", first, "type", "veth", "peer", "name", "link0", "netns", second)
            for name, address in zip(self._names, self.ADDRESSES, strict=True):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "link0")
                _ip("-n", name, "link", "set", "lo", "up")
                _ip("-n", name, "link", "set", "link0", "up")
        except subprocess.CalledProcessError as refused:
            self._remove()
            pytest.skip(f"no network namespaces here: {refused.stderr.strip()}")
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
        self._remove()

    def _remove(self) -> None:
        for name in self._names:
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)

    def start(self, host: int, *words: str | Path, log: Path) -> subprocess.Popen[bytes]:
        """A process on that host, which is killed at the end if it still runs; what it prints goes to `log`."""
        command = ["ip", "netns", "exec", self._names[host], *map(str, words)]
        with log.open("ab") as sink:
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sink, stderr=sink)
        self._processes.append(process)
        return process

    def cut(self) -> None:
        """Nothing gets through from now on, and neither host is told."""
        _ip("-n", self._names[0], "link", "set", "link0", "down")

    def mend(self) -> None:
        """As before the cut."""
        _ip("-n", self._names[0], "link", "set", "link0", "up")


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)

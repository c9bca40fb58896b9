"""The daemon of one replica: a `lightllmd` that listens on a Unix socket in a folder of its own."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import httpx

from lightllmd.config import cli
from lightllmd.config.parameters import Config
from lightllmd.errors import ConfigInvalid, EngineError, Problem

# What a replica says itself: where its daemon listens, and that the proxy before it names the clients.
OURS = ("host", "port", "http.tcp", "http.unix_socket", "http.trusted_proxies", "supervisor.control_socket")
_PACE = 0.1  # seconds between two questions whether it is ready


def flattened(settings: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """Tables within tables as one, by dotted keys."""
    flat: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            flat |= flattened(value, f"{above}{key}.")
        else:
            flat[above + key] = value
    return flat


def checked(file: str | None, settings: Mapping[str, Any]) -> Config:
    """What a replica's daemon will read of both. Raises ConfigInvalid, also for what a replica says itself."""
    if taken := [key for key in flattened(settings) if key in OURS]:
        problems = [Problem(key, "is the replica's own: Ray Serve listens, and forwards to it") for key in taken]
        raise ConfigInvalid(problems)
    with tempfile.TemporaryDirectory(prefix="lightllmd-") as folder:
        return cli.parse(["--check", _file(Path(folder), file, settings), "--offline"]).config


def _file(folder: Path, file: str | None, settings: Mapping[str, Any]) -> str:
    """The operator's file, else one with these settings. Raises ConfigInvalid."""
    if file is not None:
        if settings:
            raise ConfigInvalid([Problem("", "name a file or settings, not both", file)])
        return file
    written = folder / "lightllmd.toml"
    # A JSON value is a TOML value, but for null, which is no setting.
    lines = [f"{key} = {json.dumps(value)}\n" for key, value in flattened(settings).items() if value is not None]
    written.write_text("".join(lines))
    return str(written)


class ReplicaDaemon:
    """Starts with `start`, dies with this process. Everything it makes is in one temporary folder."""

    def __init__(self, file: str | None, settings: Mapping[str, Any]) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="lightllmd-"))
        self._socket = self._folder / "http.sock"
        self._control = self._folder / "control.sock"
        words = ["--config", _file(self._folder, file, settings)]
        words += ["--http.tcp=false", f"--http.unix_socket={self._socket}", "--http.trusted_proxies", "unix"]
        words += [f"--supervisor.control_socket={self._control}"]
        if "http.stored_responses" not in flattened(settings):
            words.append("--http.stored_responses=0")  # the next request may come to another replica
        self._words = words
        self._process: subprocess.Popen[bytes] | None = None
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
        # No time-outs: the daemon has its own, which are told to the client.
        self.client = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(self._socket), limits=limits),
            base_url="http://replica",
            timeout=None,
        )
        self._controller = httpx.AsyncClient(
            transport=httpx.AsyncHTTPTransport(uds=str(self._control)), base_url="http://control", timeout=10.0
        )

    @property
    def pid(self) -> int:
        """Of the supervisor."""
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """From a thread that stays: the daemon dies with it. Its log is this process's."""
        command = [sys.executable, "-m", "lightllmd.ray_serve.tied", str(os.getpid()), *self._words]
        self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, start_new_session=True)

    async def ready(self) -> None:
        """Returns when the engine has produced a token. Raises EngineError where the daemon ends before."""
        while True:
            if (code := self.ended()) is not None:
                raise EngineError(f"lightllmd ended with exit code {code} before it was ready; its log tells why")
            try:
                if (await self.client.get("/readiness")).status_code == 200:
                    return
            except httpx.TransportError:
                pass  # not listening yet
            await asyncio.sleep(_PACE)

    def ended(self) -> int | None:
        """Its exit code; None while it runs."""
        assert self._process is not None
        return self._process.poll()

    async def alive(self) -> bool:
        """Whether the supervisor's loop answers, whatever state it tells: it restarts its engine by itself."""
        try:
            return self.ended() is None and (await self._controller.get("/v1/jobs")).status_code == 200
        except httpx.HTTPError:
            return False

    def stop(self) -> None:
        """Drains, waits for its end and removes what it made. Blocks, for drain_timeout and stop_timeout at most."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
            self._process.wait()
        shutil.rmtree(self._folder, ignore_errors=True)

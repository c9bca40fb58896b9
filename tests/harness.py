"""A real daemon for tests: started as an operator would start it, asked over its sockets, always cleaned up."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import psutil


def free_port() -> int:
    """A port that was free a moment ago, outside the range from which the kernel picks for others: it stays free but
    for other tests, which draw among thousands."""
    low, high = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    ports = [port for port in range(10_000, 1 << 16) if not low <= port <= high]
    for _ in range(100):
        port = random.SystemRandom().choice(ports)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("0.0.0.0", port))
            return port
    raise AssertionError("no port is free")


def wait_for(condition: Callable[[], Any], timeout: float = 60.0, what: str = "") -> Any:
    """Polls until `condition()` is truthy and returns that; the bound is generous, never a measure."""
    deadline = time.monotonic() + timeout
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"did not happen within {timeout} s: {what or condition}")
        time.sleep(0.01)


class Daemon:
    """`lightllmd` under test. Use as a context manager; `flags` are command-line words after the defaults."""

    def __init__(self, folder: Path, *flags: str, port: int | None = None, fake: bool = True) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.folder = folder
        self.port = port or free_port()
        self.control = folder / "control.sock"
        self.log = folder / "log.txt"
        self.command = [sys.executable, "-m", "lightllmd", "--config", str(folder / "lightllmd.toml")]
        self.command += ["--port", str(self.port), "--supervisor.control_socket", str(self.control)]
        self.command += (["--engine.backend", "fake"] if fake else []) + list(flags)
        (folder / "lightllmd.toml").touch()
        self.process: subprocess.Popen[bytes] | None = None

    # --- life ------------------------------------------------------------------------------------------------
    def start(self, ready: bool = True) -> Daemon:
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, start_new_session=True)
        wait_for(lambda: self.status() or self.process.poll() is not None, what="a control socket")
        if ready:
            self.wait_ready()
        return self

    def wait_ready(self, timeout: float = 120.0) -> dict[str, Any]:
        def ready() -> dict[str, Any] | None:
            if self.process.poll() is not None:
                raise AssertionError(f"the daemon ended with {self.process.returncode}:\n{self.log_text()}")
            status = self.status()
            return status if status and status["ready"] else None

        try:
            return wait_for(ready, timeout, "readiness")
        except AssertionError:
            print(self.log_text())
            raise

    def stop(self, timeout: float = 30.0) -> int:
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(timeout)
            except subprocess.TimeoutExpired:
                print(self.log_text())
                self.process.kill()
                self.process.wait()
                raise
        return self.process.returncode

    def __enter__(self) -> Daemon:
        try:
            return self if self.process else self.start()
        except BaseException as failed:
            self.__exit__(type(failed), failed, None)
            raise

    def __exit__(self, *failure: object) -> None:
        if failure[0]:
            print(self.log_text()[-8000:])
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(60)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def log_text(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    # --- questions ---------------------------------------------------------------------------------------------
    def control_client(self) -> httpx.Client:
        transport = httpx.HTTPTransport(uds=str(self.control))
        return httpx.Client(transport=transport, base_url="http://control", timeout=60)

    def status(self) -> dict[str, Any] | None:
        try:
            with self.control_client() as client:
                return client.get("/v1/status").json()
        except httpx.TransportError:
            return None

    def workers(self, kind: str) -> list[dict[str, Any]]:
        status = self.status() or {"workers": []}
        return [worker for worker in status["workers"] if worker["kind"] == kind]

    def pid(self, kind: str) -> int | None:
        """The pid of the first live worker of that kind, whatever its state; None while there is none."""
        for worker in self.workers(kind):
            if worker["pid"] and psutil.pid_exists(worker["pid"]):
                return worker["pid"]
        return None

    def kill(self, kind: str, number: int = signal.SIGKILL) -> int | None:
        pid = self.pid(kind)
        if pid:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                return None
        return pid

    def processes(self) -> list[psutil.Process]:
        return [psutil.Process(self.process.pid), *psutil.Process(self.process.pid).children(recursive=True)]

    def children(self) -> list[psutil.Process]:
        """The supervisor's own, orphans that became its own included; not the helpers of api workers."""
        return psutil.Process(self.process.pid).children()

    def spare(self) -> int | None:
        """The pid of the spare engine: one with modules to import early, which serves no generation."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                words = process.cmdline()
                kept = len(words) > 6 and words[2] in ("lightllmd.engine", "engine")
                if kept and process.pid not in [worker["pid"] for worker in self.workers("engine")]:
                    return process.pid
        return None

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"


class SpareDaemon(Daemon):
    """With the fake engine and a spare one."""

    def __init__(self, folder: Path, *flags: str, **options: Any) -> None:
        super().__init__(folder, *flags, **options)
        self.command[1:3] = [str(Path(__file__).with_name("supervisor") / "spare_daemon.py")]


class Killer:
    """Signals the engine each time the clients together have seen a drawn number of tokens."""

    def __init__(self, daemon: Daemon, number: int, kills: int, total: int, seed: int) -> None:
        self.daemon, self.number = daemon, number
        # Not near the end: a kill waits until the one before it has had its effect, and the clients wait for it.
        self.moments = sorted(random.Random(seed).sample(range(1, total * 3 // 4), kills), reverse=True)
        self.seen = 0
        self.killed: list[int] = []

    def __call__(self) -> None:
        self.seen += 1
        if self.moments and self.seen >= self.moments[-1]:
            self.moments.pop()
            self._kill()

    def _kill(self) -> None:
        def fresh_engine() -> int | None:
            pid = self.daemon.pid("engine")
            return pid if pid and pid not in self.killed else None

        pid = wait_for(fresh_engine, what="a living engine to signal")
        self.killed.append(pid)
        os.kill(pid, self.number)


async def stream_frames(client: httpx.AsyncClient, url: str, body: dict[str, Any]) -> AsyncIterator[dict[str, Any]]:
    """The JSON frames of one SSE answer; comments are skipped, `[DONE]` ends it."""
    async with client.stream("POST", url, json=body) as response:
        if response.status_code != 200:
            await response.aread()
            raise AssertionError(f"{response.status_code}: {response.text}")
        async for line in response.aiter_lines():
            if line.startswith("data:"):
                data = line[5:].strip()
                if data == "[DONE]":
                    return
                yield json.loads(data)


async def generate_stream(
    client: httpx.AsyncClient, base: str, prompt: str, tokens: int, seen: Callable[[], None], **parameters: Any
) -> tuple[list[int], str]:
    """Token ids and text of one native stream; `seen` is called for each token."""
    ids, text, finished = [], "", None
    body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "ignore_eos": True, **parameters}}
    async for frame in stream_frames(client, f"{base}/generate_stream", body):
        if "token" not in frame:
            raise AssertionError(f"error frame: {frame}")
        ids.append(frame["token"]["id"])
        text += frame["token"]["text"]
        finished = frame["finish_reason"] or finished
        seen()
    if not finished:
        raise AssertionError(f"the stream ended unfinished after {len(ids)} tokens")
    return ids, text


def run(coroutine: Any, timeout: float = 240.0) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(timeout):
            return await coroutine

    return asyncio.run(bounded())

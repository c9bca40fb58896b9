"""A stand-in for the daemon's control plane, and a way to run lightllmctl against it."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import socketserver
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl, urlsplit

import pytest

from lightllmctl.__main__ import main

NOW = 1_795_344_192.0  # Sun 2026-11-22 10:43:12 UTC


@dataclass
class Result:
    code: int
    out: str
    err: str


@dataclass
class Answer:
    """What one route says: a JSON body, raw text, or lines of a stream (objects, or callables that may block)."""

    body: Any = None
    status: int = 200
    text: str | None = None
    lines: list[Any] | None = None
    cut: bool = False  # the stream breaks off instead of ending


@dataclass
class StubDaemon:
    path: Path
    routes: dict[tuple[str, str], Any] = field(default_factory=dict)
    seen: list[tuple[str, str, dict[str, str], Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    server: Any = None

    def get(self, path: str, answer: Any) -> None:
        self.routes["GET", path] = answer

    def post(self, path: str, answer: Any) -> None:
        self.routes["POST", path] = answer

    def end(self) -> None:
        """Stops listening, as a daemon that is gone."""
        server, self.server = self.server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            server.hang_up()
            self.path.unlink(missing_ok=True)


class _Server(socketserver.ThreadingUnixStreamServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, *arguments: Any) -> None:
        self.open: set[Any] = set()
        super().__init__(*arguments)

    def process_request(self, request: Any, client_address: Any) -> None:
        self.open.add(request)
        super().process_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self.open.discard(request)
        super().shutdown_request(request)

    def hang_up(self) -> None:
        for connection in list(self.open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that went away in the middle is what some tests are about."""


def _handler(stub: StubDaemon) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def address_string(self) -> str:
            return "unix"

        def log_message(self, *_: Any) -> None:
            return

        def _answer(self) -> None:
            url = urlsplit(self.path)
            length = int(self.headers.get("content-length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            stub.seen.append((self.command, url.path, dict(parse_qsl(url.query)), body))
            stub.headers.append({key.lower(): value for key, value in self.headers.items()})
            answer = stub.routes.get((self.command, url.path), Answer({"error": "NoSuchJob", "message": "no"}, 404))
            if callable(answer):
                answer = answer()
            if not isinstance(answer, Answer):
                answer = Answer(answer)
            if answer.lines is not None:
                self._stream(answer)
                return
            text = (answer.text if answer.text is not None else json.dumps(answer.body)).encode()
            self.send_response(answer.status)
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def _stream(self, answer: Answer) -> None:
            self.send_response(answer.status)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            try:
                for line in answer.lines or []:
                    line = line() if callable(line) else line
                    data = (line if isinstance(line, str) else json.dumps(line)).encode() + b"\n"
                    self.wfile.write(b"%x\r\n%s\r\n" % (len(data), data))
                    self.wfile.flush()
                if not answer.cut:
                    self.wfile.write(b"0\r\n\r\n")
                else:
                    self.close_connection = True
            except OSError:
                self.close_connection = True

        do_GET = do_POST = _answer  # noqa: N815 - http.server's names

    return Handler


@pytest.fixture
def short_path() -> Iterator[Path]:
    """A directory whose name leaves room for a socket's 107 bytes, however deep tmp_path is."""
    directory = Path(tempfile.mkdtemp(prefix="ctl-"))
    yield directory
    shutil.rmtree(directory)


@pytest.fixture
def daemon(short_path: Path, status: dict[str, Any]) -> Iterator[StubDaemon]:
    stub = StubDaemon(short_path / "control.sock")
    stub.server = _Server(str(stub.path), _handler(stub))
    thread = threading.Thread(target=stub.server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    stub.get("/v1/status", lambda: status)
    stub.get("/v1/workers", lambda: status["workers"])
    stub.get("/v1/jobs", lambda: status["jobs"])
    yield stub
    stub.end()
    thread.join(10)


@pytest.fixture
def ctl(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, short_path: Path) -> Callable[..., Result]:
    """Runs lightllmctl in this process against the stub's socket (which only exists with the fixture `daemon`)."""
    for name in ("LIGHTLLMD_SOCKET", "XDG_RUNTIME_DIR", "FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)

    def run(*arguments: str) -> Result:
        capsys.readouterr()
        code = main(["--socket", str(short_path / "control.sock"), *arguments])
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return run


@pytest.fixture(autouse=True)
def utc(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()


def worker(name: str, **fields: Any) -> dict[str, Any]:
    kind, _, index = name.partition("-")
    return {
        "name": name,
        "kind": kind,
        "index": int(index),
        "rank": int(index) if kind == "engine" else None,
        "pid": 901,
        "state": "running",
        "phase": "ready",
        "progress": 12,
        "progress_total": 0,
        "restarts": 0,
        "generation": 7,
        "memory_bytes": 205_000_000,
        "heartbeat_age_s": 0.2,
        "started": NOW - 9240,
        "last_exit": None,
        "next_try_at": None,
        **fields,
    }


def job(number: int = 31, **fields: Any) -> dict[str, Any]:
    return {
        "id": number,
        "verb": "restart",
        "target": "engine",
        "phase": "loading",
        "progress": None,
        "outcome": None,
        "message": "",
        "started": NOW - 38,
        "ended": None,
        "by_uid": 0,
        "by_pid": 4711,
        **fields,
    }


@pytest.fixture
def status() -> dict[str, Any]:
    """A daemon that serves; tests change what they are about."""
    return {
        "api": 1,
        "name": "lightllmd",
        "version": "0.1.0",
        "pid": os.getpid(),
        "state": "serving",
        "since": NOW - 9240,
        "started": NOW - 9250,
        "ready": True,
        "health": "ready",
        "heartbeat_age_s": 0.4,
        "generation": 7,
        "restarts": 1,
        "config": {"file": "/etc/lightllmd/lightllmd.toml", "loaded": NOW - 7200, "pending_changes": 0},
        "listeners": ["http://0.0.0.0:8000"],
        "control_socket": "/run/lightllmd/control.sock",
        "model": {
            "name": "qwen3-8b",
            "state": "ready",
            "progress": None,
            "device": "cuda",
            "data_type": "bfloat16",
            "weight_bytes": 16_400_000_000,
            "tensor_parallel": 2,
            "kv_slots_used": 251_320,
            "kv_slots_total": 412_000,
        },
        "requests": {
            "running": 12,
            "waiting": 3,
            "held": 0,
            "in_flight": 15,
            "ok": 18204,
            "cancelled": 2,
            "failed": 0,
            "resumed": 5,
        },
        "workers": [
            worker("api-0"),
            worker(
                "engine-0",
                pid=903,
                memory_bytes=41_200_000_000,
                restarts=1,
                last_exit={"cause": "killed by SIGKILL", "at": NOW - 185, "back_in_s": 4.1, "stderr": []},
            ),
            worker("engine-1", pid=904, memory_bytes=41_100_000_000),
        ],
        "jobs": [],
        "events": [
            {
                "seq": 9,
                "at": NOW,
                "kind": "exit",
                "worker": "engine-0",
                "message": "killed by SIGKILL; 5 streams held",
            }
        ],
    }


@pytest.fixture
def new_worker() -> Callable[..., dict[str, Any]]:
    return worker


@pytest.fixture
def new_job() -> Callable[..., dict[str, Any]]:
    return job


@pytest.fixture
def now() -> float:
    return NOW


@pytest.fixture
def answer() -> type[Answer]:
    return Answer

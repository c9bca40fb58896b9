"""A small Pushgateway for tests: keeps what it was sent, and misbehaves as it is told."""

from __future__ import annotations

import base64
import queue
import socket
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import unquote

TIMEOUT = 30.0  # seconds that a test waits for what has to happen; never a measure


@dataclass(frozen=True)
class Pushed:
    method: str
    path: str
    headers: dict[str, str]
    body: bytes

    @property
    def group(self) -> dict[str, str]:
        """The labels of the path, read as the Pushgateway reads it: a plus sign stands for itself."""
        root, *parts = self.path.split("/")[1:]
        assert root == "metrics", self.path
        return dict(_label(unquote(key), unquote(value)) for key, value in zip(parts[::2], parts[1::2], strict=True))


def _label(key: str, value: str) -> tuple[str, str]:
    name, _, encoding = key.partition("@")
    if not encoding:
        return name, value
    assert encoding == "base64"
    return name, base64.urlsafe_b64decode(value.rstrip("=") + "=" * (-len(value.rstrip("=")) % 4)).decode()


class _Handler(BaseHTTPRequestHandler):
    server: Any

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:
            self.close_connection = True  # the client went away

    def do_PUT(self) -> None:
        gateway: Gateway = self.server.gateway
        body = self.rfile.read(int(self.headers["Content-Length"]))
        gateway.pushes.put(Pushed(self.command, self.path, dict(self.headers.items()), body))
        self.close_connection = True
        match gateway.behaviour:
            case "silent":
                gateway.released.wait()
            case "garbage":
                self.wfile.write(b"SSH-2.0-OpenSSH_9.2\r\n")
            case "close":
                pass
            case "trickle":
                self.wfile.write(b"HTTP/1.1 200 OK\r\nX-Endless: ")
                while not gateway.released.wait(0.01):
                    self.wfile.write(b"x")
            case "endless":
                self.wfile.write(b"HTTP/1.1 400 Bad Request\r\n\r\n")
                while not gateway.released.is_set():
                    self.wfile.write(b"no" * 5000)
            case int(code):
                self.send_response(code)
                self.end_headers()
                self.wfile.write(b"pushed metrics are invalid\n" if code == 400 else b"")

    do_POST = do_PUT  # noqa: N815
    do_DELETE = do_PUT  # noqa: N815

    def log_message(self, *_: object) -> None: ...


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    gateway: Gateway

    def handle_error(self, *_: object) -> None: ...


class _ServerOfIPv6(_Server):
    address_family = socket.AF_INET6


class Gateway:
    """A context manager. `behaviour`: a status code, "silent", "garbage", "close", "trickle" or "endless"."""

    def __init__(self, host: str = "127.0.0.1", port: int = 0) -> None:
        self.behaviour: int | str = 200
        self.pushes: queue.Queue[Pushed] = queue.Queue()
        self.released = threading.Event()  # those that it keeps waiting
        server = _ServerOfIPv6 if ":" in host else _Server
        self._server = server((host, port), _Handler)
        self._server.gateway = self
        self.port = self._server.server_address[1]
        self.address = f"[{host}]:{self.port}" if ":" in host else f"{host}:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,))

    def next(self) -> Pushed:
        return self.pushes.get(timeout=TIMEOUT)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.released.set()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

"""One push by prometheus_client's own function: it renders the metrics and replaces the group on the gateway (PUT)."""

from __future__ import annotations

import base64
import contextlib
import socket
import threading
from collections.abc import Callable
from http.client import BadStatusLine, HTTPConnection, HTTPResponse
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.request import HTTPHandler, Request, build_opener

from prometheus_client import CollectorRegistry, push_to_gateway

from lightllmd.errors import show
from lightllmd.ipc.messages import PushTarget

_SHOWN = 200  # bytes of an answer that say why the gateway did not take a push


class Attempt(threading.Thread):
    """One push, in a thread of its own that keeps no process alive: a name look-up can't be interrupted.

    `on_end` is called in that thread with why the gateway did not take it, in words; with nothing where it did.
    `timeout`: seconds of each wait of the connection; `cut` ends what takes longer altogether.
    """

    def __init__(
        self, target: PushTarget, registry: CollectorRegistry, timeout: float, on_end: Callable[[str], None]
    ) -> None:
        super().__init__(name="push", daemon=True)
        self._target, self._registry, self._timeout, self._on_end = target, registry, timeout, on_end
        self._connections = _Connections()

    def cut(self) -> None:
        """Closes the connection, so that the thread ends soon: where it looks up a name or connects, after that."""
        self._connections.cut()

    def run(self) -> None:
        """As `threading.Thread`."""
        self._on_end(self._push())

    def _push(self) -> str:
        try:
            push_to_gateway(
                f"http://{self._target.gateway.replace('%', '%25')}",  # before the zone of an IPv6 address (RFC 6874)
                self._target.job,
                self._registry,
                self._target.grouping_key,
                self._timeout,
                self._handler,
            )
        except HTTPError as answer:
            return _answered(answer)
        except URLError as failure:
            return self._words(failure.reason)
        except Exception as failure:  # whatever it is, it may be gone at the next push
            return self._words(failure)
        return ""

    def _handler(
        self, url: str, method: str, timeout: float | None, headers: list[tuple[str, str]], data: bytes
    ) -> Callable[[], None]:
        """As prometheus_client's `basic_auth_handler`, through a connection that can be closed from outside."""
        # A space in a path is written as in a form by some of its versions; the gateway reads that as a plus sign.
        request = Request(url.replace("+", "%20"), data, dict(headers), method=method)
        if self._target.user is not None:
            told = f"{self._target.user}:{self._target.password}".encode()
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(told).decode()}")

        def send() -> None:
            build_opener(self._connections).open(request, timeout=timeout).close()

        return send

    def _words(self, failure: BaseException | str) -> str:
        if isinstance(failure, TimeoutError):
            return f"no answer within {self._timeout:g} s"
        if isinstance(failure, BadStatusLine) and not isinstance(failure, OSError):
            return f"the answer is no HTTP: {show(str(failure))}"
        if isinstance(failure, OSError) and failure.strerror:
            return failure.strerror
        return failure if isinstance(failure, str) else f"{type(failure).__name__}: {show(str(failure))}"


def _answered(answer: HTTPError) -> str:
    """Such as '400 Bad Request: "pushed metrics are invalid …"'."""
    body = b""
    with contextlib.closing(answer), contextlib.suppress(OSError, ValueError):
        body = answer.read(_SHOWN)
    said = body.decode(errors="replace").strip()
    return f"{answer.code} {show(answer.reason)[1:-1]}" + (f": {show(said)}" if said else "")


class _Connections(HTTPHandler):
    """Makes the connection of one push, which `cut` closes from another thread."""

    def __init__(self) -> None:
        super().__init__()
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._is_cut = False

    def http_open(self, req: Request) -> HTTPResponse:
        """As urllib's."""

        def connection(host: str, **options: Any) -> _Connection:
            return _Connection(host, self._connected, **options)

        return self.do_open(connection, req)

    def cut(self) -> None:
        with self._lock:
            self._is_cut = True
            if self._socket is not None:
                with contextlib.suppress(OSError):
                    self._socket.shutdown(socket.SHUT_RDWR)

    def _connected(self, made: socket.socket) -> None:
        """Raises TimeoutError where it is too late."""
        with self._lock:
            if self._is_cut:
                raise TimeoutError
            self._socket = made


class _Connection(HTTPConnection):
    def __init__(self, host: str, connected: Callable[[socket.socket], None], **options: Any) -> None:
        super().__init__(host, **options)
        self._connected = connected

    def connect(self) -> None:
        super().connect()
        self._connected(self.sock)

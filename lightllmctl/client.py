"""The control socket as a typed client: HTTP + JSON over a Unix socket, long answers as newline-delimited JSON.

Every failure comes out as an error of the table in ``lightllmd.errors``: those that the daemon names keep their
name and parameters, those of the transport become ``DaemonNotRunning``, ``NotPermitted``, ``ConnectionLost``,
``NoAnswer`` or ``BadAnswer``.
"""

from __future__ import annotations

import errno
import json
import os
import select
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx

from lightllmd import errors
from lightllmd.errors import (
    BadAnswer,
    ConnectionLost,
    ControlError,
    DaemonNotRunning,
    NoAnswer,
    NotPermitted,
    Usage,
)


class Client:
    """One daemon's control plane. Not thread-safe; close it, or use it as a context manager."""

    def __init__(self, socket_path: str | os.PathLike[str], *, timeout: float = 10.0) -> None:
        self.socket_path = str(socket_path)
        self.timeout = timeout  # seconds without a byte of an answer that should come at once
        self._http: httpx.Client | None = None

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Closes its connection; the next request opens another."""
        if self._http is not None:
            self._http.close()
            self._http = None

    # --- requests -------------------------------------------------------------------------------------------

    def get(self, path: str, **query: Any) -> dict[str, Any]:
        """An answer that is one JSON object."""
        return _expect(self._call("GET", path, query=query), dict, self.socket_path)

    def get_list(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """An answer that is a JSON array of objects."""
        return _expect(self._call("GET", path, query=query), list, self.socket_path)

    def post(self, path: str, body: dict[str, Any] | None = None, *, if_match: int | None = None) -> dict[str, Any]:
        """A mutation. With ``if_match`` it is refused (StaleGeneration) unless that generation is still in force."""
        return _expect(self._call("POST", path, body=body or {}, if_match=if_match), dict, self.socket_path)

    def stream(self, path: str, *, wait: float | None = None, **query: Any) -> Iterator[dict[str, Any]]:
        """One object per line, for as long as the daemon keeps the stream open; keep-alive lines are skipped.

        A stream that the daemon ends simply ends; one that breaks off raises ConnectionLost. After ``wait`` seconds
        NoAnswer is raised, however lively the stream is.
        """
        with self._translated(), self._open().stream("GET", path, params=_given(query), timeout=None) as response:
            if response.status_code >= 400:
                response.read()
                raise error_from(response)
            with _deadline(response, wait):
                for line in response.iter_lines():
                    if line.strip():
                        yield _expect(_decode(line, self.socket_path), dict, self.socket_path)

    # --- the daemon's process -------------------------------------------------------------------------------

    def daemon_pid(self) -> int | None:
        """The listener's process id as this process sees it; None where it can't (another pid namespace)."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
            try:
                connection.connect(self.socket_path)
            except OSError as error:
                raise self._unreachable(error) from error
            credentials = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        pid: int = struct.unpack("3i", credentials)[0]
        return pid or None

    def wait_gone(self, pid: int | None, wait: float | None = None) -> bool:
        """Waits for the end of the daemon: of its process where ``pid`` is known, else of its socket.

        False: it is still there after ``wait`` seconds.
        """
        deadline = None if wait is None else time.monotonic() + wait
        if pid is not None:
            try:
                process = os.pidfd_open(pid)
            except ProcessLookupError:
                return True
            try:
                return bool(select.select([process], [], [], wait)[0])
            finally:
                os.close(process)
        while deadline is None or time.monotonic() < deadline:
            try:
                self.daemon_pid()
            except DaemonNotRunning:
                return True
            time.sleep(0.05)
        return False

    # --- transport ------------------------------------------------------------------------------------------

    def _open(self) -> httpx.Client:
        if self._http is None:
            # verify=False: a Unix socket carries no TLS, and reading the certificate store costs start-up time.
            self._http = httpx.Client(
                transport=httpx.HTTPTransport(uds=self.socket_path, verify=False),
                base_url="http://lightllmd",
                timeout=self.timeout,
                trust_env=False,
            )
        return self._http

    def _call(
        self,
        method: str,
        path: str,
        *,
        query: dict[str, Any] | None = None,
        body: dict[str, Any] | None = None,
        if_match: int | None = None,
    ) -> Any:
        headers = {} if if_match is None else {"If-Match": str(if_match)}
        with self._translated():
            response = self._open().request(method, path, params=_given(query or {}), json=body, headers=headers)
        if response.status_code >= 400:
            raise error_from(response)
        return _decode(response.text, self.socket_path)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except httpx.ConnectError as error:
            raise self._unreachable(error) from error
        except httpx.TimeoutException as error:
            raise NoAnswer(f"no answer within {self.timeout:g} s from {self.socket_path}") from error
        except httpx.RemoteProtocolError as error:
            if "disconnected" in str(error) or "closed connection" in str(error):
                raise self._lost() from error
            raise BadAnswer(f"{self.socket_path} does not speak HTTP; is it lightllmd's control socket?") from error
        except httpx.NetworkError as error:
            raise self._lost() from error
        except httpx.HTTPError as error:
            raise BadAnswer(f"{self.socket_path}: {error}") from error
        except (httpx.InvalidURL, UnicodeEncodeError) as error:  # what the caller named is too long, or no text
            raise Usage(f"can't be asked of the daemon: {error}") from error

    def _lost(self) -> ConnectionLost:
        return ConnectionLost(f"the daemon closed the connection ({self.socket_path})")

    def _unreachable(self, error: BaseException) -> ControlError:
        cause = _os_error(error)
        code = cause.errno if cause else None
        if code in (errno.EACCES, errno.EPERM):
            return NotPermitted(f"no permission for {self.socket_path}: be its owner, root or in group lightllmd")
        if code in (errno.ENOENT, errno.ECONNREFUSED, errno.ENOTDIR):
            return DaemonNotRunning(f"lightllmd is not running (no process listens on {self.socket_path})")
        words = (cause.strerror if cause else None) or str(error)
        return DaemonNotRunning(f"cannot connect to {self.socket_path}: {words}")


def _given(query: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in query.items() if value is not None}


def _decode(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except ValueError as error:
        raise BadAnswer(f"{where} does not answer in JSON; is it lightllmd's control socket?") from error


def _expect(value: Any, kind: type, where: str) -> Any:
    right = isinstance(value, kind)
    if right and kind is list:
        right = all(isinstance(entry, dict) for entry in value)
    if not right:
        raise BadAnswer(f"{where} gave an unexpected answer; is it lightllmd's control socket?")
    return value


@contextmanager
def _deadline(response: httpx.Response, wait: float | None) -> Iterator[None]:
    """Ends the reading of ``response`` after ``wait`` seconds with NoAnswer."""
    if wait is None:
        yield
        return
    over = threading.Event()
    connection: socket.socket = response.extensions["network_stream"].get_extra_info("socket")

    def end() -> None:
        over.set()
        try:
            connection.shutdown(socket.SHUT_RDWR)
        except OSError:
            return  # the stream ended by itself in the same moment

    timer = threading.Timer(wait, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    except httpx.HTTPError:
        if not over.is_set():
            raise
    finally:
        timer.cancel()
        timer.join()  # a cancelled timer's thread ends at once, but not before this returns
    if over.is_set():
        raise NoAnswer(f"not finished within {wait:g} s")


def _os_error(error: BaseException | None) -> OSError | None:
    while error is not None and not isinstance(error, OSError):
        error = error.__cause__ or error.__context__
    return error


# --- errors that the daemon names -----------------------------------------------------------------------------

# For a name that this version doesn't know: what its HTTP status means for the exit code.
_BY_STATUS: dict[int, type[ControlError]] = {
    403: NotPermitted,
    404: errors.NoSuchWorker,
    409: errors.Busy,
    412: errors.StaleGeneration,
    501: errors.NotAvailableYet,
    507: errors.DoesNotFit,
}


def error_from(response: httpx.Response) -> errors.LightllmdError:
    """The daemon's error as the exception of that name."""
    try:
        body = response.json()
    except ValueError:
        body = None
    if not isinstance(body, dict) or "error" not in body:
        return BadAnswer(f"the daemon answered {response.status_code} {response.reason_phrase}, without a reason")
    return named_error(body, _BY_STATUS.get(response.status_code, ControlError))


def named_error(body: dict[str, Any], default: type[errors.LightllmdError]) -> errors.LightllmdError:
    """Of the daemon's words {"error": name, "message": …, **parameters}; `default`: for a name of a newer daemon."""
    name, message = str(body.get("error")), str(body.get("message") or body.get("error"))
    if name == "ConfigInvalid":
        return errors.ConfigInvalid(_problems(body.get("problems"), message))
    known = getattr(errors, name, None)
    if not (isinstance(known, type) and issubclass(known, errors.LightllmdError)):
        known = default
    return known(message, **{key: value for key, value in body.items() if key not in ("error", "message")})


def _problems(entries: Any, message: str) -> list[errors.Problem]:
    def problem(entry: dict[str, Any]) -> errors.Problem:
        return errors.Problem(
            key=str(entry.get("key") or ""),
            message=str(entry.get("message") or message),
            file=entry.get("file"),
            line=entry.get("line"),
        )

    found = [problem(entry) for entry in entries if isinstance(entry, dict)] if isinstance(entries, list) else []
    return found or [errors.Problem(key="", message=message)]

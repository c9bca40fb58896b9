"""One table of exit codes for all verbs, and every error is one line on stderr."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from lightllmd import errors

ASKING = ["status", "list-workers", "list-jobs", "config", "logs", "events"]
COMMANDING = ["restart", "drain", "resume", "stop"]


def one_line(err: str) -> str:
    assert err.startswith("lightllmctl: ")
    assert err.count("\n") == 1
    assert "Traceback" not in err
    return err


@pytest.mark.parametrize(
    ("state", "active", "ready"),
    [
        ("serving", (0, "active"), 0),
        ("draining", (0, "active"), 3),
        ("drained", (0, "active"), 3),
        ("degraded", (1, "degraded"), 1),
        ("starting", (3, "activating"), 3),
        ("stopping", (3, "deactivating"), 3),
    ],
)
def test_states(ctl: Any, daemon: Any, status: dict[str, Any], state: str, active: tuple[int, str], ready: int) -> None:
    status.update(state=state, ready=state == "serving", health="for a reason")
    code, word = active
    assert ctl("status").code == code
    result = ctl("is-active")
    assert (result.code, result.out) == (code, f"{word}\n")
    result = ctl("is-ready")
    assert (result.code, result.out) == (ready, "ready\n" if ready == 0 else "not ready: for a reason\n")
    assert ctl("is-active", "--quiet").out == ctl("is-ready", "-q").out == ""


@pytest.mark.parametrize("verb", ASKING + COMMANDING)
def test_3_when_no_daemon_runs(ctl: Any, verb: str) -> None:
    result = ctl(verb)
    assert result.code == 3
    assert "lightllmd is not running" in one_line(result.err)
    assert result.out == ""


def test_3_when_a_dead_daemon_left_its_socket(ctl: Any, short_path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(short_path / "control.sock"))
    assert ctl("status").code == 3
    assert ctl("is-active").out == "inactive\n"
    assert ctl("is-ready").code == 3
    (short_path / "control.sock").unlink()


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["status", "--nonsense"], ["restart", "a", "b"], ["logs", "-n", "x"], ["logs", "-n", "-1"],
     ["completion", "tcsh"], ["check"], ["stop", "--timeout", "0"]],
)  # fmt: skip
def test_2_for_wrong_usage(ctl: Any, arguments: list[str]) -> None:
    result = ctl(*arguments)
    assert result.code == 2
    one_line(result.err)


def test_a_misspelt_verb_gets_the_nearest_one(ctl: Any) -> None:
    assert ctl("statsu").err == "lightllmctl: no such verb: statsu, did you mean status?\n"


def test_2_and_the_help_without_a_verb(ctl: Any) -> None:
    result = ctl()
    assert result.code == 2
    assert "list-workers" in result.err


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.NoSuchWorker("no worker engine-9", worker="engine-9", candidates=["engine-0"]), 4),
        (errors.NoSuchModel("no model x"), 4),
        (errors.NoSuchJob("no job 9"), 4),
        (errors.NotPermitted("uid 1000 may not"), 5),
        (errors.Busy("job #3 restart runs", job=3), 7),
        (errors.StaleGeneration("generation 8 is in force"), 7),
        (errors.DoesNotFit("needs 20 GB", needed=20, free=10), 8),
        (errors.NotAvailableYet("swap is not available yet"), 2),
        (errors.Usage("no such field"), 2),
        (errors.TryAgain("no plan yet"), 1),
    ],
)
def test_errors_that_the_daemon_names(
    ctl: Any, daemon: Any, answer: Any, error: errors.LightllmdError, code: int
) -> None:
    daemon.post("/v1/restart", answer(error.as_dict(), error.status))
    result = ctl("restart", "engine-9")
    assert result.code == code
    assert error.message in one_line(result.err)


@pytest.mark.parametrize(("status_code", "code"), [(403, 5), (404, 4), (409, 7), (507, 8), (500, 1), (418, 1)])
def test_an_error_of_a_newer_daemon_is_judged_by_its_status(
    ctl: Any, daemon: Any, answer: Any, status_code: int, code: int
) -> None:
    daemon.post("/v1/restart", answer({"error": "BrandNew", "message": "so it is", "x": 1}, status_code))
    result = ctl("restart")
    assert (result.code, result.err) == (code, "lightllmctl: so it is\n")


def test_a_message_of_several_lines_is_told_in_one(ctl: Any, daemon: Any, answer: Any) -> None:
    daemon.post("/v1/restart", answer({"error": "Busy", "message": "a\n b\r\n\tc"}, 409))
    assert ctl("restart").err == "lightllmctl: a b c\n"


@pytest.mark.parametrize(
    "body",
    [{"text": "<html>"}, {"text": ""}, {"body": None}, {"body": [1]}, {"text": "oops", "status": 500}, {"body": 3},
     {"text": "\xff\xfe"}, {"text": "{" * 100_000}],
)  # fmt: skip
@pytest.mark.parametrize("verb", ["status", "list-workers", "logs", "restart"])
def test_1_for_an_answer_that_makes_no_sense(ctl: Any, daemon: Any, answer: Any, verb: str, body: Any) -> None:
    reply = answer(**body)
    daemon.routes = {("GET", f"/v1/{name}"): reply for name in ("status", "workers", "logs")}
    daemon.post("/v1/restart", reply)
    result = ctl(verb)
    assert result.code == 1 or (verb == "logs" and body == {"text": ""} and result.code == 0)
    if result.code:
        one_line(result.err)


@contextmanager
def raw_server(path: Path, reply: bytes) -> Iterator[None]:
    """Accepts connections, reads what comes first, replies with raw bytes and closes."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(str(path))
    listener.listen()

    def serve() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.recv(65536)
                if reply:
                    connection.sendall(reply)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    yield
    listener.shutdown(socket.SHUT_RDWR)
    listener.close()
    thread.join(10)
    path.unlink()


@pytest.mark.parametrize(
    ("reply", "words"),
    [
        (b"", "closed the connection"),
        (b"220 smtp.example.org ESMTP\r\n\r\n", "does not speak HTTP"),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 99\r\n\r\n{", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\n{}", "closed the connection"),
        (b"HTTP/1.1 200 OK\r\ncontent-encoding: gzip\r\ncontent-length: 2\r\n\r\n{}", ""),
    ],
)
@pytest.mark.parametrize("verb", ["status", "logs", "drain"])
def test_1_when_the_other_end_is_something_else_or_breaks_off(
    ctl: Any, short_path: Path, verb: str, reply: bytes, words: str
) -> None:
    with raw_server(short_path / "control.sock", reply):
        result = ctl(verb)
    assert result.code == 1
    assert words in one_line(result.err)


def test_5_without_permission_for_the_socket(ctl: Any, daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """As root, no file mode would refuse us: connect() itself is made to."""

    def refuse(self: socket.socket, address: str) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    result = ctl("status")
    assert result.code == 5
    assert "no permission" in one_line(result.err)


def test_1_when_the_daemon_says_nothing(ctl: Any, daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    release = threading.Event()
    from lightllmctl import client

    monkeypatch.setattr(client.Client.__init__, "__kwdefaults__", {"timeout": 0.2})
    daemon.get("/v1/status", lambda: release.wait(120) and {})
    result = ctl("status")
    release.set()
    assert result.code == 1
    assert "no answer within 0.2 s" in one_line(result.err)


def test_1_for_a_path_too_long(ctl: Any) -> None:
    from lightllmctl.__main__ import main

    assert main(["--socket", "/tmp/" + "x" * 200, "status"]) == 3


def test_a_fault_of_our_own_is_a_line_too(ctl: Any, daemon: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightllmctl import render

    monkeypatch.setattr(render, "status_page", lambda *_: 1 / 0)
    result = ctl("status")
    assert result.code == 1
    assert "internal error: ZeroDivisionError" in one_line(result.err)

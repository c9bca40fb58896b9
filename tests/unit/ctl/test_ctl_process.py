"""lightllmctl as a process: start-up, ^C, closed pipes, terminals."""

from __future__ import annotations

import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

COMMAND = [sys.executable, "-m", "lightllmctl"]


def environment(**more: str) -> dict[str, str]:
    clean = {key: value for key, value in os.environ.items() if key not in ("NO_COLOR", "FORCE_COLOR")}
    return {**clean, "TERM": "xterm-256color", "COLUMNS": "120", "LINES": "40", **more}


def read_until(fd: int, words: bytes, bound: float = 20.0) -> bytes:
    """What a terminal showed, up to `words` or the end."""
    seen, deadline = b"", time.monotonic() + bound
    while words not in seen and time.monotonic() < deadline:
        if not select.select([fd], [], [], 0.2)[0]:
            continue
        try:
            data = os.read(fd, 65536)
        except OSError:  # the other side of the terminal is closed
            break
        if not data:
            break
        seen += data
    return seen


def test_status_needs_no_heavy_module(daemon: Any) -> None:
    """The budget is 0.25 s of start-up; what would break it is an import, so that is what is held."""
    probe = (
        "import sys; from lightllmctl.__main__ import main; code = main(sys.argv[1:]);"
        "heavy = {'torch', 'transformers', 'numpy', 'fastapi', 'pydantic', 'uvicorn', 'tokenizers'} & set(sys.modules);"
        "print('heavy:', sorted(heavy)); sys.exit(code)"
    )
    command = [sys.executable, "-c", probe, "--socket", str(daemon.path), "status"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.endswith("heavy: []\n")


def test_help_and_version_import_neither_rich_nor_httpx() -> None:
    probe = (
        "import sys; from lightllmctl.__main__ import main; main(['--version']); main(['status', '--help']);"
        "sys.exit(str({'rich', 'httpx'} & set(sys.modules)) if {'rich', 'httpx'} & set(sys.modules) else 0)"
    )
    assert subprocess.run([sys.executable, "-c", probe], capture_output=True, timeout=60).returncode == 0


def test_130_and_a_word_about_the_job_after_an_interrupt(daemon: Any, answer: Any, new_job: Any) -> None:
    release = threading.Event()
    daemon.post("/v1/restart", new_job(phase="queued"))
    daemon.get("/v1/jobs/31", answer(lines=[new_job(), lambda: release.wait(120) and ""]))
    command = [*COMMAND, "--socket", str(daemon.path), "restart"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert "queued" in process.stdout.readline()
        assert "loading" in process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        assert process.stderr.read().strip() == "job #31 restart engine goes on; see lightllmctl list-jobs"
    release.set()


@pytest.mark.parametrize("verb", [["logs", "-f"], ["events", "-f"], ["status", "-w", "--interval", "0.1"]])
def test_130_without_a_traceback_when_following_is_interrupted(
    daemon: Any, answer: Any, now: float, verb: list[str]
) -> None:
    release = threading.Event()
    for path in ("/v1/logs", "/v1/events"):
        daemon.get(path, answer(lines=[{"at": now, "message": "x"}, lambda: release.wait(120) and ""]))
    command = [*COMMAND, "--socket", str(daemon.path), *verb]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout
        assert process.stderr
        assert process.stdout.readline()
        process.send_signal(signal.SIGINT)
        assert process.wait(120) == 130
        assert process.stderr.read() == ""
    release.set()


@pytest.mark.parametrize("verb", [["logs"], ["list-workers"], ["status"], ["list-jobs", "--json"], ["config"]])
def test_a_closed_pipe_is_no_error(daemon: Any, answer: Any, now: float, new_job: Any, verb: list[str]) -> None:
    daemon.get("/v1/logs", answer(lines=[{"at": now, "worker": "api-0", "message": "x" * 1000}] * 500))
    daemon.get("/v1/jobs", [new_job(n) for n in range(1000)])
    daemon.get("/v1/config", {"params": {f"k{n}": "x" * 100 for n in range(2000)}})
    reader, writer = os.pipe()
    os.close(reader)
    command = [*COMMAND, "--socket", str(daemon.path), *verb]
    result = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=60)
    os.close(writer)
    assert (result.returncode, result.stderr) == (0, "")


def test_a_terminal_gets_colours_and_a_bar_for_jobs(daemon: Any, answer: Any, new_job: Any) -> None:
    daemon.post("/v1/restart", new_job(phase="queued"))
    steps = [new_job(phase="loading", progress=0.5), new_job(phase="done", outcome="done", message="back in 4 s")]
    daemon.get("/v1/jobs/31", answer(lines=steps))
    master, slave = pty.openpty()
    command = [*COMMAND, "--socket", str(daemon.path)]
    with subprocess.Popen([*command, "restart"], stdout=slave, stderr=slave, env=environment()) as process:
        seen = read_until(master, b"back in 4 s")
        assert process.wait(120) == 0
    assert "━".encode() in seen
    with subprocess.Popen([*command, "status"], stdout=slave, env=environment()) as process:
        assert "\x1b[32m●".encode() in read_until(master, b"5 streams held")
        assert process.wait(120) == 0
    with subprocess.Popen([*command, "status"], stdout=slave, env=environment(NO_COLOR="1")) as process:
        assert b"\x1b[3" not in read_until(master, b"5 streams held")
        assert process.wait(120) == 0
    os.close(slave)
    os.close(master)


def test_watch_refreshes_and_outlives_the_daemon(daemon: Any, status: dict[str, Any]) -> None:
    master, slave = pty.openpty()
    command = [*COMMAND, "--socket", str(daemon.path), "status", "-w", "--interval", "0.05"]
    with subprocess.Popen(command, stdout=slave, stderr=slave, env=environment()) as process:
        assert b"active (serving)" in read_until(master, b"active (serving)")
        status["state"] = "draining"
        assert b"active (draining)" in read_until(master, b"active (draining)")
        daemon.end()
        assert b"not running" in read_until(master, b"not running")
        process.send_signal(signal.SIGINT)
        os.close(slave)
        assert b"Traceback" not in read_until(master, b"Traceback")  # to the terminal's end
        assert process.wait(120) == 130
    os.close(master)


def test_an_ascii_terminal_gets_ascii(daemon: Any) -> None:
    command = [*COMMAND, "--socket", str(daemon.path), "status"]
    result = subprocess.run(
        command, capture_output=True, timeout=60, env=environment(PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    )
    assert result.returncode == 0
    assert result.stdout.startswith(b"* lightllmd")
    assert result.stdout.isascii()


@pytest.mark.skipif(os.getuid() != 0, reason="needs root, to become somebody else")
def test_5_for_a_user_whom_the_socket_refuses(daemon: Any, short_path: Path) -> None:
    """The real thing, not a patched connect(): mode 0600 and uid nobody."""
    os.chmod(short_path, 0o755)
    os.chmod(daemon.path, 0o600)
    probe = (
        "import os, sys; from lightllmctl.__main__ import main; main([*sys.argv[1:], 'status']);"
        "os.setgid(65534); os.setuid(65534); sys.exit(main([*sys.argv[1:], 'is-active']))"
    )
    command = [sys.executable, "-c", probe, "--socket", str(daemon.path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert result.returncode == 5, result.stderr
    assert result.stderr.startswith("lightllmctl: no permission for ")
    assert result.stderr.count("\n") == 1

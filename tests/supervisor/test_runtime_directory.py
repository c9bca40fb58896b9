"""The runtime directory: where it is, whose it is, and what dead daemons left in it."""

from __future__ import annotations

import os
import resource
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from lightllmd.errors import EXIT_SYSTEM, SystemFailure
from lightllmd.supervisor.host.runtime_directory import RuntimeDirectory, control_socket_path


@pytest.mark.parametrize(
    ("configured", "environment", "uid", "path"),
    [
        ("/x/c.sock", {"RUNTIME_DIRECTORY": "/run/a"}, 0, "/x/c.sock"),
        ("", {"RUNTIME_DIRECTORY": "/run/a:/run/b", "XDG_RUNTIME_DIR": "/run/user/5"}, 0, "/run/a/control.sock"),
        ("", {"XDG_RUNTIME_DIR": "/run/user/0"}, 0, "/run/lightllmd/control.sock"),
        ("", {"XDG_RUNTIME_DIR": "/run/user/5"}, 5, "/run/user/5/lightllmd/control.sock"),
        ("", {}, 5, "/tmp/lightllmd-5/control.sock"),
    ],
)
def test_place_of_the_control_socket(configured: str, environment: dict[str, str], uid: int, path: str) -> None:
    assert control_socket_path(configured, environment, uid) == Path(path)


def dead_pid() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_the_dead_are_cleared_and_those_of_the_living_kept(tmp_path: Path) -> None:
    dead, living = dead_pid(), os.getppid()
    (tmp_path / "ipc").mkdir()
    stale = [
        tmp_path / f".{dead}",
        tmp_path / "ipc" / f"{dead}-3.engine",
        tmp_path / "ipc" / f"{dead}-4.ranks",
        tmp_path / f"metrics-{dead}",
    ]
    stale.append(tmp_path / f"responses-{dead}")
    kept = [tmp_path / "ipc" / f"{living}-1.engine", tmp_path / f"metrics-{living}", tmp_path / "mine.txt"]
    for path in stale + kept:
        if path.name.startswith(("metrics", "responses")):
            path.mkdir()
            (path / "gauge_1.db").touch()
        else:
            path.touch()
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "control.sock"))
    runtime = RuntimeDirectory(tmp_path / "control.sock")
    assert not [path for path in [*stale, tmp_path / "control.sock"] if path.exists()]
    assert all(path.exists() for path in kept)
    runtime.close()
    assert {path.name for path in tmp_path.iterdir()} == {"ipc", f"metrics-{living}", "mine.txt"}


def test_control_socket_is_private_from_its_first_moment(tmp_path: Path) -> None:
    runtime = RuntimeDirectory(tmp_path / "control.sock")
    old = os.umask(0)
    sock = runtime.bind_control()
    os.umask(old)
    assert stat.S_IMODE((tmp_path / "control.sock").stat().st_mode) == 0o660
    assert stat.S_IMODE((tmp_path / "ipc").stat().st_mode) == 0o700
    assert [path.name for path in tmp_path.iterdir() if path.is_socket()] == ["control.sock"], "no temporary name left"
    sock.close()
    runtime.close()


def test_second_daemon_is_refused_by_the_name_of_the_first(tmp_path: Path) -> None:
    first = RuntimeDirectory(tmp_path / "control.sock")
    with pytest.raises(SystemFailure, match=f"pid {os.getpid()}") as refusal:
        RuntimeDirectory(tmp_path / "control.sock")
    assert refusal.value.exit_code == EXIT_SYSTEM
    other = RuntimeDirectory(tmp_path / "other.sock")  # its own socket: several daemons may share the directory
    other.close()
    first.close()
    RuntimeDirectory(tmp_path / "control.sock").close()


def test_a_path_too_long_for_a_socket_is_refused_with_its_limit(tmp_path: Path) -> None:
    with pytest.raises(SystemFailure, match="107 bytes"):
        RuntimeDirectory(tmp_path / ("x" * 100) / "control.sock")


def test_a_file_in_the_sockets_place_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "control.sock").write_text("precious")
    with pytest.raises(SystemFailure, match="not a socket"):
        RuntimeDirectory(tmp_path / "control.sock")
    assert (tmp_path / "control.sock").read_text() == "precious"


def test_gauges_of_a_dead_worker_are_forgotten_and_its_counters_are_taken_over(tmp_path: Path) -> None:
    runtime = RuntimeDirectory(tmp_path / "control.sock")
    assert [runtime.take_metrics_id("api") for _ in range(2)] == ["api-0", "api-1"]
    for name in ("gauge_livesum_api-0.db", "gauge_liveall_api-0.db", "counter_api-0.db", "gauge_livesum_api-1.db"):
        (runtime.metrics / name).touch()
    runtime.release_metrics_id("api-0")
    assert {path.name for path in runtime.metrics.iterdir()} == {"counter_api-0.db", "gauge_livesum_api-1.db"}
    assert runtime.take_metrics_id("api") == "api-0", "the files of the dead are the next one's"
    runtime.close()


def test_a_full_runtime_directory_ends_the_start_with_one_sentence(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "lightllmd", "--engine.backend", "fake"]
    full = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))  # noqa: E731
    done = subprocess.run(
        [*command, "--supervisor.control_socket", str(tmp_path / "control.sock")],
        preexec_fn=full,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == EXIT_SYSTEM
    (line,) = done.stderr.splitlines()
    assert f"can't write {tmp_path / 'control.sock.lock'}: " in line

"""A checkpoint's code may hang, crash, hoard or fork: it is told in one sentence, and nothing of it is left."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lightllmd.errors import ConfigInvalid
from lightllmd.remote_code import host
from lightllmd.remote_code.host import ask
from long_run import LONG
from remote_checkpoints import CONFIG_CODE, write_code

REFERENCE = "configuration_odd.OddConfig"
FORKS = "import os, signal\nif os.fork() == 0:\n    os.setsid()\n    os.fork()\n    signal.pause()\n"

# What the module does when it is imported, and what is said of it.
HOSTILE = {
    "sleeps for ever": ("import time\ntime.sleep(10**6)", "it takes more than 2 s"),
    "computes for ever": ("while True:\n    pass", "it takes more than 2 s"),
    "ends its process": ("import os\nos._exit(0)", "its process ended with status 0"),
    "ends with an odd status": ("import os\nos._exit(250)", "its process ended with status 250"),
    "leaves": ("raise SystemExit(3)", "SystemExit: 3"),
    "raises": ("raise RuntimeError('no\\nway ' + 'x' * 10**6)", "RuntimeError: no way xxx"),
    "raises what it will": ("class Own(BaseException):\n    pass\nraise Own", "failed: Own"),
    "is killed": ("import os\nos.kill(os.getpid(), 9)", "its process was ended by SIGKILL"),
    "crashes": ("import ctypes\nctypes.string_at(0)", "its process was ended by SIGSEGV"),
    "hoards": ("kept = []\nwhile True:\n    kept.append(bytearray(1 << 20))", "it takes more than 300 MB of memory"),
    "lacks a package": ("import no_such_package_anywhere", "no_such_package_anywhere"),
    "is no Python": ("class", "SyntaxError: "),
    "closes its files": ("import os\nos.closerange(3, 100)\nimport time\ntime.sleep(10**6)", "it takes more than 2 s"),
    "forks and leaves": (f"{FORKS}raise SystemExit(3)", "SystemExit: 3"),
    "forks and hangs": (f"{FORKS}signal.pause()", "it takes more than 2 s"),
}
USUAL = ("sleeps for ever", "ends its process", "leaves", "hoards", "forks and hangs")


def marked(mark: str) -> list[psutil.Process]:
    """Processes of this test's hosts, dead ones that are not reaped included."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("VIRTUAL_ENV") == mark:
                found.append(process)
        except psutil.Error:
            continue
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[str]:
    """Goes into the environment of all that a host starts; nothing that has it may be left."""
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    yield str(tmp_path)
    assert marked(str(tmp_path)) == []
    assert list(tmp_path.glob("lightllmd-code-*")) == []


def odd(folder: Path, first: str) -> str:
    return str(write_code(folder / "m", {"configuration_odd.py": f"{first}\n{CONFIG_CODE}"}, config={"width": 8}))


@pytest.mark.parametrize("what", HOSTILE if LONG else USUAL)
def test_what_goes_wrong_is_told_in_one_sentence(tmp_path: Path, mark: str, what: str) -> None:
    first, said = HOSTILE[what]
    folder = odd(tmp_path, first)
    with pytest.raises(ConfigInvalid) as refused:
        ask("config", folder, seconds=2.0 if "2 s" in said else 60.0, memory=300 << 20, reference=REFERENCE)
    [problem] = refused.value.problems
    assert problem.message.startswith(f"{folder}: running the code that it brings failed: ")
    assert said in problem.message
    assert "\n" not in problem.message
    assert len(problem.message) < 1000


def test_what_it_starts_and_leaves_ends_with_it(tmp_path: Path, mark: str) -> None:
    assert ask("config", odd(tmp_path, FORKS), reference=REFERENCE)["hidden_size"] == 16


def test_it_has_no_secret_no_hub_and_none_of_our_files(
    tmp_path: Path, mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret")
    monkeypatch.setenv("LIGHTLLMD_KEY", "secret")
    listener = os.open(tmp_path, os.O_RDONLY)
    os.set_inheritable(listener, True)
    look = """
import os, socket
class OddConfig(PretrainedConfig):
    def __init__(self, **rest):
        super().__init__(**rest)
        self.environ = dict(os.environ)
        self.links = [os.readlink(f"/proc/self/fd/{fd}") for fd in range(100) if os.path.lexists(f"/proc/self/fd/{fd}")]
        self.cwd = os.getcwd()
"""
    folder = write_code(tmp_path / "m", {"configuration_odd.py": f"{CONFIG_CODE}{look}"})
    try:
        found = ask("config", str(folder), reference=REFERENCE)
    finally:
        os.close(listener)
    assert "secret" not in found["environ"].values()
    assert found["environ"]["HF_HUB_OFFLINE"] == "1"
    assert str(tmp_path) not in found["links"]
    assert sum(link.startswith("socket:") for link in found["links"]) <= 1 + sum(
        os.readlink(f"/proc/self/fd/{fd}").startswith("socket:") for fd in (1, 2)
    )
    assert found["cwd"].startswith(f"{tmp_path}/lightllmd-code-")


def test_a_host_dies_with_the_process_that_asked(tmp_path: Path, mark: str) -> None:
    folder = odd(tmp_path, f"{FORKS}signal.pause()")
    asking = f"from lightllmd.remote_code.host import ask; ask('config', {folder!r}, reference={REFERENCE!r})"
    asker = psutil.Popen([sys.executable, "-c", asking])
    deadline = time.monotonic() + 60
    while len(marked(mark)) < 5:  # it, guard, host, and the two that it forked
        assert time.monotonic() < deadline
        time.sleep(0.05)
    asker.kill()
    asker.wait()
    while marked(mark):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_no_process_to_be_had_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host.sys, "executable", "/no/such/python")
    with pytest.raises(ConfigInvalid, match="no process can be started"):
        ask("config", odd(tmp_path, ""), reference=REFERENCE)

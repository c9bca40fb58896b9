"""Files that are read ahead: all that memory holds, and nobody is disturbed by what can't be."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from leftovers import no_new_threads
from lightllmd.supervisor.context import Commands
from lightllmd.weights import read_ahead
from lightllmd.weights.read_ahead import ReadAhead

SIZES = {"a": 1000, "b": 0, "c": 250_000}


@pytest.fixture
def files(tmp_path: Path) -> list[str]:
    for name, size in SIZES.items():
        (tmp_path / name).write_bytes(os.urandom(size))
    return [str(tmp_path / name) for name in SIZES]


def asked_for(files: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, int]:
    """Bytes of each file that went by, each once."""
    passed: dict[tuple[str, int], int] = {}
    sendfile = os.sendfile

    def noted(out: int, source: int, begin: int, size: int) -> int:
        count = sendfile(out, source, begin, size)
        passed[Path(os.readlink(f"/proc/self/fd/{source}")).name, begin] = count
        return count

    monkeypatch.setattr(os, "sendfile", noted)
    ReadAhead(files).wait()
    return {name: sum(count for (of, _), count in passed.items() if of == name) for name in SIZES}


def test_every_byte_is_asked_for_in_order_and_no_thread_stays(
    files: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_ahead, "PIECE", 4096)
    with no_new_threads():
        assert asked_for(files, monkeypatch) == SIZES


def test_no_more_is_read_than_memory_holds(files: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(read_ahead, "PIECE", 4096)
    monkeypatch.setattr(read_ahead, "free_memory", lambda: 100_000)
    assert asked_for(files, monkeypatch) == {"a": 1000, "b": 0, "c": 89_000}


def test_a_file_that_is_gone_disturbs_nobody(files: list[str], tmp_path: Path) -> None:
    ReadAhead([*files, str(tmp_path / "gone")]).wait()
    ReadAhead([str(tmp_path)]).wait()


def test_the_command_ends_by_itself_and_imports_no_torch(files: list[str]) -> None:
    assert subprocess.run(Commands().read_ahead(files), timeout=60).returncode == 0
    code = "import sys, lightllmd.weights.read_ahead; print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"

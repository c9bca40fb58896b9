"""A path that names no regular file is refused in words, at once; no read goes past its limit."""

from __future__ import annotations

import ast
import os
import socket
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from lightllmd.config.files import open_regular, read_bytes


@pytest.fixture
def strange(tmp_path: Path) -> Iterator[dict[str, Path]]:
    """Paths by what opening and reading them would do."""
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "folder").mkdir()
    (tmp_path / "link to the fifo").symlink_to("fifo")
    (tmp_path / "loop").symlink_to("loop")
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind(str(tmp_path / "socket"))
        yield {
            "waits for a writer": tmp_path / "fifo",
            "waits behind a link": tmp_path / "link to the fifo",
            "has no end": Path("/dev/zero"),
            "waits for a key": Path("/dev/tty"),
            "is a folder": tmp_path / "folder",
            "is a socket": tmp_path / "socket",
            "is a loop": tmp_path / "loop",
            "is too long": tmp_path / ("x" * 900_000),
            "has a NUL": Path("a\0b"),
            "has no byte": Path("\udfff\ud800"),
        }
    (tmp_path / "socket").unlink()


def test_no_path_makes_a_reader_wait_or_end_in_anything_but_an_oserror(strange: dict[str, Path]) -> None:
    told: dict[str, str | None] = {}

    def read_all() -> None:
        for name, path in strange.items():
            try:
                read_bytes(path, 1000)
            except OSError as error:
                told[name] = error.strerror

    reader = threading.Thread(target=read_all, daemon=True)
    reader.start()
    reader.join(10)
    assert set(told) == set(strange)
    assert all(told.values())
    assert told["waits for a writer"] == told["waits behind a link"] == "it is a pipe, not a regular file"
    assert told["has no end"] == "it is a device, not a regular file"
    assert told["is a folder"] == "it is a directory, not a regular file"


def test_a_regular_file_is_read_whole_up_to_its_limit(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"x" * 3_000_000)
    assert read_bytes(file, 3_000_000) == file.read_bytes()
    with pytest.raises(OSError, match="larger than 2999999 bytes"):
        read_bytes(file, 2_999_999)
    assert read_bytes("/dev/null", 1) == b""
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")


def test_a_file_that_says_it_is_empty_is_bounded_too() -> None:
    """Under /proc every file has size 0."""
    assert read_bytes("/proc/self/status", 1 << 20)
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bytes("/proc/self/status", 10)


# Where a path is opened in another way, and why it may be.
OPENED_OTHERWISE = {
    "lightllmd/api/helpers/process.py": "/proc",
    "lightllmd/code_host/__main__.py": "/proc",
    "lightllmd/code_host/host.py": "/proc",
    "lightllmd/config/files.py": "the helper",
    "lightllmd/config/key_editing.py": "a folder, to lock it",
    "lightllmd/api/documentation/served.py": "data of the package",
    "lightllmd/api/images/client.py": "a memory file of its own, which it writes",
    "lightllmd/api/page/files.py": "data of the package",
    "lightllmd/batch/lines.py": "the output, which it writes",
    "lightllmd/supervisor/host/unix_listener.py": "a folder",
    "lightllmd/console.py": "descriptors it was given, and /dev/null",
    "lightllmd/engine/ranks/children.py": "what its ranks print, ours",
    "lightllmd/observe/metrics.py": "its own files",
    "lightllmd/supervisor/host/procfs.py": "/proc",
    "lightllmd/supervisor/children/process.py": "/proc",
    "lightllmd/supervisor/host/runtime_directory.py": "the lock, ours",
    "lightllmd/supervisor/journal/report_store.py": "crash reports, ours",
    "lightllmd/probe/devices.py": "torch's version.py",
    "lightllmd/probe/transformers_table.py": "transformers' source",
    "lightllmd/visual/decoder_process.py": "/dev/null and /proc",
    "lightllmd/visual/local_file.py": "folder by folder from a root on, the file without waiting",
    "lightllmd/visual/sandbox.py": "/proc",
    "lightllmd/weights/device_facts.py": "/proc and /sys",
    "lightllmd/weights/kept_models.py": "locks of its own files",
    "lightllmd/weights/read_ahead.py": "/dev/null; files by open_regular",
    "lightllmctl/__main__.py": "/dev/null",
    "lightllmctl/load.py": "descriptors it was given",
}
_OPENERS = ("open", "read_bytes", "read_text", "from_file")


def _opens(path: Path) -> bool:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            function = node.func
            if isinstance(function, ast.Name) and function.id == "open":
                return True
            if isinstance(function, ast.Attribute) and function.attr in _OPENERS:
                owner = function.value.id if isinstance(function.value, ast.Name) else ""
                if function.attr != "open" or owner in ("os", "io", "path", "file"):
                    return True
    return False


def test_every_file_of_others_is_opened_by_the_helper() -> None:
    root = Path(__file__).parents[3]
    found = {
        str(path.relative_to(root))
        for room in ("lightllmd", "lightllmctl")
        for path in root.glob(f"{room}/**/*.py")
        if _opens(path)
    }
    assert found - set(OPENED_OTHERWISE) == set()

"""A request reads no file of this host but images below the folder that the operator has named."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from leftovers import no_new_descriptors
from lightllmd.visual import local_file
from lightllmd.visual.image_file import ImageRefused

MOST = 1000


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "root"
    (root / "in").mkdir(parents=True)
    (root / "in" / "a b.png").write_bytes(b"image")
    (root / "empty.png").touch()
    (root / "large.png").write_bytes(b"x" * (MOST + 1))
    (tmp_path / "secret").write_bytes(b"secret")
    (tmp_path / "rootless").write_bytes(b"secret")
    (root / "link.png").symlink_to(tmp_path / "secret")
    (root / "inner.png").symlink_to("in/a b.png")
    (root / "out").symlink_to(tmp_path)
    os.mkfifo(root / "fifo")
    return root


def read(name: str, root: Path | str) -> bytes:
    with no_new_descriptors(), local_file.read(name, str(root), MOST) as file:
        return file.read()


def test_files_below_the_root_are_read(root: Path) -> None:
    for name in (
        f"{root}/in/a b.png",
        f"file://{root}/in/a%20b.png",
        f"FILE://localhost{root}/in/a%20b.png",
        f"{root}//in/./a b.png",
        "in/a b.png",
    ):
        assert read(name, root) == b"image"
        assert read(name, f"{root}/") == b"image"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("{root}/../secret", "is no file below [images] file_root"),
        ("../secret", "is no file below [images] file_root"),
        ("in/../../secret", "is no file below [images] file_root"),
        ("file://{root}/%2e%2e/secret", "is no file below [images] file_root"),
        ("file://{root}/in%2f..%2f../secret", "is no file below [images] file_root"),
        ("/etc/passwd", "is no file below [images] file_root"),
        ("{root}less", "is no file below [images] file_root"),
        ("{root}", "is no file below [images] file_root"),
        ("{root}/in/", "is no file below [images] file_root"),
        ("", "is no file below [images] file_root"),
        ("file://evil.example{root}/in/a", "is no URL of a file of this host"),
        ("file://{root}/in/a?b", "is no URL of a file of this host"),
        ("file://[", "is no file URL"),
        ("link.png", "there is no file"),
        ("inner.png", "there is no file"),
        ("out/secret", "there is no file"),
        ("out/root/in/a b.png", "there is no file"),
        ("missing", "there is no file"),
        ("in/a b.png/x", "there is no file"),
        ("a\0b", "there is no file"),
        ("x" * 5000, "there is no file"),
        ("in", "is no regular file"),
        ("fifo", "is no regular file"),
        ("empty.png", "is empty"),
        ("large.png", f"has more than {MOST} bytes, [images] max_bytes"),
    ],
)
def test_nothing_else_is(root: Path, name: str, said: str) -> None:
    with pytest.raises(ImageRefused) as refused:
        read(name.format(root=root), root)
    assert said in refused.value.message
    assert len(refused.value.message) < 250


def test_a_socket_is_no_image(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    with socket.socket(socket.AF_UNIX) as sock:
        sock.bind("sock")
        with pytest.raises(ImageRefused, match="there is no file"):
            read("sock", root)
        os.unlink("sock")


def test_without_a_root_no_file_is_read(root: Path) -> None:
    for name in ("file:///etc/passwd", "/etc/passwd", "a.png"):
        with pytest.raises(ImageRefused, match=r"\[images\] file_root is empty"):
            read(name, "")
    assert read(f"{root}/in/a b.png", "/") == b"image"

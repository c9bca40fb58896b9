"""Which daemon is meant: --socket, $LIGHTLLMD_SOCKET, the user's own, the system's, in this order."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from lightllmctl import context
from lightllmctl.context import SYSTEM_SOCKET, choose_socket

UID = os.getuid()


@pytest.fixture
def own(short_path: Path) -> Path:
    path = short_path / "lightllmd" / "control.sock"
    path.parent.mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(path))
    return path


def test_the_option_comes_first(own: Path, short_path: Path) -> None:
    environ = {"LIGHTLLMD_SOCKET": "/named", "XDG_RUNTIME_DIR": str(short_path)}
    assert choose_socket("/option", environ, UID) == Path("/option")


def test_the_variable_comes_before_the_users_own(own: Path, short_path: Path) -> None:
    environ = {"LIGHTLLMD_SOCKET": "/named", "XDG_RUNTIME_DIR": str(short_path)}
    assert choose_socket(None, environ, UID) == Path("/named")


def test_the_users_own_comes_before_the_systems(own: Path, short_path: Path) -> None:
    assert choose_socket(None, {"XDG_RUNTIME_DIR": str(short_path)}, UID) == own


def test_without_any_it_is_the_systems(short_path: Path) -> None:
    assert choose_socket(None, {"XDG_RUNTIME_DIR": str(short_path)}, 4_000_000) == SYSTEM_SOCKET
    assert choose_socket("", {"LIGHTLLMD_SOCKET": ""}, 4_000_000) == SYSTEM_SOCKET


def test_a_plain_file_is_not_the_users_own(own: Path, short_path: Path) -> None:
    own.unlink()
    own.write_text("")
    assert choose_socket(None, {"XDG_RUNTIME_DIR": str(short_path)}, 4_000_000) == SYSTEM_SOCKET


def test_what_another_user_put_there_is_not_ours(own: Path, short_path: Path) -> None:
    assert choose_socket(None, {"XDG_RUNTIME_DIR": str(short_path)}, UID + 1) == SYSTEM_SOCKET


def test_tmp_is_searched_after_the_runtime_directory(own: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Path] = []

    def nothing_there(path: Path, uid: int) -> bool:
        asked.append(path)
        return False

    monkeypatch.setattr(context, "_is_socket_of", nothing_there)
    choose_socket(None, {"XDG_RUNTIME_DIR": "/run/user/7"}, 7)
    assert asked == [Path("/run/user/7/lightllmd/control.sock"), Path("/tmp/lightllmd-7/control.sock")]

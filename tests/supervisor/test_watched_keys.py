"""The files of API keys are looked at while the daemon runs: what they hold is in force when it is whole and sound."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Awaitable, Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest

from lightllmd.config import keys
from lightllmd.config.keys import hashed
from lightllmd.config.parameters import Config, HttpSettings
from lightllmd.supervisor.change.api_keys import KeysInForce
from lightllmd.supervisor.host.file_threads import FileThreads


class Scene:
    """As much of the supervisor as there has to be. The file holds the key "first"."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.write("first")
        http = HttpSettings(api_keys_file=str(file))
        self.put: list[Config] = []
        self.said: list[str] = []
        self.wake = asyncio.Event()
        self.context: Any = SimpleNamespace(
            config=Config(http=http, held_keys=keys.read_ring(http.key_files, "")),
            file_threads=FileThreads(),
            background_tasks=set(),
            post=lambda event: self.wake.set(),
            events=SimpleNamespace(add=lambda kind, text, **_: self.said.append(text)),
        )
        self.settings: Any = SimpleNamespace(written=self.context.config, take=self._take)
        self.watched = KeysInForce(self.context, self.settings, self._put)

    def _put(self, config: Config) -> None:
        self.put.append(config)
        self.context.config = config

    def _take(self, written: Config) -> None:
        self.settings.written = written

    def write(self, *names: str) -> None:
        self.file.write_text("".join(f'[keys.{name}]\nsha256 = "{hashed(name)}"\n' for name in names))
        self.file.chmod(0o640)

    async def look(self) -> None:
        """Once, to its end."""
        self.wake.clear()
        self.watched.look()
        await asyncio.wait_for(self.wake.wait(), 20)
        self.watched.step()

    @property
    def names(self) -> list[str]:
        return [key.name for key in self.context.config.keys.requests]


def play(file: Path, scenario: Callable[[Scene], Awaitable[None]]) -> None:
    async def scene() -> None:
        await scenario(Scene(file))

    asyncio.run(scene())


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "keys.toml"


def test_changed_keys_are_in_force_when_two_looks_have_found_them_so(file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.look()
        assert (scene.put, scene.said) == ([], [])
        scene.write("second")  # an editor that writes in place may be in the middle
        await scene.look()
        assert scene.names == ["first"]
        scene.write("first", "second")
        await scene.look()
        assert scene.names == ["first"]
        await scene.look()
        await scene.look()
        assert scene.names == ["first", "second"]
        assert scene.settings.written.keys == scene.context.config.keys  # a reload finds nothing changed
        assert len(scene.put) == 1
        assert len(scene.said) == 1
        assert hashed("second") not in scene.said[0]

    play(file, scenario)


def test_a_file_that_is_broken_or_gone_changes_nothing_and_is_told_once(file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        await scene.look()
        kept = file.with_name("kept")
        os.rename(file, kept)
        for _ in range(3):
            await scene.look()
        assert "does not exist" in scene.watched.fault
        file.write_text("[keys.first]\nsha256 = 5\n")
        file.chmod(0o640)
        for _ in range(3):
            await scene.look()
        assert "sha256" in scene.watched.fault
        assert (scene.names, scene.put, len(scene.said)) == (["first"], [], 2)
        os.replace(kept, file)  # with the times that it had
        for _ in range(2):
            await scene.look()
        assert (scene.watched.fault, scene.put) == ("", [])

    play(file, scenario)


def test_keys_that_a_reload_read_before_they_changed_give_way_to_the_newer_ones(file: Path) -> None:
    async def scenario(scene: Scene) -> None:
        before = scene.context.config
        scene.write("newer")
        for _ in range(2):
            await scene.look()
        assert scene.names == ["newer"]
        scene.context.config = msgspec.structs.replace(before)  # a long reload that had read the file first
        assert scene.names == ["first"]
        for _ in range(2):
            await scene.look()
        assert scene.names == ["newer"]

    play(file, scenario)

"""What a reload would take up is found out beside the loop, and told with the status."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from lightllmd.config.cli import Invocation
from lightllmd.config.parameters import Config, Params
from lightllmd.config.stamps import Stamp, stamp
from lightllmd.supervisor.change import settings
from lightllmd.supervisor.change.settings import Settings
from lightllmd.supervisor.host.file_threads import FileThreads
from supervisor.test_faults_of_our_own import World

CONFIG = Config(params=Params(model_dir="/m"))


class Files:
    """A configuration file and a model's weights, and the daemon's view of them."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.config, self.weights = folder / "lightllmd.toml", folder / "model.safetensors"
        self.config.write_text("one")
        self.weights.write_bytes(b"weights")
        self.stamps: list[Stamp] = [stamp(str(self.weights))]
        self.written = CONFIG
        self.read = 0
        self.settings = Settings(Invocation(CONFIG, str(self.config)))
        monkeypatch.setattr(self.settings, "reread", self._reread)
        self._context = SimpleNamespace(config=CONFIG, file_threads=FileThreads())

    def _reread(self) -> Config:
        self.read += 1
        return self.written

    async def look(self) -> None:
        await self.settings.look(self._context, self.stamps)  # type: ignore[arg-type]

    def pending(self) -> int:
        asyncio.run(self.look())
        assert self.settings.pending_fault == ""
        return self.settings.pending


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Files:
    return Files(tmp_path, monkeypatch)


def test_settings_and_model_files_that_changed_are_pending_until_they_are_taken_up(files: Files) -> None:
    assert files.pending() == 0
    files.written = msgspec.structs.replace(CONFIG, params=Params(model_dir="/m", port=9000))
    files.config.write_text("another")
    assert files.pending() == 1
    files.weights.write_bytes(b"others!")
    assert files.pending() == 2
    files.settings.take(files.written)
    files._context.config, files.stamps = files.written, [stamp(str(files.weights))]
    assert files.pending() == 0


def test_a_file_that_only_was_touched_is_not_pending_and_none_is_read_again_unless_it_was(files: Files) -> None:
    os.utime(files.weights, (1, 1))
    assert files.pending() == 0
    assert files.pending() == 0
    assert files.read == 1


def test_a_file_system_that_hangs_is_told_and_holds_one_thread(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    gate, looks = threading.Event(), []

    def hang(file: str) -> None:
        looks.append(file)
        gate.wait()

    monkeypatch.setattr(settings, "_stat", hang)
    monkeypatch.setattr(settings, "TIMEOUT", 0.01)

    async def run() -> None:
        looking = asyncio.ensure_future(files.look())
        while not files.settings.pending_fault:
            await asyncio.sleep(0.001)  # the loop goes on
        assert "is their file system there?" in files.settings.pending_fault
        assert not looking.done()
        assert len(looks) == 1
        gate.set()
        await looking
        assert files.settings.pending_fault == ""

    asyncio.run(run())


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    world.simulation.close()


def test_while_a_look_hangs_no_other_begins_and_the_daemon_serves(world: World) -> None:
    looks = 0

    async def hang(*_: object) -> None:
        nonlocal looks
        looks += 1
        await asyncio.Event().wait()

    world.simulation.settings.look = hang  # type: ignore[method-assign]
    for _ in range(50):
        world.tick()
    assert looks == 1
    assert world.supervisor.health[0]

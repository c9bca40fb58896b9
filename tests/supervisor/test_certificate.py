"""The certificate's files are looked at while the daemon runs: a sound pair is in force at once, a broken one never."""

from __future__ import annotations

import asyncio
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from lightllmd.config import tls
from lightllmd.config.parameters import Config, HttpSettings
from lightllmd.errors import show
from lightllmd.ipc.messages import Tls
from lightllmd.supervisor.change.certificate import CertificateInForce
from lightllmd.supervisor.context import Context
from lightllmd.supervisor.host.file_threads import FileThreads
from tls_files import Made, make


class Scene:
    """As much of the supervisor as there has to be."""

    def __init__(self, made: Made) -> None:
        self.made = made
        self.told: list[Tls] = []
        self.said: list[str] = []
        self.wake = asyncio.Event()
        self.context: Any = SimpleNamespace(
            tls_message=lambda broken: Context.tls_message(self.context, broken),
            config=Config(http=HttpSettings(**made.settings)),
            tls=tls.read(str(made.certificate), str(made.key)),
            file_threads=FileThreads(),
            background_tasks=set(),
            post=lambda event: self.wake.set(),
            events=SimpleNamespace(add=lambda kind, text, **_: self.said.append(text)),
        )
        self.certificate = CertificateInForce(self.context, self.told.append)

    async def look(self) -> None:
        """Once, to its end."""
        self.wake.clear()
        self.certificate.look()
        await asyncio.wait_for(self.wake.wait(), 20)
        self.certificate.step()

    def subject(self) -> bytes:
        return self.context.tls.certificate


@pytest.fixture
def files(tmp_path: Path) -> tuple[Made, Made]:
    return make(tmp_path), make(tmp_path, "renewed", days=200)


def test_a_renewed_pair_is_in_force_after_one_look_and_told_once(files: tuple[Made, Made]) -> None:
    made, renewed = files

    async def scenario() -> None:
        scene = Scene(made)
        await scene.look()
        assert (scene.told, scene.said) == ([], [])
        made.put(renewed)
        await scene.look()
        await scene.look()
        [message] = scene.told
        assert (message.certificate, message.broken) == (renewed.certificate.read_bytes(), False)
        assert scene.subject() == renewed.certificate.read_bytes()
        assert scene.certificate.snapshot().expires == message.expires
        assert len(scene.said) == 1

    asyncio.run(scenario())


def test_a_broken_pair_changes_nothing_and_is_told_until_it_is_sound(files: tuple[Made, Made]) -> None:
    made, renewed = files
    before = made.certificate.read_bytes(), made.key.read_bytes()

    async def scenario() -> None:
        scene = Scene(made)
        made.certificate.write_bytes(renewed.certificate.read_bytes())  # its key is still to come
        await scene.look()
        assert scene.told == []
        await scene.look()
        [message] = scene.told
        assert (message.certificate, message.broken) == (before[0], True)
        assert "http.tls_key: " in scene.certificate.snapshot().fault
        assert show(str(made.key)) in scene.said[0]
        await scene.look()
        assert len(scene.told) == len(scene.said) == 1
        made.key.unlink()
        await scene.look()
        assert "does not exist" in scene.certificate.snapshot().fault
        made.key.write_bytes(before[1])
        made.certificate.write_bytes(before[0])
        await scene.look()
        assert [one.broken for one in scene.told] == [True, True, False]
        assert scene.certificate.snapshot().fault == ""
        made.put(renewed)
        await scene.look()
        assert scene.told[-1].certificate == renewed.certificate.read_bytes()

    asyncio.run(scenario())


def test_certificate_and_key_that_are_replaced_one_after_the_other_are_no_fault(files: tuple[Made, Made]) -> None:
    made, renewed = files

    async def scenario() -> None:
        scene = Scene(made)
        made.certificate.write_bytes(renewed.certificate.read_bytes())
        await scene.look()
        made.key.write_bytes(renewed.key.read_bytes())
        await scene.look()
        assert [one.broken for one in scene.told] == [False]
        assert not any("stays as it was" in text for text in scene.said)

    asyncio.run(scenario())


def test_what_a_look_found_of_other_names_does_not_count(files: tuple[Made, Made]) -> None:
    """A reload came between."""
    made, renewed = files

    async def scenario() -> None:
        scene = Scene(made)
        made.put(renewed)
        scene.certificate.look()
        await asyncio.wait_for(scene.wake.wait(), 20)
        scene.context.config = Config()
        scene.certificate.step()
        assert scene.told == []

    asyncio.run(scenario())

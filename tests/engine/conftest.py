"""Engine processes and api workers that end with the test."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from engine_process import Api, EngineProcess


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., EngineProcess]]:
    started: list[EngineProcess] = []

    def spawn(**settings: object) -> EngineProcess:
        started.append(EngineProcess(tmp_path, **settings))
        return started[-1]

    yield spawn
    for engine in started:
        engine.close()


@pytest.fixture
def connect() -> Iterator[Callable[..., Api]]:
    connected: list[Api] = []

    def make(engine: EngineProcess, number: int = 0) -> Api:
        connected.append(Api(engine, number))
        return connected[-1]

    yield make
    for api in connected:
        api.socket.close()

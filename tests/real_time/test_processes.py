"""Single processes, each within seconds of its own. With several workers nothing else runs beside this folder."""

from __future__ import annotations

import time
from pathlib import Path

from api.frontend_harness import run, until
from api.test_api_process import process
from engine_process import EngineProcess


def test_an_api_worker_is_ready_soon_and_beats_steadily(tmp_path: Path) -> None:
    async def scenario() -> None:
        async with process(tmp_path) as one:
            assert time.monotonic() - one.begun < 5, "0.8 s on two cores"
            begun, count = time.monotonic(), len(one.beats)
            await until(lambda: one.beat() and len(one.beats) >= count + 5)
            assert (time.monotonic() - begun) / 5 < 0.5

    run(scenario())


def test_an_engine_beats_at_least_twice_a_second_while_it_loads_and_while_it_is_idle(tmp_path: Path) -> None:
    engine = EngineProcess(tmp_path, load_seconds=1.2)
    try:
        engine.wait_ready()
        assert len([beat for beat in engine.beats() if beat.phase == "load"]) >= 4
        begun, count = time.monotonic(), len(engine.beats())
        engine.hear(lambda: len(engine.beats()) >= count + 4)
        assert time.monotonic() - begun < 4 * 0.5 + 0.5
    finally:
        engine.close()

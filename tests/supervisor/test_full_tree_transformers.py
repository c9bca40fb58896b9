"""A model that no family covers, through the whole daemon: its streams survive a killed engine."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest

from harness import Daemon, Killer, generate_stream, run
from long_run import LONG
from tiny_causal_lms import write_causal_lm

LIMITS = ("--max_req_total_len", "96", "--max_req_input_len", "32", "--max_total_token_num", "800")
STREAMS, TOKENS = 4, 60


@pytest.mark.skipif(not LONG, reason="LIGHTLLMD_LONG_TESTS=1 runs it; in one process: test_transformers_backend.py")
def test_streams_of_a_model_of_transformers_survive_a_killed_engine(tmp_path: Path) -> None:
    model = write_causal_lm(tmp_path / "mixtral", "mixtral")
    flags = ("--model_dir", str(model), "--engine.threads", "1", "--running_max_req_size", "8", *LIMITS)

    async def all_streams(daemon: Daemon, seen: Callable[[], None]) -> list[tuple[list[int], str]]:
        async with httpx.AsyncClient(timeout=240) as client:
            prompts = ("ab" * (3 + number) for number in range(STREAMS))
            return await asyncio.gather(*(generate_stream(client, daemon.url, p, TOKENS, seen) for p in prompts))

    with Daemon(tmp_path, *flags, fake=False) as daemon:
        unbroken = run(all_streams(daemon, lambda: None))
        killer = Killer(daemon, signal.SIGKILL, 1, STREAMS * TOKENS, seed=1)
        assert run(all_streams(daemon, killer)) == unbroken
        assert len(killer.killed) == 1
        status = daemon.status()
        assert status is not None
        assert status["requests"]["failed"] == 0

"""Generations of several ranks of the fake engine, through the whole process tree, under streams."""

from __future__ import annotations

import asyncio
import os
import random
import signal
from pathlib import Path

import httpx
import psutil

from harness import Daemon, generate_stream, run, wait_for
from leftovers import wait_ended
from lightllmd.engine.runners.fake_model import fake_token
from long_run import LONG

STREAMS, TOKENS = (64, 400) if LONG else (8, 150)
KILLS = 30 if LONG else 3
FAST_FAKE = ("--engine.fake.tokens_per_second", "100", "--engine.fake.load_seconds", "0.1")
HANGS = ("--supervisor.hang_timeout", "5", "--supervisor.abort_grace", "0.2", "--supervisor.stop_timeout", "5")


def ready_ranks(daemon: Daemon, count: int, but: list[int]) -> list[int]:
    """Their pids, once so many are in service that none of `but` is among."""

    def found() -> list[int] | None:
        rows = daemon.workers("engine")
        pids = [row["pid"] for row in rows if row["state"] == "running" and row["phase"] == "ready"]
        return pids if len(pids) == count and not set(pids) & set(but) else None

    return wait_for(found, what=f"{count} ranks in service")


def told(daemon: Daemon) -> str:
    """Why the last generation ended."""
    rows = daemon.workers("engine")
    return rows[0]["last_exit"]["cause"] if rows and rows[0]["last_exit"] else ""


def test_signals_at_any_rank_lose_no_stream_and_leave_nothing(tmp_path: Path) -> None:
    order = random.Random(16)
    numbers = [signal.SIGKILL, signal.SIGTERM, signal.SIGSTOP, signal.SIGSEGV]
    with Daemon(tmp_path, *FAST_FAKE, *HANGS, "--tp", "2") as daemon:
        gone: list[int] = []

        def kill_all() -> None:
            for kill in range(KILLS):
                group = ready_ranks(daemon, 2, gone)
                assert [row["name"] for row in daemon.workers("engine")] == ["engine-0", "engine-0.1"]
                rank = order.randrange(2)
                os.kill(group[rank], numbers[kill % len(numbers)])
                wait_ended([psutil.Process(pid) for pid in group if psutil.pid_exists(pid)])
                gone.extend(group)
                # A rank that SIGTERM ends says farewell, on which the other may be gone first.
                ended = range(2) if numbers[kill % len(numbers)] == signal.SIGTERM else (rank,)
                cause = tuple(f"rank {one} (pid {group[one]}): " for one in ended)
                wait_for(lambda cause=cause: told(daemon).startswith(cause), what=f"an end by {cause}")

        async def streams() -> list[tuple[list[int], str]]:
            async with httpx.AsyncClient(timeout=120, limits=httpx.Limits(max_connections=None)) as client:
                killing = asyncio.create_task(asyncio.to_thread(kill_all))
                answers = await asyncio.gather(
                    *(generate_stream(client, daemon.url, f"p{i}", TOKENS, lambda: None) for i in range(STREAMS))
                )
                await killing
                return answers

        for i, (ids, _) in enumerate(run(streams())):
            assert ids == [fake_token(list(f"p{i}".encode()), 0, 0, position) for position in range(TOKENS)]
        status = daemon.wait_ready()
        assert status["requests"]["failed"] == 0
        assert status["restarts"] == KILLS
        left = [psutil.Process(pid) for pid in ready_ranks(daemon, 2, gone)]
        assert daemon.stop() == 0
        wait_ended(left)
    assert not [*tmp_path.rglob("*.engine"), *tmp_path.rglob("*.ranks")], "no socket is left"

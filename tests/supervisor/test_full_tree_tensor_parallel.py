"""A real model on two ranks through the whole process tree: what happens to its processes changes no token."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import psutil
import pytest

from closed_loop import Operator, Timeline, wait_for_phase
from harness import Daemon, generate_stream, run, wait_for
from leftovers import wait_ended
from long_run import LONG
from model_folders import fill, write_folder

TOKENS = 300
ROLLED_BACK = 9  # of lightllmctl
FLAGS = {
    "engine.device": "cpu",
    "engine.threads": "1",
    "max_total_token_num": "4000",
    "max_req_input_len": "1000",
    "max_req_total_len": "2000",
    "supervisor.spare_engine": "false",
    "supervisor.hang_timeout": "3",
    "supervisor.abort_grace": "0.2",
}
FILE = """
model_dir = "{model}"
tp = {ranks}
[supervisor]
swap = "after"
[models.dense]
model_dir = "{model}"
tp = {ranks}
[models.eight]
model_dir = "{model}"
tp = {ranks}
mode = ["triton_w8a16"]
"""


class Scene:
    """One daemon; `write` says how many ranks its file asks for."""

    def __init__(self, tmp_path: Path) -> None:
        self._folder = write_folder(tmp_path / "model", "F32", torch_dtype="float32")
        fill(self._folder, 1)
        home = tmp_path / "daemon"
        home.mkdir()
        self._file = home / "lightllmd.toml"
        self.write(2)
        self.daemon = Daemon(home, *(f"--{key}={value}" for key, value in FLAGS.items()), fake=False)
        self.operator = Operator(self.daemon, Timeline("dense"))

    def write(self, ranks: int) -> None:
        self._file.write_text(FILE.format(model=self._folder, ranks=ranks))

    def ranks(self, count: int) -> list[int]:
        """Pids of the engine in force, once so many ranks are in service."""

        def found() -> list[int] | None:
            rows = [row for row in self.daemon.workers("engine") if row["name"].startswith("engine-0")]
            ready = [row["pid"] for row in rows if row["state"] == "running" and row["phase"] == "ready"]
            return ready if len(ready) == len(rows) == count else None

        return wait_for(found, what=f"{count} ranks in service")

    def stream(self, during: Callable[[], object] = lambda: None) -> list[int]:
        """The tokens of a stream beside which `during` runs, from its third token on."""

        async def both() -> list[int]:
            begun, seen = asyncio.Event(), [0]

            def count() -> None:
                seen[0] += 1
                if seen[0] == 3:
                    begun.set()

            async with httpx.AsyncClient(timeout=120) as client:
                answer = asyncio.create_task(generate_stream(client, self.daemon.url, "ab", TOKENS, count))
                await asyncio.wait(
                    [answer, waiting := asyncio.create_task(begun.wait())], return_when="FIRST_COMPLETED"
                )
                waiting.cancel()
                await asyncio.to_thread(during)
                return (await answer)[0]

        return run(both())


@pytest.mark.timeout(300)
def test_a_killed_rank_and_another_number_of_ranks_change_no_token(tmp_path: Path) -> None:
    scene = Scene(tmp_path)

    def kill(rank: int, number: int) -> None:
        group = scene.ranks(2)
        os.kill(group[rank], number)
        wait_ended([psutil.Process(pid) for pid in group if psutil.pid_exists(pid)])

    def fewer() -> None:
        scene.write(1)
        scene.operator.reload()

    with scene.daemon.start() as daemon:
        alone = scene.stream()
        assert len(alone) == TOKENS
        assert scene.stream(lambda: kill(1, signal.SIGKILL)) == alone
        for rank, number in ((0, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGSTOP)) if LONG else ():
            assert scene.stream(lambda rank=rank, number=number: kill(rank, number)) == alone
        assert scene.stream(fewer) == alone
        assert scene.stream() == alone, "one rank computes what two do"
        assert len(scene.ranks(1)) == 1
        assert daemon.status()["requests"]["failed"] == 0


@pytest.mark.skipif(
    not LONG, reason="LIGHTLLMD_LONG_TESTS=1 runs it: test_sleep and test_full_tree_swap have its parts"
)
@pytest.mark.timeout(600)
def test_ranks_sleep_wake_and_are_swapped_as_one(tmp_path: Path) -> None:
    scene = Scene(tmp_path)

    def fail() -> None:
        with ThreadPoolExecutor(1) as beside:
            swap = beside.submit(scene.operator.swap, "eight", code=ROLLED_BACK)
            wait_for_phase(scene.daemon, "Loading")
            (follower,) = [row["pid"] for row in scene.daemon.workers("engine") if row["name"] == "candidate.1"]
            os.kill(follower, signal.SIGKILL)
            swap.result()

    with scene.daemon.start() as daemon:
        alone = scene.stream()
        group = scene.ranks(2)
        assert scene.stream(fail) == alone
        assert scene.ranks(2) == group, "the old engine slept, and woke"
        assert len(scene.stream(lambda: scene.operator.swap("eight"))) == TOKENS
        eight = scene.stream()
        wait_ended([psutil.Process(pid) for pid in group if psutil.pid_exists(pid)])
        assert daemon.status()["model"]["weights"] == "w8a16"
        scene.operator.swap("dense")
        assert scene.stream() == alone
        assert eight != alone
        assert daemon.status()["requests"]["failed"] == 0

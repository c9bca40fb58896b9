"""Two ways to store one model, swapped under a stream: each request ends with the weights that it began with, and those
that an engine's death interrupts go on with them."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from closed_loop import Operator, Timeline
from harness import Daemon, generate_stream, run
from model_folders import fill, write_folder

LONG_STREAM, STREAM = 600, 200  # tokens
FLAGS = {
    "engine.device": "cpu",
    "engine.threads": "1",
    "max_total_token_num": "4000",
    "max_req_input_len": "1000",
    "max_req_total_len": "2000",
    "supervisor.spare_engine": "false",
}
FILE = """
model_dir = "{model}"
[models.dense]
model_dir = "{model}"
[models.eight]
model_dir = "{model}"
mode = ["triton_w8a16"]
[models.eight.quantise]
rules = ["down 1: dense"]
"""


async def interrupted(daemon: Daemon, operator: Operator) -> tuple[list[int], list[int]]:
    """Tokens of a stream that was open while the other entry came into force, and of one whose engine was killed."""
    seen = [0, 0]
    loop = asyncio.get_running_loop()

    def count(which: int) -> None:
        seen[which] += 1

    async with httpx.AsyncClient(timeout=120) as client:

        async def stream(which: int, tokens: int) -> list[int]:
            return (await generate_stream(client, daemon.url, "ab", tokens, lambda: count(which)))[0]

        first = asyncio.create_task(stream(0, LONG_STREAM))
        while not seen[0] and not first.done():
            await asyncio.sleep(0)
        await loop.run_in_executor(None, operator.swap, "eight")
        second = asyncio.create_task(stream(1, STREAM))
        while seen[1] < 3 and not second.done():
            await asyncio.sleep(0)
        daemon.kill("engine")
        return await first, await second


async def undisturbed(daemon: Daemon, tokens: int) -> list[int]:
    async with httpx.AsyncClient(timeout=120) as client:
        return (await generate_stream(client, daemon.url, "ab", tokens, lambda: None))[0]


@pytest.mark.timeout(300)
def test_streams_keep_their_weights_through_a_swap_of_modes_and_a_kill(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "model", "F32", torch_dtype="float32")
    fill(folder, 1)
    home = tmp_path / "daemon"
    home.mkdir()
    (home / "lightllmd.toml").write_text(FILE.format(model=folder))
    with Daemon(home, *(f"--{key}={value}" for key, value in FLAGS.items()), fake=False).start() as daemon:
        operator = Operator(daemon, Timeline("dense"))
        dense = run(undisturbed(daemon, LONG_STREAM))
        before = daemon.status()["model"]
        first, second = run(interrupted(daemon, operator))
        after = daemon.wait_ready()["model"]
        assert first == dense
        assert len(second) == STREAM
        assert (before["name"], before["weights"], before["kv_cache"]) == ("dense", "dense", "dense")
        assert (after["name"], after["weights"], after["kv_cache"]) == ("eight", "w8a16", "dense")
        assert after["weight_bytes"] < before["weight_bytes"]
        assert second == run(undisturbed(daemon, STREAM))

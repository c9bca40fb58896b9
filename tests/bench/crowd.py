"""Many clients at one api worker, with the fake engine: what they cost, and whether any of them waits for another.

``python tests/bench/crowd.py [--what idle,churn,late,compile] [--seconds 60]``

*idle*: 1,000 streams that wait for their turn, behind 200 at 20 tokens/s each; memory of the api worker, the longest
time between two tokens of any active stream. Goals: below 400 MB, and none starves.
*churn*: 2,000 connections open at a time, each a stream that its client gives up at a random moment and opens again;
afterwards no slot and no request may be left. Memory of the api worker before, at its most and after.
*late*: half of what the front end can do (found first): how much later than the engine's steps tokens come, p99. Goal:
below 5 ms. The engine's pace is known, so that the earliest token of a stream tells when its steps were.
*compile*: streams of 1,000 tokens/s, while schemas of 20 kB are compiled; the longest time without a token beside that
before. Goal: at most 20 ms.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import uvloop

from harness import Daemon, wait_for

IDLE, ACTIVE, PACE = 1000, 200, 20.0
CHURN = 2000
CHARACTERS = "abcdefghijklmnopqrstuvwxyz"


class Stream:
    """One request whose frames are read as they come; `times`: of each, seconds of the monotonic clock."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader, self._writer = reader, writer
        self.times: list[float] = []
        self.status = 0

    async def follow(self) -> None:
        """To its end."""
        while data := await self._reader.read(1 << 16):
            if not self.status:
                self.status = int(data.split(b" ", 2)[1])
            self.times += [time.monotonic()] * data.count(b"data:")

    def close(self) -> None:
        self._writer.transport.abort()


async def opened(port: int, path: str, body: dict[str, Any] | str) -> Stream:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    written = (body if isinstance(body, str) else json.dumps(body)).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(written)}\r\n\r\n"
    writer.write(head.encode() + written)
    await writer.drain()
    return Stream(reader, writer)


def asked(tokens: int, prompt: str = "x", **more: Any) -> dict[str, Any]:
    return {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "ignore_eos": True, **more}}


@asynccontextmanager
async def following(streams: Sequence[Stream]) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(stream.follow()) for stream in streams]
    try:
        yield
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:
            stream.close()


def gaps(stream: Stream) -> list[float]:
    return [after - before for before, after in zip(stream.times, stream.times[1:], strict=False)]


def longest_gap(stream: Stream) -> float:
    return max(gaps(stream), default=0.0)


class Server:
    """A daemon with the fake engine."""

    def __init__(self, folder: str, *flags: str) -> None:
        self.daemon = Daemon(Path(folder), *flags)

    def __enter__(self) -> Server:
        self.daemon.start()
        self.api = psutil.Process(self.daemon.pid("api"))
        return self

    def __exit__(self, *failure: object) -> None:
        self.daemon.__exit__(*failure)

    @property
    def port(self) -> int:
        return self.daemon.port

    @property
    def memory(self) -> float:
        """MB of the api worker that are its own."""
        return self.api.memory_full_info().uss / 1e6

    def empty(self) -> bool:
        status = self.daemon.status()
        requests, model = status["requests"], status["model"]
        return not (requests["running"] or requests["waiting"] or requests["held"] or model["kv_slots_used"])


async def idle(server: Server, seconds: float) -> dict[str, Any]:
    before = server.memory
    tokens = int(PACE * (seconds + 30))
    active = [await opened(server.port, "/generate_stream", asked(tokens, f"a{n}")) for n in range(ACTIVE)]
    async with following(active):
        while not all(stream.times for stream in active):
            await asyncio.sleep(0.1)
        waiting = [await opened(server.port, "/generate_stream", asked(tokens, f"w{n}")) for n in range(IDLE)]
        async with following(waiting):
            begun, most = time.monotonic(), 0.0
            marks = [len(stream.times) for stream in active]
            while time.monotonic() - begun < seconds:
                await asyncio.sleep(1.0)
                most = max(most, server.memory)
            told = [len(stream.times) - mark for stream, mark in zip(active, marks, strict=True)]
            return {
                "api_MB_before": round(before),
                "api_MB": round(most),
                "tokens_s_of_the_slowest": round(min(told) / seconds, 2),
                "of_the_fastest": round(max(told) / seconds, 2),
                "longest_gap_ms": round(1000 * max(map(longest_gap, active))),
                "idle_streams_that_ended": sum(stream.times != [] for stream in waiting),
            }


async def churn(server: Server, seconds: float) -> dict[str, Any]:
    draw, before, most = random.Random(0), server.memory, 0.0
    deadline, counts = time.monotonic() + seconds, {"opened": 0, "refused": 0}

    async def client(number: int) -> None:
        while time.monotonic() < deadline:
            try:
                stream = await opened(server.port, "/generate_stream", asked(1000, f"{number}"))
            except OSError:
                counts["refused"] += 1
                await asyncio.sleep(0.1)
                continue
            counts["opened"] += 1
            task = asyncio.create_task(stream.follow())
            await asyncio.wait({task}, timeout=draw.uniform(0, 4))
            task.cancel()
            stream.close()

    clients = [asyncio.create_task(client(number)) for number in range(CHURN)]
    while not all(task.done() for task in clients):
        most = max(most, server.memory)
        await asyncio.wait(clients, timeout=1.0)
    for task in clients:
        task.result()
    begun = time.monotonic()
    await asyncio.to_thread(wait_for, server.empty, 60.0, "no request and no slot in use")
    return {
        **counts,
        "empty_after_s": round(time.monotonic() - begun, 1),
        "api_MB_before": round(before),
        "at_most": round(most),
        "after": round(server.memory),
    }


async def tokens_per_second(server: Server, streams: int, tokens: int) -> float:
    begun = time.monotonic()
    some = [await opened(server.port, "/generate_stream", asked(tokens, f"m{n}")) for n in range(streams)]
    tasks = [asyncio.create_task(stream.follow()) for stream in some]
    await asyncio.gather(*tasks)
    return sum(len(stream.times) for stream in some) / (time.monotonic() - begun)


async def late(folder: str, seconds: float) -> dict[str, Any]:
    """The engine makes one step for all streams at a time, so the earliest token of each step tells when it was."""
    streams, flags = 64, flags_for(64, 100_000)
    with Server(f"{folder}/most", *flags) as server:
        most = await tokens_per_second(server, streams, 3000)
    pace = most / 2 / streams
    with Server(f"{folder}/half", *flags, "--engine.fake.tokens_per_second", str(pace)) as server:
        tokens = int(pace * seconds)
        some = [await opened(server.port, "/generate_stream", asked(tokens, f"l{n}")) for n in range(streams)]
        await asyncio.gather(*(asyncio.create_task(stream.follow()) for stream in some))
    behind: list[float] = []
    for stream in some:
        origin = min(at - number / pace for number, at in enumerate(stream.times))
        behind += [at - number / pace - origin for number, at in enumerate(stream.times)]
    behind.sort()
    return {
        "most_tokens_s": round(most),
        "at_tokens_s": round(pace * streams),
        "late_ms_p50": round(1000 * behind[len(behind) // 2], 2),
        "late_ms_p99": round(1000 * behind[len(behind) * 99 // 100], 2),
    }


def large_schema(number: int) -> dict[str, Any]:
    draw, properties = random.Random(number), {}
    while len(json.dumps(properties)) < 20_000:
        name = "".join(draw.choices(CHARACTERS, k=12))
        properties[name] = {"type": "object", "properties": {"a": {"type": "integer"}, "b": {"enum": [name, "x"]}}}
    return {"type": "object", "properties": properties, "required": list(properties)}


async def compile_(server: Server, seconds: float) -> dict[str, Any]:
    schemas = [json.dumps(large_schema(number)) for number in range(int(4 * seconds))]  # not while it clocks
    bodies = [
        f'{{"prompt": "x", "max_tokens": 1, "response_format": {{"type": "json_schema", '
        f'"json_schema": {{"name": "x", "schema": {schema}}}}}}}'
        for schema in schemas
    ]
    some = [await opened(server.port, "/generate_stream", asked(200_000, f"c{n}")) for n in range(4)]
    async with following(some):
        await asyncio.sleep(seconds / 2)
        marks = [len(stream.times) for stream in some]
        before = max(map(longest_gap, some))
        for stream, mark in zip(some, marks, strict=True):
            del stream.times[: mark - 1]
        compiled, deadline = 0, time.monotonic() + seconds / 2
        while time.monotonic() < deadline:
            stream = await opened(server.port, "/v1/completions", bodies[compiled])
            await stream.follow()
            if stream.status != 200:
                raise SystemExit(f"status {stream.status}")
            compiled += 1
        return {
            "schemas": compiled,
            "longest_gaps_ms": [
                round(1000 * gap, 1) for gap in sorted((gap for one in some for gap in gaps(one)), reverse=True)[:8]
            ],
            "before_ms": round(1000 * before, 1),
        }


def flags_for(rows: int, tokens: int) -> list[str]:
    return [
        *("--running_max_req_size", str(rows), "--max_total_token_num", str(rows * (tokens + 64))),
        *("--max_req_input_len", "63", "--max_req_total_len", str(tokens + 64)),
        *("--http.max_queue", "4000", "--http.fair_admission=false", "--http.max_connections", "4000"),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--what", default="idle,churn,late,compile")
    parser.add_argument("--seconds", type=float, default=60.0)
    given = parser.parse_args()
    runner = asyncio.Runner(loop_factory=uvloop.new_event_loop)
    with tempfile.TemporaryDirectory() as folder, runner:
        for what in given.what.split(","):
            pace = ["--engine.fake.tokens_per_second"]
            if what == "late":
                told = runner.run(late(folder, min(given.seconds, 20)))
            else:
                work, flags = {
                    "idle": (idle, [*flags_for(ACTIVE, 4000), *pace, str(PACE)]),
                    "churn": (churn, [*flags_for(ACTIVE, 1000), *pace, str(PACE)]),
                    "compile": (compile_, [*flags_for(8, 200_000), *pace, "1000"]),
                }[what]
                with Server(f"{folder}/{what}", *flags) as server:
                    told = runner.run(work(server, given.seconds))
            print(json.dumps({"what": what, **told}), flush=True)


if __name__ == "__main__":
    main()

"""Two engines side by side, the fake one with a pace: throughput beside one engine's, and what the routing by cached
prefix finds in their prompt caches beside round robin.

``python tests/bench/replicas.py [--seconds 20] [--rounds 3]``

Throughput: 64 clients that each send their next request when they have the last answer; an engine runs 8
sequences at a time at 10 tokens per second each, so that 80 tokens/s is all that one can give. The goal is 1.95
times as many with two.

Prefixes: 24 conversations whose prompts begin with 512 tokens of their own, asked in random order; an engine has KV
slots for about 14 of them. *prefix*: one daemon with two engines and two api workers, which know nothing of each
other's prompts. *round robin*: two daemons with one engine each, of the same size, asked in turn.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import Daemon, wait_for

CLIENTS = 64
TOKENS = 20  # of each answer
PACED = ("--engine.fake.tokens_per_second", "10", "--running_max_req_size", "8")
CACHED = ("--use_dynamic_prompt_cache", "true", "--max_total_token_num", "8000", "--http.workers", "2")
FAMILIES, PREFIX, QUESTIONS = 24, 512, 600


def serving(daemon: Daemon) -> bool:
    """Every engine of it is up."""
    engines = daemon.workers("engine")
    return bool(engines) and all(one["state"] == "running" and one["phase"] == "ready" for one in engines)


async def ask(client: httpx.AsyncClient, url: str, prompt: str, tokens: int) -> int:
    """Tokens of the answer."""
    body = {"inputs": prompt, "parameters": {"max_new_tokens": tokens, "ignore_eos": True}}
    answer = await client.post(f"{url}/generate", json=body)
    answer.raise_for_status()
    return int(answer.json()["count_output_tokens"])


async def throughput(url: str, seconds: float) -> float:
    """Tokens per second of answers that came in the last `seconds`, after one answer of each client."""
    begin = end = 0.0
    tokens = 0

    async def one(client: httpx.AsyncClient, number: int) -> None:
        nonlocal tokens
        turn = 0
        while time.monotonic() < end:
            got = await ask(client, url, f"client {number}, question {turn}", TOKENS)
            turn += 1
            if begin <= time.monotonic() < end:
                tokens += got

    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(timeout=300, limits=limits, trust_env=False) as client:
        begin = time.monotonic() + 2 * CLIENTS * TOKENS / 80 / 2
        end = begin + seconds
        await asyncio.gather(*(one(client, number) for number in range(CLIENTS)))
    return tokens / seconds


async def prefixes(urls: Sequence[str]) -> None:
    """Asks all questions, in turn where there are several daemons, 8 at a time."""
    draw = random.Random(7)
    heads = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=PREFIX)) for _ in range(FAMILIES)]
    questions = iter(enumerate(f"{draw.choice(heads)} question {number}" for number in range(QUESTIONS)))
    async with httpx.AsyncClient(timeout=300, trust_env=False) as client:

        async def some() -> None:
            for number, prompt in questions:
                await ask(client, urls[number % len(urls)], prompt, 4)

        await asyncio.gather(*(some() for _ in range(8)))


def hits(daemons: Sequence[Daemon]) -> float:
    """The share of prompt tokens that was found, over all engines."""
    caches = [daemon.status()["cache"] for daemon in daemons]
    return sum(one["hit_tokens"] for one in caches) / sum(one["lookup_tokens"] for one in caches)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement of throughput")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, rates = Path(name), {}
        for replicas in (1, 2):
            with Daemon(folder / f"paced-{replicas}", *PACED, "--engine.replicas", str(replicas)).start() as daemon:
                wait_for(lambda daemon=daemon: serving(daemon))
                found = [asyncio.run(throughput(daemon.url, options.seconds)) for _ in range(options.rounds)]
                rates[replicas] = statistics.median(found)
                shown = ", ".join(f"{rate:.1f}" for rate in found)
                print(f"replicas = {replicas}: {rates[replicas]:.1f} tokens/s (rounds: {shown})", flush=True)
        print(f"throughput: {rates[2] / rates[1]:.3f} times one engine's", flush=True)
        with Daemon(folder / "prefix", *CACHED, "--engine.replicas", "2").start() as daemon:
            wait_for(lambda: serving(daemon))
            asyncio.run(prefixes([daemon.url]))
            time.sleep(1)  # heartbeats
            print(f"prefix: {hits([daemon]):.1%} of prompt tokens found in the prompt caches", flush=True)
        with ExitStack() as stack:
            daemons = [stack.enter_context(Daemon(folder / f"turn-{n}", *CACHED).start()) for n in range(2)]
            asyncio.run(prefixes([daemon.url for daemon in daemons]))
            time.sleep(1)
            print(f"round robin: {hits(daemons):.1%}", flush=True)


if __name__ == "__main__":
    main()

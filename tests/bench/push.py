"""Whether a Pushgateway that is gone or silent changes anything for clients: ``python tests/bench/push.py``.

The daemon with the fake engine under a closed loop of streams, in phases: the gateway takes what is pushed, is down,
takes it again, accepts connections and says nothing. What is printed of each: requests, failed ones, and percentiles of
the time to the first token, of the gaps between tokens and of whole requests.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))
from gateway_stand_in import Gateway
from harness import Daemon, generate_stream

TOKENS = 40


@dataclass
class Phase:
    """Seconds of each request that began in it."""

    name: str
    first: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    whole: list[float] = field(default_factory=list)
    failed: int = 0
    pushes: int = 0


class Clients:
    """A closed loop: each asks again when it has its answer."""

    def __init__(self, url: str, count: int) -> None:
        self.url, self.count = url, count
        self.phase = Phase("warm-up")
        self.over = False

    async def run(self) -> None:
        async with httpx.AsyncClient(timeout=60, limits=httpx.Limits(max_connections=self.count)) as client:
            await asyncio.gather(*(self._one(client, number) for number in range(self.count)))

    async def _one(self, client: httpx.AsyncClient, number: int) -> None:
        while not self.over:
            phase, times = self.phase, [time.perf_counter()]
            try:
                prompt = f"question {number}"
                await generate_stream(client, self.url, prompt, TOKENS, lambda: times.append(time.perf_counter()))  # noqa: B023
            except (AssertionError, httpx.HTTPError) as failure:
                print(f"failed: {failure}")
                phase.failed += 1
                continue
            phase.first.append(times[1] - times[0])
            phase.gaps += [later - before for before, later in itertools.pairwise(times[1:])]
            phase.whole.append(times[-1] - times[0])


def row(phase: Phase) -> str:
    cells = [f"{phase.name:10}", f"{len(phase.whole):8}", f"{phase.failed:6}", f"{phase.pushes:6}"]
    for values in (phase.first, phase.gaps, phase.whole):
        percent = statistics.quantiles(values, n=100)
        cells.append(f"{percent[49] * 1e3:7.1f} / {percent[98] * 1e3:7.1f}")
    return "  ".join(cells)


async def measure(daemon: Daemon, port: int, names: list[str], seconds: float, clients: int) -> list[Phase]:
    load = Clients(daemon.url, clients)
    running = asyncio.ensure_future(load.run())
    with Gateway(port=port) as gateway:
        while gateway.pushes.empty():
            await asyncio.sleep(1)
    phases = []
    for name in names:
        phase = Phase(name)
        if name == "down":
            load.phase = phase
            await asyncio.sleep(seconds)
        else:
            with Gateway(port=port) as gateway:
                gateway.behaviour = "silent" if name == "silent" else 200
                load.phase = phase
                await asyncio.sleep(seconds)
                phase.pushes = gateway.pushes.qsize()
                load.phase = Phase("between")
        phases.append(phase)
    load.over = True
    await running
    return phases


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of each phase")
    parser.add_argument("--phases", nargs="+", default=["taken", "down", "taken", "silent"], help="in this order")
    parser.add_argument("--clients", type=int, default=16)
    options = parser.parse_args()
    with Gateway() as once:
        port = once.port
    flags = ("--metric_gateway", f"127.0.0.1:{port}", "--push_interval", "1")
    with (
        tempfile.TemporaryDirectory() as folder,
        Daemon(Path(folder), *flags, "--engine.fake.tokens_per_second", "100") as daemon,
    ):
        phases = asyncio.run(measure(daemon, port, options.phases, options.seconds, options.clients))
        push, requests = daemon.status()["push"], daemon.status()["requests"]
    print(f"{'gateway':10}  requests  failed  pushes  first (ms) p50/p99   gap (ms) p50/p99     whole (ms) p50/p99")
    for phase in phases:
        print(row(phase))
    print(f"pushes {push['pushes']}, of which {push['failures']} failed; requests {requests}")


if __name__ == "__main__":
    main()

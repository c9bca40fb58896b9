"""What a daemon on a GPU survives: kills of its engine under streams, and minutes of saturation with random aborts.

``python tests/bench/endurance.py --model DIR [--what kills,soak] [--streams 64] [--kills 3] [--seconds 180] -- FLAGS``

*kills*: so many streams; `kill -9` of the engine at a time when all run; seconds until it is ready again, and whether
every stream got every token that it asked for. *soak*: as many requests as `--streams` at a time, a third of them given
up by their client at a random moment; memory of the host's processes and of the card every few seconds, and whether all
slots are free at the end. Prompts are token ids, so a model of random weights will do (FLAGS: ``--load_way DUMMY``).
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import psutil
import uvloop

from harness import Daemon, wait_for
from lightllmctl.answer import Record
from lightllmctl.load import Generator, Planned, Share, run_share

SAMPLE = 5.0  # seconds between two looks at the memory
GIVEN_UP = 1 / 3  # share of the soak's requests that their client gives up


def card_memory() -> int:
    """MB in use on the first GPU."""
    command = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0])


def host_memory(daemon: Daemon) -> dict[str, int]:
    """MB resident, by kind of process."""
    found = {"supervisor": psutil.Process(daemon.process.pid).memory_info().rss}
    for worker in daemon.status()["workers"]:
        if worker["pid"]:
            rss = psutil.Process(worker["pid"]).memory_info().rss
            found[worker["kind"]] = found.get(worker["kind"], 0) + rss
    return {kind: size >> 20 for kind, size in found.items()}


def planned(draw: random.Random, tokens: int, vocabulary: int) -> Planned:
    ids = draw.choices(range(vocabulary), k=draw.randint(16, 512))
    body = {"model": "any", "prompt": ids, "max_tokens": tokens, "temperature": 0, "ignore_eos": True, "stream": True}
    body["stream_options"] = {"include_usage": True}
    return Planned(json.dumps(body).encode(), tokens)


def share_of(daemon: Daemon, requests: list[Planned], concurrency: int, timeout: float) -> Share:
    return Share("127.0.0.1", daemon.port, False, "/v1/completions", {}, requests, concurrency, timeout)


def kills(daemon: Daemon, arguments: argparse.Namespace) -> dict[str, object]:
    draw = random.Random(3)
    before, ready = card_memory(), []
    requests = [planned(draw, arguments.tokens, arguments.vocabulary) for _ in range(arguments.streams)]
    records: list[Record] = []
    clients = threading.Thread(target=lambda: records.extend(run_share(share, time.monotonic())))
    share = share_of(daemon, requests, arguments.streams, 600)
    clients.start()
    for _ in range(arguments.kills):
        wait_for(lambda: daemon.status()["requests"]["running"] >= arguments.streams, what="all streams to run")
        time.sleep(0.5)  # some tokens on the way, the moment itself does not matter
        generation, begun = daemon.status()["generation"], time.monotonic()
        daemon.kill("engine")
        wait_for(lambda old=generation: daemon.status()["generation"] != old, what="another generation")
        daemon.wait_ready()
        ready.append(round(time.monotonic() - begun, 2))
        print("ready again after", ready[-1], "s", flush=True)
    clients.join()
    whole = sum(not record.failure and record.tokens == record.asked for record in records)
    failures = sorted({f"{record.failure}: {record.detail}" for record in records if record.failure})
    return {
        "what": "kills",
        "streams": len(records),
        "whole": whole,
        "failures": failures,
        "ready_after_s": ready,
        "card_MB_before_and_after": [before, card_memory()],
    }


class Impatient(Generator):
    """Goes on until `deadline` (monotonic seconds); gives some requests up."""

    def __init__(self, share: Share, deadline: float, draw: random.Random) -> None:
        super().__init__(share)
        self._deadline, self._draw = deadline, draw
        self.given_up = 0

    async def _lane(self, line: Iterator[tuple[Planned, Record]]) -> None:
        for request, record in line:
            if time.monotonic() > self._deadline:
                return
            record.start = time.monotonic()
            patience = self._draw.uniform(0.0, 6.0) if self._draw.random() < GIVEN_UP else 600.0
            try:
                async with asyncio.timeout(patience):
                    await self._make(request, record)
            except TimeoutError:
                self.given_up += 1


def soak(daemon: Daemon, arguments: argparse.Namespace) -> dict[str, object]:
    draw = random.Random(5)
    requests = [planned(draw, draw.randint(16, 512), arguments.vocabulary) for _ in range(100 * arguments.streams)]
    deadline = time.monotonic() + arguments.seconds
    client = Impatient(share_of(daemon, requests, arguments.streams, 600), deadline, draw)
    records: list[Record] = []

    def work() -> None:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            records.extend(runner.run(client.run(time.monotonic())))

    clients, samples = threading.Thread(target=work), []
    clients.start()
    begun = time.monotonic()
    while clients.is_alive():
        clients.join(SAMPLE)
        samples.append({"s": round(time.monotonic() - begun), "card": card_memory(), **host_memory(daemon)})
        print(samples[-1], flush=True)
    wait_for(lambda: daemon.status()["requests"]["running"] == 0, what="the end of all requests")
    status = wait_for(lambda: not (now := daemon.status())["model"]["kv_slots_used"] and now, what="free slots")
    done = [record for record in records if record.end]
    late = samples[len(samples) // 3 :]
    return {
        "what": "soak",
        "seconds": round(time.monotonic() - begun),
        "requests": len(done),
        "given_up": client.given_up,
        "tokens": sum(record.tokens or len(record.times) for record in records),
        "failures": sorted({f"{record.failure}: {record.detail}" for record in done if record.failure}),
        "growth_MB": {key: late[-1][key] - late[0][key] for key in late[0] if key != "s"},
        "kv_slots_used_and_total": [status["model"]["kv_slots_used"], status["model"]["kv_slots_total"]],
        "engine_restarts": [worker["restarts"] for worker in status["workers"] if worker["kind"] == "engine"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--what", default="kills,soak")
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=1500, help="new tokens of each stream under kills")
    parser.add_argument("--seconds", type=float, default=180)
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("flags", nargs="*", help="of the daemon")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        begun = time.monotonic()
        flags = ["--model_dir", arguments.model, *arguments.flags]
        with Daemon(Path(folder), *flags, fake=False) as daemon:
            print("RESULT", json.dumps({"what": "start", "ready_s": round(time.monotonic() - begun, 2)}), flush=True)
            for name in arguments.what.split(","):
                report = {"kills": kills, "soak": soak}[name](daemon, arguments)
                print("RESULT", json.dumps(report), flush=True)
            print(daemon.log_text()[-3000:])
        time.sleep(1)
        print("card after the end:", card_memory(), "MB")


if __name__ == "__main__":
    main()

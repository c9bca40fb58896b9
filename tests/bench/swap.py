"""What a swap and a live reload cost, on any device, while clients send requests all the time.

``python tests/bench/swap.py [--model DIR --to DIR] [--how auto|beside|after] [--swaps 4] [--clients 8] -- FLAGS``

*swap*: back and forth between two models: seconds from the command to the first token of the new one as a client sees
it, the phases that the job tells, the longest time in which no client got a token, and every request that failed.
*reload*: of a live setting, on the control socket, with no other load.

Prompts are token ids, so models of random weights will do: ``-- --load_way DUMMY``, or files of `write_model.py`.
Without ``--to``: the same files at another path. Without ``--model``: the demo model and a twin, as bf16 safetensors,
written here.
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import random
import statistics
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent.parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

import httpx

from closed_loop import client, ctl, jobs_of
from config_file import Settings, daemon_of_a_file
from harness import Daemon, stream_frames, wait_for
from lightllmd.errors import CTL_DONE
from lightllmd.weights.read_ahead import ReadAhead
from swap_models import write_demo_models

NAMES = ("first", "second")
READY = 300.0  # seconds, longest start of the daemon
SWAP = 300.0  # seconds, longest swap
SPARE = 60.0  # seconds that a spare process is waited for
RELOADS = 30


@dataclass(frozen=True)
class Seen:
    """A token as its client got it."""

    at: float  # monotonic seconds
    sent: float  # when its request was
    model: str  # as the answer names it


class Traffic:
    """Clients that stream one completion after the other, in a thread of their own."""

    def __init__(self, url: str, clients: int, tokens: int, prompt: int, vocabulary: int) -> None:
        self._url, self._clients = f"{url}/v1/completions", clients
        self._tokens, self._prompt, self._vocabulary = tokens, prompt, vocabulary
        self.seen: list[Seen] = []
        self.failures: list[str] = []
        self.requests = 0
        self._over = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._all()))

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *failure: object) -> None:
        self._over.set()
        self._thread.join()

    async def _all(self) -> None:
        await asyncio.gather(*(self._one(random.Random(number)) for number in range(self._clients)))

    async def _one(self, draw: random.Random) -> None:
        async with client() as mine:
            while not self._over.is_set():
                ids = draw.choices(range(self._vocabulary), k=self._prompt)
                body = {"prompt": ids, "max_tokens": self._tokens, "temperature": 0, "ignore_eos": True, "stream": True}
                sent, finished = time.monotonic(), False
                try:
                    async for frame in stream_frames(mine, self._url, body):
                        if "choices" not in frame:
                            raise AssertionError(f"error frame: {frame}")
                        self.seen.append(Seen(time.monotonic(), sent, frame["model"]))
                        finished = finished or any(choice["finish_reason"] == "length" for choice in frame["choices"])
                    if not finished:
                        raise AssertionError("the stream ended unfinished")
                except (AssertionError, httpx.HTTPError) as failure:
                    self.failures.append(f"{type(failure).__name__}: {failure}"[:200])
                    await asyncio.sleep(0.1)
                self.requests += 1

    def first_of(self, model: str, after: float, timeout: float) -> Seen:
        """The first token of `model` that came after that moment."""
        late, begin = time.monotonic() + timeout, 0
        while True:
            upto = len(self.seen)
            for one in self.seen[begin:upto]:
                if one.at >= after and one.model == model:
                    return one
            begin = upto
            if time.monotonic() > late:
                raise AssertionError(f"no token of {model} within {timeout:g} s; failures: {self.failures[-3:]}")
            time.sleep(0.002)

    def longest_gap(self, begin: float, end: float) -> float:
        """Seconds of those between the two moments in which no client got a token."""
        moments = sorted([begin, end, *(one.at for one in self.seen if begin <= one.at <= end)])
        return max(later - earlier for earlier, later in itertools.pairwise(moments))


def swap(daemon: Daemon, target: str, traffic: Traffic) -> dict[str, object]:
    refused = len(traffic.failures)
    begun = time.monotonic()
    done = ctl(daemon, "swap", target, timeout=SWAP)
    if done.code != CTL_DONE:
        return {"what": "swap", "to": target, "exit": done.code, "said": done.errors.strip()}
    first = traffic.first_of(target, begun, timeout=60)
    traffic.first_of(target, done.returned, timeout=60)  # so that the gap's end is known
    job = jobs_of(daemon)[-1]
    return {
        "what": "swap",
        "to": target,
        "how": job["details"]["how"],
        "command_to_first_token_s": round(first.at - begun, 2),
        "command_to_return_s": round(done.returned - begun, 2),
        "job_to_end_s": round(job["ended"] - job["started"], 2),
        "phases_s": dict(job["details"]["phases"]),
        "longest_gap_s": round(traffic.longest_gap(begun, time.monotonic()), 2),
        "failed": traffic.failures[refused:],
    }


def swaps(daemon: Daemon, arguments: argparse.Namespace) -> None:
    with Traffic(daemon.url, arguments.clients, arguments.tokens, arguments.prompt, arguments.vocabulary) as traffic:
        traffic.first_of(NAMES[0], 0.0, timeout=60)
        results = []
        for turn in range(arguments.swaps):
            spare = _spare(daemon)
            result = swap(daemon, NAMES[(turn + 1) % 2], traffic) | {"spare": spare}
            print("RESULT", json.dumps(result), flush=True)
            results.append(result.get("command_to_first_token_s"))
            time.sleep(arguments.pause)
    taken = [result for result in results if result is not None]
    report = {
        "what": "swaps",
        "clients": arguments.clients,
        "requests": traffic.requests,
        "failed": len(traffic.failures),
        "median_command_to_first_token_s": statistics.median(taken) if taken else None,
        "most_s": max(taken, default=None),
    }
    print("RESULT", json.dumps(report), flush=True)


def _spare(daemon: Daemon) -> bool:
    """Whether there is one that has done all that it can beforehand."""
    late = time.monotonic() + SPARE
    while not any(worker["phase"] == "ready" for worker in daemon.workers("spare")):
        if time.monotonic() > late:
            return False
        time.sleep(0.1)
    return True


def reloads(daemon: Daemon, settings: Settings) -> None:
    taken = []
    for turn in range(RELOADS):
        settings.write({"supervisor.memory_timeout": 31 + turn})
        taken.append(reload_seconds(daemon))
    settings.write({})
    reload_seconds(daemon)
    report = {"what": "live reload", "median_ms": 1e3 * statistics.median(taken), "most_ms": 1e3 * max(taken)}
    print("RESULT", json.dumps({key: round(v, 1) if isinstance(v, float) else v for key, v in report.items()}))


def reload_seconds(daemon: Daemon) -> float:
    """From the request on the control socket to the end of its job."""
    with daemon.control_client() as control:
        begun = time.monotonic()
        job = control.post("/v1/reload", json={}).json()
        lines = control.get(f"/v1/jobs/{job['id']}").text.split("\n")
        taken = time.monotonic() - begun
    last = json.loads([line for line in lines if line.strip()][-1])
    if last["outcome"] != "done":
        raise AssertionError(last["message"])
    return taken


def measure(folder: Path, models: tuple[Path, Path], arguments: argparse.Namespace) -> None:
    for model in set(models):
        ReadAhead([str(file) for file in sorted(model.glob("*.safetensors"))]).wait()
    tables: dict[str, Any] = {f"models.{name}.model_dir": str(model) for name, model in zip(NAMES, models, strict=True)}
    base = {"model_dir": str(models[0]), "http.served_model_name": NAMES[0], "supervisor.swap": arguments.how}
    daemon, settings = daemon_of_a_file(folder, base | tables)
    daemon.command += arguments.flags
    begun = time.monotonic()
    with daemon.start(ready=False):
        daemon.wait_ready(READY)
        print("RESULT", json.dumps({"what": "start", "ready_s": round(time.monotonic() - begun, 2)}), flush=True)
        for name in arguments.what.split(","):
            {"reload": lambda: reloads(daemon, settings), "swap": lambda: swaps(daemon, arguments)}[name]()
        wait_for(lambda: daemon.status()["requests"]["in_flight"] == 0, what="the end of all requests")
        print(daemon.log_text()[-4000:])


def linked(model: Path, folder: Path) -> Path:
    """The same files at another path: for the daemon that is another model, whose requests can't be carried over."""
    folder.mkdir()
    for file in model.iterdir():
        (folder / file.name).symlink_to(file)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path)
    parser.add_argument("--to", type=Path)
    parser.add_argument("--what", default="reload,swap")
    parser.add_argument("--how", default="auto", choices=["auto", "beside", "after"])
    parser.add_argument("--swaps", type=int, default=4)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of each request")
    parser.add_argument("--prompt", type=int, default=32, help="prompt tokens of each request")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two swaps")
    parser.add_argument("flags", nargs="*", help="of the daemon")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        if arguments.model is None:
            models = write_demo_models(Path(folder) / "models")
        else:
            first = arguments.model.absolute()
            models = (first, arguments.to.absolute() if arguments.to else linked(first, Path(folder) / "second"))
        measure(Path(folder) / "daemon", models, arguments)


if __name__ == "__main__":
    main()

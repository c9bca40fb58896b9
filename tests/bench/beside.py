"""Who is served while somebody attacks: one stream and one prober of /liveness, in a process of their own."""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import socket
import statistics
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

PROBE_EVERY = 0.02  # seconds
PATIENCE = 10.0  # seconds that a probe or the stream waits for bytes


@dataclass
class Seen:
    """What the two saw. Times in seconds."""

    probes: list[float] = field(default_factory=list)  # from connect to the whole answer
    gaps: list[float] = field(default_factory=list)  # between two reads of the stream that brought tokens
    faults: list[str] = field(default_factory=list)

    @property
    def probe_p99(self) -> float:
        if len(self.probes) < 2:
            return float("inf")
        return statistics.quantiles(self.probes, n=100, method="inclusive")[98]

    @property
    def longest_gap(self) -> float:
        return max(self.gaps, default=float("inf"))

    def __str__(self) -> str:
        shown = f"/liveness p99 {1e3 * self.probe_p99:.0f} ms ({len(self.probes)} probes), "
        shown += f"longest pause of a stream {1e3 * self.longest_gap:.0f} ms ({len(self.gaps)} frames)"
        return shown + (f", {len(self.faults)} FAULTS: {self.faults[0]}" if self.faults else "")


def _answer(host: str, port: int, request: bytes) -> bytes:
    with socket.create_connection((host, port), PATIENCE) as sock:
        sock.settimeout(PATIENCE)
        sock.sendall(request)
        parts = []
        while part := sock.recv(65536):
            parts.append(part)
        return b"".join(parts)


def _probe(host: str, port: int, over: threading.Event, seen: Seen) -> None:
    request = b"GET /liveness HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"
    while not over.is_set():
        begun = time.perf_counter()
        try:
            answer = _answer(host, port, request)
            if not answer.startswith(b"HTTP/1.1 200 "):
                seen.faults.append(f"/liveness answered {answer[:60]!r}")
        except OSError as failure:
            seen.faults.append(f"/liveness: {failure}")
        seen.probes.append(time.perf_counter() - begun)
        over.wait(PROBE_EVERY)


def _stream(host: str, port: int, headers: str, over: threading.Event, begun: threading.Event, seen: Seen) -> None:
    """One stream after the other; a pause is between two frames of one of them."""
    parameters = {"max_new_tokens": 1000, "ignore_eos": True}
    body = json.dumps({"inputs": "Once upon a time", "parameters": parameters}).encode()
    lines = f"POST /generate_stream HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{headers}"
    request = f"{lines}Content-Length: {len(body)}\r\n\r\n".encode() + body
    while not over.is_set():
        try:
            with socket.create_connection((host, port), PATIENCE) as sock:
                sock.settimeout(PATIENCE)
                sock.sendall(request)
                last = None
                while not over.is_set():
                    part = sock.recv(65536)
                    if not part:
                        break
                    now = time.perf_counter()
                    if b"data:" in part:
                        if last is not None:
                            seen.gaps.append(now - last)
                        last = now
                        begun.set()
                    elif last is None and not part.startswith(b"HTTP/1.1 200 "):
                        seen.faults.append(f"the stream: {part[:60]!r}")
                        over.wait(1)
                        break
        except OSError as failure:
            seen.faults.append(f"the stream: {failure}")
            over.wait(1)


def _run(host: str, port: int, headers: str, pipe: Connection) -> None:
    seen, over, begun = Seen(), threading.Event(), threading.Event()
    threads = [
        threading.Thread(target=_probe, args=(host, port, over, seen)),
        threading.Thread(target=_stream, args=(host, port, headers, over, begun, seen)),
    ]
    for thread in threads:
        thread.start()
    begun.wait(60)
    seen.probes.clear()  # of the time before the first token
    pipe.send(None)
    pipe.recv()
    over.set()
    for thread in threads:
        thread.join(2 * PATIENCE)
    pipe.send(seen)


@contextlib.contextmanager
def beside(host: str, port: int, headers: str = "") -> Iterator[Seen]:
    """Runs the two as long as the block; what they saw is filled in at its end. `headers`: such as a key, with CRLF."""
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_run, args=(host, port, headers, theirs), daemon=True)
    process.start()
    seen = Seen()
    ours.recv()
    try:
        yield seen
    finally:
        ours.send(None)
        found = ours.recv() if ours.poll(3 * PATIENCE) else Seen(faults=["the prober said nothing"])
        seen.probes, seen.gaps, seen.faults = found.probes, found.gaps, found.faults
        process.join(5)
        process.kill()

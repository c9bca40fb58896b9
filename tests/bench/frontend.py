"""Tokens per second through the whole front end, beside a bare uvicorn loop on the same machine in the same run.

``python tests/bench/frontend.py [--streams 64] [--tokens 10000] [--rounds 3] [--tools] [--pace N] [--profile FILE]``

*ours*: a daemon with the fake engine (supervisor, api worker, engine), /generate_stream, one SSE frame per token.
*bare*: uvicorn (uvloop, httptools) with an ASGI callable that sends frames of the same length, ready-made, one per
`send`, in a loop. Both are read by the same client: raw sockets, epoll, frames counted and nothing decoded.
The goal is a ratio of at least 300 %. It may exceed 100 %: tokens that wait for the same stream leave in one `send`.
With ``--pace`` they don't wait, and the CPU shares show what a token costs that is sent alone.
``--tools``: ours are chats with a tool, whose text a parser reads; the goal is 150 %.
"""

from __future__ import annotations

import argparse
import json
import selectors
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).parent.parent))

from harness import Daemon, free_port, wait_for

FRAME = (
    b'data:{"token":{"id":101,"text":"e","logprob":0.0,"special":false,"count_output_tokens":1000,"prompt_tokens":24},'
    b'"generated_text":null,"finished":false,"finish_reason":null,"details":null}\n\n'
)
PROMPT = "a prompt of 24 bytes, %02d"


@dataclass
class Round:
    tokens: int
    seconds: float
    shares: dict[str, float] = field(default_factory=dict)  # CPU seconds per second, by process

    @property
    def rate(self) -> float:
        return self.tokens / self.seconds


TOOL = {"type": "function", "function": {"name": "look", "parameters": {"type": "object", "properties": {}}}}


def generate(number: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """Route and body of a stream that has a frame for each token."""
    return "/generate_stream", {
        "inputs": PROMPT % number,
        "parameters": {"max_new_tokens": tokens, "ignore_eos": True},
    }


def chat(number: int, tokens: int) -> tuple[str, dict[str, Any]]:
    """The same of a chat with a tool; tokens that came together share a frame, and the last frame counts them."""
    return "/v1/chat/completions", {
        "messages": [{"role": "user", "content": PROMPT % number}],
        "tools": [TOOL],
        "max_tokens": tokens,
        "ignore_eos": True,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


Ask = Callable[[int, int], tuple[str, dict[str, Any]]]


def count_tokens(port: int, streams: int, tokens: int, ask: Ask) -> tuple[int, float]:
    """Opens the streams at once and reads them to their ends. (tokens, seconds)."""
    begun, frames = time.perf_counter(), 0
    selector = selectors.DefaultSelector()
    tails: dict[socket.socket, bytes] = {}
    for number in range(streams):
        path, fields = ask(number, tokens)
        body = json.dumps(fields).encode()
        sock = socket.create_connection(("127.0.0.1", port))
        sock.sendall(
            b"POST %b HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%b"
            % (path.encode(), len(body), body)
        )
        selector.register(sock, selectors.EVENT_READ)
        tails[sock] = b""
    counted = b'"completion_tokens":%d,' % tokens
    while tails:
        for key, _ in selector.select():
            sock = key.fileobj
            data = sock.recv(1 << 18)
            if data:
                if ask is generate:
                    data = tails[sock] + data
                    frames += data.count(b"data:")
                    tails[sock] = data[-4:] if data[-5:] != b"data:" else b""
                else:
                    tails[sock] = (tails[sock] + data)[-512:]
            else:
                frames += tokens * (counted in tails[sock])
                selector.unregister(sock)
                del tails[sock]
                sock.close()
    return frames, time.perf_counter() - begun


def measure(port: int, streams: int, tokens: int, processes: dict[str, psutil.Process], ask: Ask = generate) -> Round:
    processes = processes | {"client": psutil.Process()}
    before = {name: sum(process.cpu_times()[:2]) for name, process in processes.items()}
    frames, seconds = count_tokens(port, streams, tokens, ask)
    if frames != streams * tokens:
        raise SystemExit(f"{frames} tokens came, not {streams * tokens}")
    shares = {name: (sum(p.cpu_times()[:2]) - before[name]) / seconds for name, p in processes.items()}
    return Round(frames, seconds, shares)


def serve_bare(port: int, tokens: int) -> None:
    import uvicorn

    async def app(scope, receive, send):
        while (await receive()).get("more_body"):
            pass
        headers = [(b"content-type", b"text/event-stream; charset=utf-8")]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for _ in range(tokens):
            await send({"type": "http.response.body", "body": FRAME, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    uvicorn.run(
        app, port=port, loop="uvloop", http="httptools", ws="none", lifespan="off", log_level="error", access_log=False
    )


def accepts(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class Profile:
    """py-spy beside the api worker; reports where it spent its time."""

    def __init__(self, pid: int, path: Path) -> None:
        self.path = path
        command = ["py-spy", "record", "--pid", str(pid), "--format", "raw", "--rate", "500", "--duration", "3600"]
        self.process = subprocess.Popen([*command, "--output", str(path)], stdout=subprocess.DEVNULL)
        time.sleep(1.0)  # py-spy says nothing when it has attached

    def finish(self) -> None:
        self.process.send_signal(2)
        self.process.wait(60)
        own, inclusive, total = Counter[str](), Counter[str](), 0
        for line in self.path.read_text().splitlines():
            stack, _, samples = line.rpartition(" ")
            frames = [frame.rpartition(":")[0] or frame for frame in stack.split(";")]
            own[frames[-1]] += int(samples)
            inclusive.update(dict.fromkeys(frames, int(samples)))
            total += int(samples)
        for title, counts in (("own", own), ("with callees", inclusive)):
            print(f"\n  time of the api worker, {title}")
            for frame, samples in counts.most_common(18):
                print(f"  {samples / total:6.1%}  {frame}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tools", action="store_true", help="chats with a tool, so that a parser reads what they say")
    parser.add_argument("--pace", type=float, default=0.0, help="tokens per second of each stream; 0: all that goes")
    parser.add_argument("--profile", type=Path, help="raw py-spy samples of the api worker go here")
    parser.add_argument("--serve-bare", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.serve_bare:
        serve_bare(options.serve_bare, options.tokens)
        return
    port = free_port()
    bare = subprocess.Popen([sys.executable, __file__, "--serve-bare", str(port), "--tokens", str(options.tokens)])
    slots = options.streams * (options.tokens + 2048)
    flags = ["--max_total_token_num", str(slots), "--max_req_total_len", str(options.tokens + 2048)]
    ask, goal = (chat, 150) if options.tools else (generate, 300)
    flags += ["--max_req_input_len", "1024", "--engine.fake.tokens_per_second", str(options.pace)]
    ours: list[Round] = []
    theirs: list[Round] = []
    try:
        with tempfile.TemporaryDirectory() as folder, Daemon(Path(folder), *flags) as daemon:
            wait_for(lambda: accepts(port), what="the bare server")
            processes = {
                "supervisor": psutil.Process(daemon.process.pid),
                "api": psutil.Process(daemon.pid("api")),
                "engine": psutil.Process(daemon.pid("engine")),
            }
            measure(daemon.port, options.streams, options.tokens, processes, ask)  # warm
            for number in range(options.rounds):
                theirs.append(measure(port, options.streams, options.tokens, {"uvicorn": psutil.Process(bare.pid)}))
                ours.append(measure(daemon.port, options.streams, options.tokens, processes, ask))
                print(f"round {number + 1}: bare {theirs[-1].rate:9,.0f} tokens/s  ", end="")
                print(f"ours {ours[-1].rate:9,.0f} tokens/s  {ours[-1].rate / theirs[-1].rate:6.1%}", flush=True)
            if options.profile:
                profile = Profile(processes["api"].pid, options.profile)
                for _ in range(options.rounds):
                    measure(daemon.port, options.streams, options.tokens, processes, ask)
                profile.finish()
    finally:
        bare.terminate()
        bare.wait()
    for name, rounds in (("bare", theirs), ("ours", ours)):
        shares = {key: statistics.median(r.shares[key] for r in rounds) for key in rounds[0].shares}
        shown = ", ".join(f"{key} {share:.2f}" for key, share in shares.items())
        print(f"{name}: median {statistics.median(r.rate for r in rounds):,.0f} tokens/s; CPUs used: {shown}")
    if options.pace:
        return
    ratio = statistics.median(r.rate for r in ours) / statistics.median(r.rate for r in theirs)
    print(f"ratio {ratio:.1%} (goal: at least {goal} %)")


if __name__ == "__main__":
    main()

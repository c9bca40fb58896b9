"""What a long prompt does to running streams: their inter-token latencies with and without splitfuse_mode.

``python tests/bench/splitfuse.py --model DIR [--streams 31,32] [--context 512] [--prompt 8192] [--block 256,128]``

Streams decode from prompts of `context` random ids, greedy, ignore_eos. *undisturbed*: `tokens` of each. *beside a
prompt*: from the moment that a prompt of `prompt` ids is submitted until its first token, `repeats` times, with a rest
of `tokens` between. One engine after the other, for every number of streams: for every block of splitfuse_mode, then
without it, which is the stall (`--no-stall` leaves it out).
A latency is the time between two tokens of a stream as the engine's turns return them.

A directory with no weights gets random ones (``--load-way DUMMY``).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

from settings import load_way, settings

from engine import commit_of, numbers, problems_told
from lightllmctl.workload import draw_ids
from lightllmd import LLM
from lightllmd.config.bounds import prefill_budget
from lightllmd.ipc.messages import SamplingParams, Submit

OWNER = (0, 1)
SETTLE = 16  # tokens of each stream before anything is measured
GOAL = 2.0  # p99 beside a prompt with splitfuse_mode, in units of the undisturbed one


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--streams", type=numbers, default=[32], help="how many, with commas")
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--prompt", type=int, default=8192)
    parser.add_argument("--block", type=numbers, default=[256], help="values of splitfuse_block_size, with commas")
    parser.add_argument("--no-stall", action="store_true", help="only with splitfuse_mode")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-way", choices=["HF", "DUMMY"], help="default: DUMMY where there are no weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--commit", default="unknown", help="where there is no git")
    return parser.parse_args()


@dataclass
class Latencies:
    """Seconds."""

    gaps: list[float]
    first: list[float]  # from each prompt's submission to its first token

    def told(self) -> dict[str, float]:
        ordered = sorted(self.gaps)

        def share(part: float) -> float:
            return round(1e3 * ordered[min(len(ordered) - 1, int(part * len(ordered)))], 2)

        found = {"p50_ms": share(0.5), "p99_ms": share(0.99), "worst_ms": share(1)}
        if self.first:
            found["first_token_ms"] = round(1e3 * sum(self.first) / len(self.first), 1)
        return found


class Streams:
    """Requests that run in an engine, told apart by number."""

    def __init__(self, llm: LLM, streams: int, context: int, new: int) -> None:
        self._llm, self._source = llm, random.Random(0)
        self._last: dict[int, float] = {}  # request -> when its newest token came
        self._made: dict[int, int] = {}  # request -> tokens
        self._ended: set[int] = set()
        self._numbers = 0
        self.streams = [self.submit(context, new) for _ in range(streams)]

    def submit(self, tokens: int, new: int) -> int:
        """Returns the request's number."""
        self._numbers += 1
        prompt = draw_ids(tokens, self._llm.plan.vocab_size, self._source)
        params = SamplingParams(max_new_tokens=new, ignore_eos=True)
        message = Submit(self._numbers, *OWNER, self._numbers, prompt, params, [0], [[]])
        if rejected := self._llm._scheduler.submit(message):
            raise SystemExit(rejected.message)
        self._made[self._numbers] = 0
        return self._numbers

    def run_until(self, done: Callable[[dict[int, int]], bool]) -> list[float]:
        """The streams' latencies meanwhile; `done` looks at how many tokens each request has."""
        gaps: list[float] = []
        while not done(self._made):
            if len(self._ended) == self._numbers:
                raise SystemExit("every stream has ended before it was measured")
            for output in self._llm._loop.turn(_nothing).values():
                now = time.perf_counter()
                for request, finish in zip(output.requests, output.finishes, strict=True):
                    if finish:
                        self._ended.add(request)
                    if request in self._last and request in self.streams:
                        gaps.append(now - self._last[request])
                    self._last[request] = now
                    self._made[request] += 1
        return gaps

    def rest(self, tokens: int) -> list[float]:
        """Until each stream has so many more."""
        goals = {stream: self._made[stream] + tokens for stream in self.streams}
        return self.run_until(lambda made: all(made[stream] >= goal for stream, goal in goals.items()))

    def beside(self, tokens: int) -> tuple[list[float], float]:
        """Until a prompt has its first token, and the streams theirs after it; when that was, since its submission."""
        begun = time.perf_counter()
        number = self.submit(tokens, 1)
        gaps = self.run_until(lambda made: made[number] > 0)
        first = time.perf_counter() - begun
        return gaps + self.rest(1), first


def _nothing() -> None:
    pass


def measured(given: argparse.Namespace, count: int, block: int | None) -> tuple[Latencies, Latencies]:
    """Undisturbed, and beside a prompt."""
    # Beside a prompt a stream gets a token for every block, and a rest comes before and after; the first stream goes on
    # while the prompts of the others are computed.
    budget = prefill_budget(block, count) if block else given.prompt
    blocks, entering = -(-given.prompt // budget), count * -(-given.context // budget)
    new = entering + SETTLE + (given.repeats + 1) * (given.tokens + blocks + 8)
    length = max(given.context + new, given.prompt + 1) + 1
    parameters = {
        "load_way": load_way(given.model, given.load_way),
        "data_type": given.dtype,
        "device": given.device,
        "max_req_total_len": length,
        "max_req_input_len": length - 1,
        "running_max_req_size": count + 1,
        "router_max_wait_tokens": 1,
        "splitfuse_mode": block is not None,
    }
    if block is not None:
        parameters["splitfuse_block_size"] = block
    with LLM(given.model, **{**parameters, **settings(given.set)}) as llm:
        gc.collect()
        gc.freeze()  # as the daemon's engine does before it serves
        streams = Streams(llm, count, given.context, new)
        streams.rest(SETTLE)
        undisturbed, beside = Latencies(streams.rest(given.tokens), []), Latencies([], [])
        for _ in range(given.repeats):
            gaps, first = streams.beside(given.prompt)
            beside.gaps += gaps
            beside.first.append(first)
            streams.rest(given.tokens)
        gc.unfreeze()
        return undisturbed, beside


def main() -> None:
    given = arguments()
    lines = []
    blocks = given.block if given.no_stall else [*given.block, None]
    for streams, block in product(given.streams, blocks):
        with problems_told():
            undisturbed, beside = measured(given, streams, block)
        alone, disturbed = undisturbed.told(), beside.told()
        ratio = round(disturbed["p99_ms"] / alone["p99_ms"], 2)
        told = {
            "work": f"prompt of {given.prompt} beside {streams} streams",
            "streams": streams,
            "splitfuse_block_size": block,
            "undisturbed": alone,
            "beside_a_prompt": disturbed,
            "p99_ratio": ratio,
            "goal": GOAL if block else None,
            "commit": commit_of(given.commit),
        }
        print("RESULT", json.dumps(told), flush=True)
        name = f"splitfuse, {streams} streams, blocks of {block}" if block else f"without, {streams} streams"
        cells = [alone["p50_ms"], alone["p99_ms"], *(disturbed[key] for key in ("p50_ms", "p99_ms", "worst_ms"))]
        lines.append(f"{name:<40}" + "".join(f"{cell:>10.2f}" for cell in [*cells, ratio, disturbed["first_token_ms"]]))
    heads = ("p50", "p99", "p50 with", "p99 with", "worst", "p99 ratio", "prompt's")
    print(f"\n{'milliseconds':<40}" + "".join(f"{head:>10}" for head in heads))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

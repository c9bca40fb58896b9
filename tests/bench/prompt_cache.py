"""What use_dynamic_prompt_cache saves: time to the first token behind a cached prefix, and throughput with and without.

``python tests/bench/prompt_cache.py --model DIR [--prompt 2048] [--shares 50,90] [--requests 16] [--new 32]``

Of every prompt of `prompt` random ids the first `shares` percent are the same, a system prompt say, and the rest are
its own. Alone in the engine, greedy, one new token, medians of `repeats` that take turns; a ratio is the median of
their ratios:

* *cold*: nothing is cached;
* *warm*: the shared part is. The goal is 1.15 times the next;
* *behind*: one step that computes the rest behind the keys and values of the shared part, handed to the runner as it
  is: no tokenizer, scheduler or cache. What is left to compute can't take less;
* *alone*: the rest as a prompt by itself, so without attention to the shared part.

Then `requests` of them are submitted at once, `new` tokens each, to an engine with an empty cache and to one without a
cache. A directory with no weights gets random ones (``--load-way DUMMY``).
"""

from __future__ import annotations

import argparse
import gc
import json
import random
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from settings import load_way, settings
from works import Host

from engine import commit_of, numbers, problems_told
from lightllmctl.workload import draw_ids
from lightllmd import LLM
from lightllmd.engine.step import Row, SamplingRow, Step, no_decode
from lightllmd.ipc.messages import SamplingParams

GOAL = 1.15  # warm, in units of behind


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--prompt", type=int, default=2048)
    parser.add_argument("--shares", type=numbers, default=[50, 90], help="percent of a prompt that all have in common")
    parser.add_argument("--requests", type=int, default=16, help="of the throughput; 0: don't measure it")
    parser.add_argument("--new", type=int, default=32, help="tokens that each of them generates")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--load-way", choices=["HF", "DUMMY"], help="default: DUMMY where there are no weights")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any other setting")
    parser.add_argument("--commit", default="unknown", help="where there is no git")
    return parser.parse_args()


def open_llm(given: argparse.Namespace, cache: bool) -> LLM:
    parameters = {
        "load_way": load_way(given.model, given.load_way),
        "data_type": given.dtype,
        "device": given.device,
        "max_req_total_len": given.prompt + given.new + 1,
        "max_req_input_len": given.prompt,
        # Whole prompts of all requests, so that a cache is never what makes them fit, and what `behind` takes.
        "max_total_token_num": (given.requests + 4) * (given.prompt + given.new + 1),
        "running_max_req_size": max(1, given.requests),
        "router_max_wait_tokens": 1,
        "use_dynamic_prompt_cache": cache,
    }
    return LLM(given.model, **{**parameters, **settings(given.set)})


@dataclass
class FirstTokens:
    """Milliseconds of each repeat."""

    times: dict[str, list[float]]  # of cold, warm, behind, alone
    hosts: list[dict[str, float]]  # phases of a warm one

    def median(self, name: str) -> float:
        return round(statistics.median(self.times[name]), 3)

    def ratio(self, other: str) -> float:
        """Of warm to that."""
        pairs = zip(self.times["warm"], self.times[other], strict=True)
        return round(statistics.median(warm / told for warm, told in pairs), 3)

    def told(self) -> dict[str, Any]:
        phases = {phase: statistics.median(host[phase] for host in self.hosts) for phase in self.hosts[0]}
        return {name: self.median(name) for name in self.times} | {"warm_host": phases}


class Prompts:
    """Of one engine: what is in front is the same for all, what follows is drawn."""

    def __init__(self, llm: LLM, host: Host, length: int, share: int) -> None:
        self._llm, self._host, self._source = llm, host, random.Random(share)
        self.shared = length * share // 100
        self.own = length - self.shared
        self._front = self.draw(self.shared)

    def draw(self, tokens: int) -> list[int]:
        return draw_ids(tokens, self._llm.plan.vocab_size, self._source)

    def prompt(self) -> list[int]:
        return self._front + self.draw(self.own)

    def seconds(self, prompts: list[list[int]], new: int, cached: int | None = None) -> float:
        """Of one call; `cached`: so many tokens of each come from the cache."""
        begun = time.perf_counter()
        outputs = self._llm.generate(
            prompt_token_ids=prompts, max_new_tokens=new, ignore_eos=True, detokenize=False, progress=False
        )
        taken = time.perf_counter() - begun
        found = {output.cached for output in outputs}
        if cached is not None and found != {cached}:
            raise SystemExit(f"{cached} tokens of each prompt should come from the cache, not {sorted(found)}")
        return taken

    def cold(self) -> float:
        self._llm._scheduler.flush_cache()
        return self.seconds([self.prompt()], 1, cached=0)

    def warm(self) -> float:
        """The shared part has been in a prompt before."""
        return self.seconds([self.prompt()], 1, cached=self.shared)

    def alone(self) -> float:
        return self.seconds([self.draw(self.own)], 1, cached=0)

    def behind(self) -> float:
        """The keys and values of the past are whatever its slots hold: the work is the same."""
        llm, prompt = self._llm, self.prompt()
        slots = llm._scheduler.keys.slots.take(len(prompt))
        sampling = SamplingRow(SamplingParams(max_new_tokens=1, ignore_eos=True), prompt, [])
        row = Row(
            table_row=0,
            request=0,
            branch=0,
            start=self.shared,
            tokens=prompt[self.shared :],
            slots=slots[self.shared :],
            sample=True,
            position=0,
            sampling=sampling,
            prompt_length=len(prompt),
            past=slots[: self.shared],
        )
        begun = time.perf_counter()
        llm._runner.launch(Step(1, "prefill", no_decode(), [row], []), _nothing)
        llm._runner.collect(_nothing)
        taken = time.perf_counter() - begun
        llm._scheduler.keys.slots.release(slots)
        return taken

    def first_tokens(self, repeats: int) -> FirstTokens:
        works = {"cold": self.cold, "warm": self.warm, "behind": self.behind, "alone": self.alone}
        for work in works.values():
            work()
        taken: dict[str, list[float]] = {name: [] for name in works}
        hosts = []
        for _ in range(repeats):
            for name, work in works.items():
                self._host.take()
                taken[name].append(1e3 * work())
                if name == "warm":
                    hosts.append(self._host.take())
        return FirstTokens(taken, hosts)

    def throughput(self, requests: int, new: int) -> float:
        """Requests per second, beginning with an empty cache."""
        self._llm._scheduler.flush_cache()
        return requests / self.seconds([self.prompt() for _ in range(requests)], new)


def _nothing() -> None:
    pass


def open_prompts(llm: LLM, given: argparse.Namespace) -> Iterator[Prompts]:
    gc.collect()
    gc.freeze()  # as the daemon's engine does before it serves
    host = Host(llm)
    for share in given.shares:
        yield Prompts(llm, host, given.prompt, share)
    gc.unfreeze()


def main() -> None:
    given = arguments()
    first: list[FirstTokens] = []
    rates: dict[bool, list[float]] = {True: [], False: []}  # requests per second, by whether there is a cache
    with problems_told():
        with open_llm(given, cache=True) as llm:
            for prompts in open_prompts(llm, given):
                first.append(prompts.first_tokens(given.repeats))
                if given.requests:
                    rates[True].append(prompts.throughput(given.requests, given.new))
        if given.requests:
            with open_llm(given, cache=False) as llm:
                rates[False] = [prompts.throughput(given.requests, given.new) for prompts in open_prompts(llm, given)]
    lines = []
    for number, (share, times) in enumerate(zip(given.shares, first, strict=True)):
        with_cache, without = (rates[cache][number] if given.requests else None for cache in (True, False))
        told = {
            "work": f"{given.prompt} tokens, {share} % shared",
            "first_token_ms": times.told(),
            "warm_to_behind": times.ratio("behind"),
            "warm_to_alone": times.ratio("alone"),
            "goal": GOAL,
            "requests_per_s": with_cache and round(with_cache, 3),
            "requests_per_s_without": without and round(without, 3),
            "commit": commit_of(given.commit),
        }
        print("RESULT", json.dumps(told), flush=True)
        cells = [*map(times.median, times.times), times.ratio("behind"), times.ratio("alone")]
        if with_cache and without:
            cells += [with_cache, without, with_cache / without]
        lines.append(f"{share:>3} % shared" + "".join(f"{cell:>10.2f}" for cell in cells))
    heads = ("cold", "warm", "behind", "alone", "w/behind", "w/alone", "req/s", "no cache", "gain")
    print(f"\n{'milliseconds':<12}" + "".join(f"{head:>10}" for head in heads))
    print("\n".join(lines))


if __name__ == "__main__":
    main()

"""What routing by cached prefix is worth with many replicas, beside round robin, random choice and least load.

    python tests/bench/routing_simulation.py                       # 1,000 replicas, 120,000 requests: minutes
    python tests/bench/routing_simulation.py --replicas 50 --requests 6000 --routers 4 --only affinity,random

The rule is the program's own (`lightllmd.api.inflight.routing`: `choose`, `PrefixIndex`), as an api worker applies it.
Replicas are simulated: their costs are measured ones, see `COSTS`, and everything assumed is printed above the table.
"""

from __future__ import annotations

import argparse
import bisect
import heapq
import itertools
import math
import random
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

from lightllmd.api.inflight.routing import BLOCK, GroupView, PrefixIndex, choose, load_of

# Measured, tests/bench/RESULTS.md: the Llama-3.1-8B shape in bf16 on an H100 80GB. Milliseconds.
PREFILL = [(0, 5.31), (128, 7.3), (2048, 43.7), (8192, 209.6)]  # by the prompt tokens of a step
DECODE = [(1, 5.31), (32, 6.90), (256, 14.5)]  # by the rows of a step, each with 512 tokens before it
KV_BYTES = 32 * 8 * 128 * 2 * 2  # of a token: layers, KV heads, head size, keys and values, bfloat16
COPY_RATE = 2.97e12  # bytes/s of that card, which the keys and values beyond 512 tokens are read at
SLOTS = 400_000  # tokens of KV cache beside the weights
BATCH_TOKENS = 8192  # prompt tokens of a step
ROWS = 256  # most sequences that run
WAIT_STEPS = 10  # router_max_wait_tokens: decode steps between two steps of prompts, while sequences run

_MEASURED = ", ".join(f"{tokens} tokens {ms} ms" for tokens, ms in PREFILL[1:])
_DECODED = ", ".join(f"{rows} rows {ms} ms" for rows, ms in DECODE)
ASSUMED = f"""\
Replicas: the 8B shape on an H100, at measured costs (prefill of {_MEASURED};
  decode of {_DECODED}, at 512 tokens of context), straight lines between and beyond;
  what decode reads beyond 512 tokens at {COPY_RATE / 1e12} TB/s. Prompt cache: {SLOTS:,} tokens, least recently used
  go first; running requests take none of it away. A step of prompts has {BATCH_TOKENS} tokens at most and stops decode;
  {WAIT_STEPS} decode steps are between two of them.
Requests: conversations of 1 to 41 turns, 5 on average, pauses of 15 s (exponential); each turn sends all before it.
  Each belongs to an application, whose system prompt of 256 to 6144 tokens (log-uniform) all its conversations begin
  with; 2 applications for each replica, popularity Zipf 1.0. A turn adds 32 to 1024 tokens (log-uniform), an answer
  32 to 768. Every 40 s a burst of 8 s: three times as many new conversations, half of them of one application.
Routers: each knows the prompts that it has routed itself, and of a replica's load what is {{age}} old and what it
  has sent since. A conversation's turns come to any router. Network and tokenising take no time. No replica dies."""


@dataclass
class Scene:
    """What is simulated."""

    replicas: int = 1000
    requests: int = 120_000
    rate: float = 1.0  # requests a second and replica
    routers: int = 1
    age: float = 0.25  # seconds that what routers know of loads is old at the most; 0: nothing is old
    seed: int = 1


# --- the clients ----------------------------------------------------------------------------------------------------


@dataclass
class Conversation:
    """Blocks of what was said so far, as `block_hashes` would name them."""

    application: int
    number: int
    turns: int
    tokens: int = 0
    blocks: list[int] = field(default_factory=list)

    def say(self, tokens: int) -> None:
        self.tokens += tokens
        while (len(self.blocks) + 1) * BLOCK <= self.tokens:
            self.blocks.append(hash((self.number, len(self.blocks))))


@dataclass
class Request:
    conversation: Conversation
    arrival: float
    tokens: int  # of the prompt
    answer: int
    blocks: list[int]  # of the prompt
    router: int
    computed: int = 0  # prompt tokens that were in no cache
    first_token: float = math.nan  # seconds from the arrival
    replica: int = -1


def _between(draw: random.Random, least: int, most: int) -> int:
    """Log-uniform."""
    return int(math.exp(draw.uniform(math.log(least), math.log(most))))


class Clients:
    """Begins conversations; `next_turn` goes on with one."""

    def __init__(self, scene: Scene) -> None:
        self._draw = random.Random(scene.seed)
        self._scene = scene
        count = 2 * scene.replicas
        self._popularity = list(itertools.accumulate(1 / (rank + 1) for rank in range(count)))
        self._lengths = [_between(self._draw, 256, 6144) for _ in range(count)]
        self._numbers = itertools.count(count)

    def beginnings(self) -> Iterator[tuple[float, Conversation]]:
        """Without end, by time."""
        draw, now = self._draw, 0.0
        rate = self._scene.rate * self._scene.replicas / 5 / 1.4  # of 5 turns; 1.4: the bursts
        while True:
            burst = now % 40 > 32
            now += draw.expovariate(rate * (3 if burst else 1))
            application = self._drawn()
            if burst and draw.random() < 0.5:
                application = int(now / 40) % len(self._lengths)
            turns = 1 + min(40, int(draw.expovariate(1 / 4.5)))
            conversation = Conversation(application, next(self._numbers), turns)
            length = self._lengths[application]
            conversation.blocks = [hash((application, block)) for block in range(length // BLOCK)]
            conversation.tokens = length
            yield now, conversation

    def _drawn(self) -> int:
        return bisect.bisect(self._popularity, self._draw.random() * self._popularity[-1])

    def next_turn(self, conversation: Conversation, now: float) -> Request:
        draw = self._draw
        conversation.turns -= 1
        conversation.say(_between(draw, 32, 1024))
        router = draw.randrange(self._scene.routers)
        blocks = list(conversation.blocks)
        return Request(conversation, now, conversation.tokens, _between(draw, 32, 768), blocks, router)

    def pause(self) -> float:
        return self._draw.expovariate(1 / 15)


# --- a replica ------------------------------------------------------------------------------------------------------


def _on_lines(points: Sequence[tuple[int, float]], at: float) -> float:
    """Seconds, from milliseconds at some points."""
    place = next((place for place, (x, _) in enumerate(points[1:-1], 1) if at <= x), len(points) - 1)
    (x0, y0), (x1, y1) = points[place - 1 : place + 1]
    return (y0 + (y1 - y0) * (at - x0) / (x1 - x0)) / 1000


class Replica:
    """Computes steps. `ends` names the requests that are done; between two of its events its rows go on evenly."""

    def __init__(self) -> None:
        self.cache = PrefixIndex(SLOTS // BLOCK)
        self.queue: deque[Request] = deque()
        self.sequences = 0  # that run or wait
        self.waiting_tokens = 0  # of prompts
        self.busy = 0.0  # seconds
        self._rows: list[tuple[float, int, Request]] = []  # by the progress at which they end
        self._context = 0  # tokens of all rows
        self._progress = 0.0  # tokens that a row which was always there would have
        self._at = 0.0  # time of _progress
        self._batch: list[Request] = []  # whose prompts are being computed
        self._batch_ends = math.inf
        self._next_batch = 0.0  # no earlier
        self._count = itertools.count()

    @property
    def load(self) -> float:
        return load_of(self.sequences, self.waiting_tokens)

    def take(self, request: Request, now: float) -> None:
        self._advance(now)
        self.queue.append(request)
        self.sequences += 1
        self.waiting_tokens += request.tokens

    def next_event(self) -> float:
        """When `step` is to be called; infinity: not before a request comes."""
        if self._batch:
            return self._batch_ends
        begins = max(self._at, self._next_batch) if self.queue and len(self._rows) < ROWS else math.inf
        if not self._rows:
            return begins
        return min(begins, self._at + (self._rows[0][0] - self._progress) * self._step())

    def step(self, now: float) -> list[Request]:
        """Requests that have ended."""
        self._advance(now)
        if self._batch and now >= self._batch_ends:
            for request in self._batch:
                request.first_token = now - request.arrival
                self._context += request.tokens + request.answer // 2
                heapq.heappush(self._rows, (self._progress + request.answer, next(self._count), request))
            self._batch, self._batch_ends = [], math.inf
            self._next_batch = now + WAIT_STEPS * self._step()
        ended = []
        while self._rows and self._rows[0][0] <= self._progress + 1e-6:
            request = heapq.heappop(self._rows)[2]
            self._context -= request.tokens + request.answer // 2
            self.sequences -= 1
            request.conversation.say(request.answer)
            self.cache.add(request.conversation.blocks)
            ended.append(request)
        if not self._batch and self.queue and (now >= self._next_batch or not self._rows):
            self._begin_batch(now)
        return ended

    def _begin_batch(self, now: float) -> None:
        tokens = 0
        while self.queue and len(self._rows) + len(self._batch) < ROWS:
            request = self.queue[0]
            known = min(self.cache.match(request.blocks) * BLOCK, request.tokens - 1)
            if self._batch and tokens + request.tokens - known > BATCH_TOKENS:
                break
            self.queue.popleft()
            self.waiting_tokens -= request.tokens
            request.computed = request.tokens - known
            self.cache.add(request.blocks)
            tokens += request.computed
            self._batch.append(request)
        if self._batch:
            self._batch_ends = now + _on_lines(PREFILL, tokens)

    def _step(self) -> float:
        """Seconds of one decode step."""
        rows = len(self._rows)
        beyond = max(0, self._context - 512 * rows)
        return _on_lines(DECODE, max(1, rows)) + beyond * KV_BYTES / COPY_RATE

    def _advance(self, now: float) -> None:
        if self._batch:
            self.busy += now - self._at
        elif self._rows:
            self.busy += now - self._at
            self._progress += (now - self._at) / self._step()
        self._at = now


# --- routers --------------------------------------------------------------------------------------------------------


class Router:
    """Chooses replicas; one of several that know nothing of each other."""

    def __init__(self, scene: Scene, replicas: list[Replica], number: int) -> None:
        self._replicas, self._age = replicas, scene.age
        self._random = random.Random(scene.seed * 1000 + number)
        self._turn = self._random.randrange(scene.replicas)
        self._prefixes = [PrefixIndex(SLOTS // BLOCK) for _ in replicas]
        self._sent_to: dict[int, set[int]] = {}  # by a prompt's first block, replicas that may know it
        self._loads: list[float] = [0.0] * len(replicas)
        self._seen = -math.inf  # when _loads were the replicas'
        self._views: list[GroupView] = []  # of all, for a prompt that none knows

    def round_robin(self, request: Request, now: float) -> int:
        self._turn = (self._turn + 1) % len(self._replicas)
        return self._turn

    def at_random(self, request: Request, now: float) -> int:
        return self._random.randrange(len(self._replicas))

    def least_load(self, request: Request, now: float) -> int:
        self._look(now)
        least = min(self._loads)
        chosen = self._random.choice([number for number, load in enumerate(self._loads) if load == least])
        self._loads[chosen] += load_of(1, request.tokens)
        return chosen

    def affinity(self, request: Request, now: float) -> int:
        self._look(now)
        blocks, views = request.blocks, self._views
        known = self._sent_to.setdefault(blocks[0], set())
        for number in known:
            views[number] = GroupView(number, self._loads[number], self._prefixes[number].match(blocks))
        chosen = choose(views, blocks[0])
        self._prefixes[chosen.group].add(blocks)
        self._loads[chosen.group] += load_of(1, request.tokens - chosen.blocks * BLOCK)
        known.add(chosen.group)
        for number in known:
            views[number] = GroupView(number, self._loads[number])
        return chosen.group

    def _look(self, now: float) -> None:
        if now - self._seen >= self._age:
            self._loads, self._seen = [replica.load for replica in self._replicas], now
            self._views = [GroupView(number, load) for number, load in enumerate(self._loads)]


POLICIES: dict[str, Callable[[Router, Request, float], int]] = {
    "affinity": Router.affinity,
    "least load": Router.least_load,
    "round robin": Router.round_robin,
    "random": Router.at_random,
}


# --- the simulation -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Result:
    """Of the requests that came after a third of the time, when caches are warm."""

    hit_rate: float  # prompt tokens that were in the replica's cache
    p50: float  # seconds to the first token
    p99: float
    busy: float  # of the time, all replicas' mean
    busiest: float  # the same of the busiest replica
    imbalance: float  # standard deviation of busy times over their mean
    waits: float  # share of requests whose first token took more than a second


def simulate(scene: Scene, policy: str) -> Result:
    """One run. The clients say the same under every policy as long as answers take as long."""
    replicas = [Replica() for _ in range(scene.replicas)]
    routers = [Router(scene, replicas, number) for number in range(scene.routers)]
    clients, rule = Clients(scene), POLICIES[policy]
    beginnings = clients.beginnings()
    order = itertools.count()
    events: list[tuple[float, int, Conversation | int]] = []  # a conversation goes on; or a replica's number
    due = [math.inf] * scene.replicas
    served: list[Request] = []

    def schedule(number: int) -> None:
        due[number] = replicas[number].next_event()
        if due[number] < math.inf:
            heapq.heappush(events, (due[number], next(order), number))

    now, begins = 0.0, next(beginnings)
    while len(served) < scene.requests:
        if not events or begins[0] <= events[0][0]:
            heapq.heappush(events, (begins[0], next(order), begins[1]))
            begins = next(beginnings)
        now, _, what = heapq.heappop(events)
        if isinstance(what, Conversation):
            request = clients.next_turn(what, now)
            request.replica = rule(routers[request.router], request, now)
            replicas[request.replica].take(request, now)
            served.append(request)
            schedule(request.replica)
        elif due[what] == now:
            for request in replicas[what].step(now):
                if request.conversation.turns > 0:
                    heapq.heappush(events, (now + clients.pause(), next(order), request.conversation))
            schedule(what)
    return _result([one for one in served if one.arrival > now / 3], replicas, now)


def _result(served: list[Request], replicas: list[Replica], seconds: float) -> Result:
    answered = sorted(one.first_token for one in served if one.first_token == one.first_token)
    begun = [one for one in served if one.computed]
    busy = [replica.busy / seconds for replica in replicas]
    mean = sum(busy) / len(busy)
    return Result(
        hit_rate=1 - sum(one.computed for one in begun) / sum(one.tokens for one in begun),
        p50=answered[len(answered) // 2],
        p99=answered[len(answered) * 99 // 100],
        busy=mean,
        busiest=max(busy),
        imbalance=math.sqrt(sum((one - mean) ** 2 for one in busy) / len(busy)) / mean,
        waits=sum(one > 1.0 for one in answered) / len(answered),
    )


def table(results: Iterable[tuple[str, Result]]) -> Iterator[str]:
    """Lines of Markdown."""
    heads = ["policy", "prompt tokens found in a cache", "first token: p50", "p99", "after more than 1 s"]
    heads += ["replicas busy", "the busiest", "deviation"]
    yield f"| {' | '.join(heads)} |"
    yield "|---" * len(heads) + "|"
    for policy, one in results:
        times = f"{one.p50 * 1000:.0f} ms | {one.p99 * 1000:.0f} ms | {one.waits:.2%}"
        yield (
            f"| {policy} | {one.hit_rate:.1%} | {times} | {one.busy:.0%} | {one.busiest:.0%} | {one.imbalance:.2f} |"
        )


def main() -> None:
    scene = Scene()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("replicas", "requests", "rate", "routers", "age", "seed"):
        default = getattr(scene, name)
        parser.add_argument(f"--{name}", type=type(default), default=default, help=f"default {default}")
    parser.add_argument("--only", default=",".join(POLICIES), help="policies, with commas between")
    given = vars(parser.parse_args())
    policies = given.pop("only").split(",")
    scene = Scene(**given)
    print(ASSUMED.format(age=f"up to {scene.age} s" if scene.age else "0 s"))
    print(f"{scene}\n")
    results = []
    for policy in policies:
        began = time.monotonic()
        results.append((policy, simulate(scene, policy)))
        print(f"{policy}: {time.monotonic() - began:.0f} s", file=sys.stderr)
    print("\n".join(table(results)))


if __name__ == "__main__":
    main()

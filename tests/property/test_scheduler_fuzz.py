"""Scheduler, slots and prompt cache as a state machine: drawn operations, every invariant after each of them.

Hypothesis drives the model (fuzz_model) for short, shrinkable counterexamples; a seeded draw drives it for length:
30,000 operations, a million with LIGHTLLMD_LONG_TESTS=1.
"""

from __future__ import annotations

import os
import random
from collections import Counter

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightllmd.engine.kv_cache import manager as key_values
from lightllmd.engine.kv_cache.slots import Slots
from lightllmd.engine.scheduling import scheduler
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.ipc.messages import Grammar, SamplingParams, TextStops
from long_run import LONG
from property.fuzz_clients import APIS
from property.fuzz_model import Model
from property.fuzz_reference import EOS

OPERATIONS = 1_000_000 if LONG else 30_000
SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261123"))
DEPTHS = (0, 1)  # steps that stay out while the next is scheduled, as an engine does without and with overlap
ROUND = 500  # operations on one scheduler


def draw_limits(draw: random.Random) -> SchedulerLimits:
    total = draw.choice([40, 100, 300])
    mode = draw.choice(["", "beam", "diverse"])
    return SchedulerLimits(
        max_total_token_num=total,
        batch_max_tokens=draw.choice([total // 2, total]),
        running_max_req_size=draw.choice([1, 3, 8, 64]),
        router_token_ratio=draw.choice([0.0, 0.0, 0.3, 0.6, 0.9, 1.0]),
        router_max_new_token_len=draw.choice([1, 4, 20]),
        router_max_wait_tokens=draw.choice([0, 1, 3, 10]),
        eos_ids=frozenset([EOS]),
        max_queue=draw.choice([1, 8, 100]),
        queue_timeout=draw.choice([0.0, 0.0, 5.0, 60.0]),
        use_dynamic_prompt_cache=draw.random() < 0.6,
        splitfuse_block_size=draw.choice([0, 0, 0, 1, 2, 5, 5, 16, 64]),
        beam_mode=mode == "beam",
        diverse_mode=mode == "diverse",
    )


def draw_prompt(draw: random.Random, model: Model) -> list[int]:
    """Mostly one that begins as others did: with a system prompt, or with a conversation that went before."""
    most = model.limits.max_total_token_num // 2
    system = [97 + i % 7 for i in range(draw.choice([0, 3, 12, most // 2, most - 2]))]
    begins = [*model.ended, system, system, system] if draw.random() < 0.8 else [[]]
    tail = [draw.choice(b"abc") for _ in range(draw.choice([0, 1, 2, draw.randint(1, most)]))]
    return (draw.choice(begins) + tail)[:most] or [EOS]


# Texts of one letter are found at once, longer ones seldom.
STOPS = [TextStops(strings=("a", "x")), TextStops(("aa", "b"), ((99,), (97, 98)), include_stop=False)]


GRAMMARS = [
    Grammar("ebnf", 'root ::= ("ab" | "c")*'),
    Grammar("ebnf", 'root ::= "a"{1,3} ("b" | "cab")?'),
    Grammar("ebnf", 'root ::= "abcab" | "abc" | "cabcab"'),
    Grammar("ebnf", 'root ::= "a" root "b" | "c"'),
]


def draw_params(draw: random.Random, model: Model, length: int) -> SamplingParams:
    """Of a request with a prompt of so many tokens: seldom too many of them, often none to spare."""
    limits = model.limits
    n = draw.choice([1, 1, 1, 2, 4])
    most = limits.max_total_token_num - length - (draw.random() < 0.95)
    if limits.beam_mode:
        most = min(most // n, 12 if n > 1 else most)
    max_new = draw.randint(1, max(1, most if draw.random() < 0.3 else min(most, 15)))
    fields: dict[str, object] = {}
    if draw.random() < 0.3:
        fields["allowed_token_ids"] = draw.choice([[97], [97, 98], [97, 98, 99, EOS], [*range(60, 120, 7)]])
    if draw.random() < 0.15:
        fields["bad_words"] = draw.choice([[[97, 98], [98, 98, 99]], [[99]], [[98], [97, 97]]])
    if draw.random() < 0.15 and not limits.beam_mode:
        fields["healing"] = draw.choice([b"a", b"abca", b"caba"])
    elif draw.random() < 0.15:
        fields["grammar"] = draw.choice(GRAMMARS)
    if limits.beam_mode and n > 1:
        fields["presence_penalty"] = draw.choice([0.0, 0.0, 0.5])
        fields["length_penalty"] = draw.choice([0.0, 1.0, 2.0])
        fields["stops"] = draw.choice([None] * 6 + STOPS)
    return SamplingParams(
        n=n,
        do_sample=draw.random() < 0.5,
        seed=draw.randrange(1000),
        ignore_eos=draw.random() < 0.3,
        max_new_tokens=max_new,
        min_new_tokens=draw.randint(1, max_new),
        top_logprobs=draw.choice([0, 0, 0, 2]),
        prompt_logprobs=draw.choice([-1, -1, -1, -1, -1, 0, 2]),
        use_cache=draw.random() < 0.85,
        **fields,
    )


def draw_request(draw: random.Random, model: Model) -> None:
    """Or several in one body."""
    api, tenant = draw.randrange(APIS), draw.choice([0, 0, 0, 1, 2, draw.randrange(50)])
    for place in range(draw.choice([1, 1, 1, 1, 3])):
        prompt = draw_prompt(draw, model)
        model.submit(prompt, draw_params(draw, model, len(prompt)), api, tenant, further=place > 0)


@pytest.mark.timeout(60 + OPERATIONS // 500)
@pytest.mark.parametrize("depth", DEPTHS)
def test_drawn_operations_break_no_invariant_and_every_request_ends(
    depth: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(key_values, "WORTH_WAITING", 8)  # as short as the prompts here are
    monkeypatch.setattr(scheduler, "LONG", 16)
    draw = random.Random(SEED + depth)
    seen: Counter[str] = Counter()
    done = 0
    while done < OPERATIONS / len(DEPTHS):
        model = Model(draw_limits(draw), depth, seen)
        for _ in range(ROUND):
            operation = draw.random()
            if operation < 0.18:
                draw_request(draw, model)
            elif operation < 0.92:
                model.step()
            elif operation < 0.95:
                model.abort(draw.randrange(1000), draw.random() < 0.5)
            elif operation < 0.98:
                model.abort_leader()
            elif operation < 0.985:
                model.api_gone(draw.randrange(APIS))
            elif operation < 0.9875:
                model.flush()
            elif operation < 0.99:
                model.expire()
            elif operation < 0.999:
                model.crash(draw.random() < 0.7)
            else:
                model.clear()
            model.check()
            done += 1
        model.drain()
    rare = {name: seen[name] for name in HAPPENS if seen[name] < done / 25_000}
    assert not rare, "the draw reaches all that is special"
    assert seen["late"] > done / 100 if depth else not seen["late"]


HAPPENS = (
    *("hits", "partial hits", "resumed by a hit", "waits", "duplicates", "cache_evicted_tokens", "cache_hits_tokens"),
    *(
        "paused",
        "suspects",
        "own",
        "passed",
        "expired",
        "twins",
        "mixed",
        "other pasts",
        "beams without a past",
        "left by its leader",
    ),
)


class SchedulerMachine(RuleBasedStateMachine):
    """The same model under hypothesis: what it finds comes shrunk."""

    @initialize(seed=st.integers(0, 10_000), depth=st.sampled_from(DEPTHS))
    def begin(self, seed: int, depth: int) -> None:
        self.model = Model(draw_limits(random.Random(seed)), depth)

    @rule(seed=st.integers(0, 10_000))
    def submit(self, seed: int) -> None:
        draw_request(random.Random(seed), self.model)

    @rule(steps=st.integers(1, 20))
    def step(self, steps: int) -> None:
        for _ in range(steps):
            self.model.step()

    @rule(pick=st.integers(0, 50), whole=st.booleans())
    def abort(self, pick: int, whole: bool) -> None:
        self.model.abort(pick, whole)

    @rule(api=st.integers(0, APIS - 1))
    def api_gone(self, api: int) -> None:
        self.model.api_gone(api)

    @rule(in_step=st.booleans())
    def crash(self, in_step: bool) -> None:
        self.model.crash(in_step)

    @rule()
    def flush(self) -> None:
        self.model.flush()

    @rule()
    def expire(self) -> None:
        self.model.expire()

    @rule()
    def clear(self) -> None:
        self.model.clear()

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=200, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
)
TestSchedulerMachine = SchedulerMachine.TestCase


def test_allocator_never_gives_a_slot_twice_and_loses_none() -> None:
    draw = random.Random(SEED)
    for total in (1, 7, 64, 1000):
        slots, held = Slots(total), []
        for _ in range(5000):
            operation = draw.random()
            if operation < 0.3 and slots.free:
                count = draw.randint(1, slots.free)
                held.append(slots.take(count, draw.choice([0, count, 2 * count, total])))
                assert held[-1] == sorted(held[-1])
                assert len(held[-1]) == count
            elif operation < 0.7 and slots.free and held:
                growing = draw.sample(held, draw.randint(1, min(len(held), slots.free)))
                lasts = [own[-1] for own in growing]
                taken = slots.grow(growing)
                assert [own[-2:] for own in growing] == [list(pair) for pair in zip(lasts, taken, strict=True)]
            elif held:
                slots.release(held.pop(draw.randrange(len(held))))
            slots.check()
            everything = [slot for own in held for slot in own]
            assert len(set(everything)) == len(everything) == slots.used
            assert all(0 <= slot < total for slot in everything)

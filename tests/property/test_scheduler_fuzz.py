"""Scheduler and slot allocator as a state machine: drawn operations, every invariant after each of them.

The model below is a ledger, a runner's row table and an operator in one. Hypothesis drives it for short, shrinkable
counterexamples; a seeded draw drives it for length (10^5 operations, 10^6 with LIGHTLLMD_LONG_TESTS=1).
"""

from __future__ import annotations

import os
import random
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.admission import Limits
from lightllmd.engine.batch import Step
from lightllmd.engine.fake import FakeRunner, fake_token
from lightllmd.engine.scheduler import Scheduler
from lightllmd.engine.slots import Slots
from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_STOP, SamplingParams, Submit

OPERATIONS = 1_000_000 if os.environ.get("LIGHTLLMD_LONG_TESTS") else 100_000
SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261123"))
EOS = ord("e")  # a byte that fake tokens do hit, so that generations end by eos too
APIS = 2


def reference(prompt: list[int], params: SamplingParams, branch: int) -> list[int]:
    """What a branch generates when nothing is scheduled, paused or replayed."""
    tokens: list[int] = []
    while len(tokens) < params.max_new_tokens:
        tokens.append(fake_token(prompt, params.seed if params.do_sample else 0, branch, len(tokens)))
        if tokens[-1] == EOS and not params.ignore_eos and len(tokens) >= params.min_new_tokens:
            break
    return tokens


@dataclass
class Ledger:
    """One request in flight as its api worker sees it."""

    request: int
    api: int
    arrival: int
    prompt: list[int]
    params: SamplingParams
    open: dict[int, list[int]] = field(default_factory=dict)  # branch -> tokens so far
    replayed: bool = False
    suspect: bool = False


class Model:
    def __init__(self, limits: Limits) -> None:
        self.limits = limits
        self.requests: dict[int, Ledger] = {}
        self.arrivals = 0
        self.epochs = dict.fromkeys(range(APIS), 1)
        self.generation = 0
        self.start()

    def start(self) -> None:
        self.generation += 1
        self.scheduler = Scheduler(self.limits, self.generation)
        self.runner = FakeRunner(FakeSettings())
        self.rows: dict[int, tuple[int, int]] = {}  # the runner's table: row -> its owner
        self.first_admissions: list[tuple[int, int]] = []  # (arrival, branch) of new ones, by first admission
        self.admitted: set[tuple[int, int]] = set()
        self.steps = 0

    # --- operations ------------------------------------------------------------------------------------------
    def submit(self, length: int, params: SamplingParams, api: int) -> None:
        self.arrivals += 1
        number = self.arrivals
        prompt = [(number * 31 + i * 7) % 256 for i in range(length)]
        ledger = Ledger(number, api, self.arrivals, prompt, params, {branch: [] for branch in range(params.n)})
        waiting = len(self.scheduler.waiting)
        rejected = self.scheduler.submit(self.message(ledger))
        if length + params.max_new_tokens + 1 > self.limits.max_total_token_num:
            assert rejected
            assert rejected.reason == "invalid"
        elif waiting and waiting + params.n > self.limits.max_queue:
            assert rejected
            assert rejected.reason == "queue_full"
            assert rejected.retry_after
        else:
            assert rejected is None
            self.requests[number] = ledger

    def message(self, ledger: Ledger) -> Submit:
        branches = sorted(ledger.open)
        return Submit(
            *(ledger.request, ledger.api, self.epochs[ledger.api], ledger.arrival, ledger.prompt, ledger.params),
            branches=branches,
            emitted=[list(ledger.open[branch]) for branch in branches],
            replay=ledger.replayed,
            suspect=ledger.suspect,
        )

    def abort(self, pick: int, whole: bool) -> None:
        if not self.requests:
            return
        request = list(self.requests)[pick % len(self.requests)]
        ledger = self.requests[request]
        branches = None if whole else [list(ledger.open)[pick % len(ledger.open)]]
        self.scheduler.abort(request, branches)
        for branch in list(ledger.open) if branches is None else branches:
            self.close(ledger, branch)

    def api_gone(self, api: int) -> None:
        late = next((ledger for ledger in self.requests.values() if ledger.api == api), None)
        self.scheduler.api_gone(api, self.epochs[api])
        self.requests = {number: ledger for number, ledger in self.requests.items() if ledger.api != api}
        if late:
            before = self.scheduler.busy
            assert self.scheduler.submit(self.message(late)) is None, "what a dead api worker still sent is dropped"
            assert self.scheduler.busy == before
        self.epochs[api] += 1

    def crash(self, in_step: bool) -> None:
        """The engine dies (in the middle of a step, perhaps) and everything in flight is replayed on the next."""
        step = self.scheduler.next_step() if in_step else None
        unproven = {row.request for row in step.rows} if step and step.kind == "prefill" else set()
        self.start()
        for ledger in self.requests.values():
            ledger.replayed = True
            ledger.suspect = ledger.request in unproven
            assert self.scheduler.submit(self.message(ledger)) is None, "a replayed request is never rejected"

    def step(self) -> None:
        running = {(s.request, s.branch): s for s in self.scheduler.running}
        pending, resuming = {s.request for s in self.scheduler.suspects}, bool(self.scheduler.paused)
        step = self.scheduler.next_step()
        if step is None:
            assert not self.scheduler.busy, "a step that nothing can be in, though somebody is in line"
            return
        self.steps += 1
        assert step.number == self.steps
        paused = [s for key, s in running.items() if s.table_row < 0]
        if paused:
            assert self.limits.router_token_ratio > 0, "ratio 0 reserves the worst case, so nothing is ever paused"
            assert min(s.order for s in paused) > max(s.order for s in self.scheduler.running), "newest first"
        self.check_rows(step, pending)
        tried = step.kind == "prefill" and pending & {row.request for row in step.rows}
        assert not (tried and resuming), "suspects come after those who are none"
        outputs = self.scheduler.complete(self.runner.run(step, lambda: None))
        told = 0
        for (api, epoch), output in outputs.items():
            assert epoch == self.epochs[api]
            assert output.generation == self.generation
            columns = (output.requests, output.branches, output.positions, output.tokens, output.finishes)
            for request, branch, position, token, finish in zip(*columns, strict=True):
                ledger = self.requests[request]
                assert ledger.api == api
                assert position == len(ledger.open[branch]), "positions are contiguous per branch"
                ledger.open[branch].append(token)
                ledger.suspect = False
                told += 1
                if finish:
                    expected = reference(ledger.prompt, ledger.params, branch)
                    assert ledger.open[branch] == expected
                    assert finish == (
                        FINISH_LENGTH if len(expected) == ledger.params.max_new_tokens else FINISH_STOP
                    ) or (finish == FINISH_STOP and expected[-1] == EOS)
                    self.close(ledger, branch)
                else:
                    assert len(ledger.open[branch]) < ledger.params.max_new_tokens
        assert told == len(step.rows), "one token for each row"

    def close(self, ledger: Ledger, branch: int) -> None:
        del ledger.open[branch]
        if not ledger.open:
            del self.requests[ledger.request]

    def drain(self) -> None:
        """Every request that is there ends."""
        left = sum(ledger.params.max_new_tokens * len(ledger.open) for ledger in self.requests.values())
        for _ in range(10 * left + 100):
            if not self.scheduler.busy:
                break
            self.step()
            self.check()
        assert not self.requests
        assert not self.scheduler.busy
        assert self.scheduler.slots.free == self.limits.max_total_token_num
        assert self.scheduler.load().estimated_peak == 0

    # --- invariants ------------------------------------------------------------------------------------------
    def check_rows(self, step: Step, pending: set[int]) -> None:
        for row in step.freed:
            del self.rows[row]
        assert 0 < len(step.rows) <= self.limits.running_max_req_size
        for row in step.rows:
            ledger, owner = self.requests[row.request], (row.request, row.branch)
            emitted = ledger.open[row.branch]
            sequence = ledger.prompt + emitted
            assert row.position == len(emitted)
            assert len(row.slots) == len(row.tokens)
            assert row.sample
            if step.kind == "prefill":
                assert row.table_row not in self.rows, "a table row has one owner"
                self.rows[row.table_row] = owner
                assert (row.start, row.tokens) == (0, sequence)
                assert row.sampling is not None
                assert row.sampling.emitted == emitted
                if not ledger.replayed and owner not in self.admitted:
                    self.first_admissions.append((ledger.arrival, row.branch))
                self.admitted.add(owner)
            else:
                assert self.rows[row.table_row] == owner
                assert (row.start, row.tokens) == (len(sequence) - 1, sequence[-1:])
                assert row.sampling is None
        assert len(self.rows) == len(self.scheduler.running)
        assert self.first_admissions == sorted(self.first_admissions), "first come, first served"
        if step.kind == "prefill":
            fed = sum(len(row.tokens) for row in step.rows)
            assert fed <= self.limits.batch_max_tokens or len(step.rows) == 1
            on_trial = {row.request for row in step.rows} & pending
            if on_trial:
                assert len(step.rows) == 1, "a suspect is tried alone"
                assert on_trial == {max(pending)}, "newest first"
            elif pending:
                assert all(self.requests[row.request].replayed for row in step.rows), "nobody new passes a suspect"
        else:
            assert len(step.rows) == len(self.scheduler.running)

    def check(self) -> None:
        self.scheduler.check()  # free + used == total, no slot and no row with two owners
        assert len(self.scheduler.running) <= self.limits.running_max_req_size
        for sequence in self.scheduler.running:
            assert len(sequence.slots) == sequence.length - 1


def draw_limits(draw: random.Random) -> Limits:
    total = draw.choice([40, 100, 300])
    return Limits(
        max_total_token_num=total,
        batch_max_tokens=draw.choice([total // 2, total]),
        running_max_req_size=draw.choice([1, 3, 8, 64]),
        router_token_ratio=draw.choice([0.0, 0.0, 0.3, 0.6, 0.9, 1.0]),
        router_max_new_token_len=draw.choice([1, 4, 20]),
        router_max_wait_tokens=draw.choice([0, 1, 3, 10]),
        eos_ids=frozenset([EOS]),
        max_queue=draw.choice([1, 8, 100]),
    )


def draw_params(draw: random.Random, most: int) -> SamplingParams:
    max_new = draw.randint(1, max(1, most))
    return SamplingParams(
        n=draw.choice([1, 1, 1, 2, 4]),
        do_sample=draw.random() < 0.5,
        seed=draw.randrange(1000),
        ignore_eos=draw.random() < 0.3,
        max_new_tokens=max_new,
        min_new_tokens=draw.randint(1, max_new),
    )


@pytest.mark.timeout(60 + OPERATIONS // 500)
def test_drawn_operations_break_no_invariant_and_every_request_ends() -> None:
    draw = random.Random(SEED)
    done = pauses = 0
    while done < OPERATIONS:
        model = Model(draw_limits(draw))
        total = model.limits.max_total_token_num
        for _ in range(500):
            operation = draw.random()
            if operation < 0.18:
                length = draw.randint(1, total // 2)
                model.submit(length, draw_params(draw, total - length - (draw.random() < 0.95)), draw.randrange(APIS))
            elif operation < 0.93:
                model.step()
            elif operation < 0.97:
                model.abort(draw.randrange(1000), draw.random() < 0.5)
            elif operation < 0.98:
                model.api_gone(draw.randrange(APIS))
            else:
                model.crash(draw.random() < 0.7)
            model.check()
            done += 1
            pauses += any(not s.replayed for s in model.scheduler.paused)
        model.drain()
    assert pauses > done / 1000, "the draw reaches pausing"


class SchedulerMachine(RuleBasedStateMachine):
    """The same model under hypothesis: what it finds comes shrunk."""

    @initialize(seed=st.integers(0, 10_000))
    def begin(self, seed: int) -> None:
        self.model = Model(draw_limits(random.Random(seed)))

    @rule(length=st.integers(1, 60), seed=st.integers(0, 10_000), api=st.integers(0, APIS - 1))
    def submit(self, length: int, seed: int, api: int) -> None:
        most = self.model.limits.max_total_token_num - length - 1
        self.model.submit(length, draw_params(random.Random(seed), most), api)

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

    @invariant()
    def holds(self) -> None:
        if hasattr(self, "model"):
            self.model.check()

    def teardown(self) -> None:
        if hasattr(self, "model"):
            self.model.drain()


SchedulerMachine.TestCase.settings = settings(
    max_examples=60, stateful_step_count=40, deadline=None, suppress_health_check=list(HealthCheck), derandomize=True
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
                own = draw.choice(held)
                own.append(slots.next(own[-1]))
            elif held:
                slots.release(held.pop(draw.randrange(len(held))))
            slots.check()
            everything = [slot for own in held for slot in own]
            assert len(set(everything)) == len(everything) == slots.used
            assert all(0 <= slot < total for slot in everything)

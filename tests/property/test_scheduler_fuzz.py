"""Scheduler and slot allocator as a state machine: drawn operations, every invariant after each of them.

The model below is a ledger, a device and an operator in one, with steps that overlap and with some that don't.
Hypothesis drives it for short, shrinkable counterexamples; a seeded draw drives it for length (10^5 operations, 10^6
with LIGHTLLMD_LONG_TESTS=1).
"""

from __future__ import annotations

import os
import random
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.admission import Limits
from lightllmd.engine.batch import Step, StepResult
from lightllmd.engine.fake import FakeRunner
from lightllmd.engine.fake_model import fake_token
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.request import State
from lightllmd.engine.scheduler import Scheduler
from lightllmd.engine.slots import Slots
from lightllmd.ipc.messages import FINISH_LENGTH, FINISH_STOP, SamplingParams, StepOutput, Submit

OPERATIONS = 1_000_000 if os.environ.get("LIGHTLLMD_LONG_TESTS") else 100_000
SEED = int(os.environ.get("LIGHTLLMD_SEED", "20261123"))
EOS = ord("e")  # a byte that fake tokens do hit, so that generations end by eos too
APIS = 2
DEPTHS = (0, 1, 2)  # steps that stay out while the next is scheduled; the engine has 0 or 1
Branch = tuple[int, int]  # (request, its branch)


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


class Device(FakeRunner):
    """Runs what was launched in that order, as late as it may, and knows what each slot holds.

    A slot that changed hands too early is written by a step of its former owner after its new owner's, and found when
    the new owner's next step reads it.
    """

    def __init__(self, slots: int, depth: int) -> None:
        super().__init__(FakeSettings())
        self.overlaps = depth  # steps that stay out while the next is scheduled
        self._launched: deque[Step] = deque()
        self._holds = [-1] * slots  # the resident's number and the position of its token
        self._residents: dict[int, tuple[int, list[int]]] = {}  # table row -> (its number, its slots)
        self._number = 0

    def launch(self, step: Step, beat: Callable[[], None]) -> None:
        self._launched.append(step)

    def collect(self, beat: Callable[[], None]) -> StepResult:
        step = self._launched.popleft()
        for table_row in step.freed:
            del self._residents[table_row]
        decode, rows = step.decode, []
        for table_row, start, slot in zip(decode.table_rows, decode.starts, decode.slots, strict=True):
            rows.append(self._write(table_row, start, [slot]))
        for row in step.rows:
            if row.sampling is not None:
                assert row.table_row not in self._residents, "a table row has one owner"
                self._number += 1_000_000
                self._residents[row.table_row] = (self._number, [])
            rows.append(self._write(row.table_row, row.start, row.slots))
        for number, slots in rows:
            read = [self._holds[slot] for slot in slots]
            assert read == list(range(number, number + len(slots))), "somebody else wrote to its slots"
        super().launch(step, beat)
        return super().collect(beat)

    def _write(self, table_row: int, start: int, taken: list[int]) -> tuple[int, list[int]]:
        number, slots = self._residents[table_row]
        assert start == len(slots)
        slots += taken
        for position, slot in enumerate(taken, start):
            self._holds[slot] = number + position
        return number, slots


@dataclass
class Launched:
    """A step that is out: whose tokens it makes, in their order; `trial`: a suspect's."""

    step: Step
    branches: list[Branch]
    trial: bool


class Model:
    def __init__(self, limits: Limits, depth: int) -> None:
        self.limits = limits
        self.depth = depth
        self.requests: dict[int, Ledger] = {}
        self.arrivals = 0
        self.epochs = dict.fromkeys(range(APIS), 1)
        self.generation = 0
        self.late = 0  # tokens that were dropped
        self.start()

    def start(self) -> None:
        self.generation += 1
        self.scheduler = Scheduler(self.limits, self.generation)
        runner = Device(self.limits.max_total_token_num, self.depth)
        self.loop = StepLoop(self.scheduler, runner, self.launching)
        self.out: deque[Launched] = deque()
        self.pending: Counter[Branch] = Counter()  # tokens that are out
        self.rows: dict[int, Branch] = {}  # the runner's table as of the newest launch: row -> its owner
        self.first_admissions: list[tuple[int, int]] = []  # (arrival, branch) of new ones, by first admission
        self.admitted: set[Branch] = set()
        self.round: set[Branch] = set()  # who was in line when the admission round began; empty: none goes on
        self.steps = 0
        self.note()

    def note(self) -> None:
        """How things stand before a turn."""
        scheduler = self.scheduler
        self.running = list(scheduler.running)
        self.suspects = {sequence.request for sequence in scheduler.suspects}
        self.resuming = bool(scheduler.paused)
        self.line = {(s.request, s.branch) for s in (*scheduler.paused, *scheduler.suspects, *scheduler.waiting)}

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
        """The engine dies (in the middle of a turn, perhaps) and everything in flight is replayed on the next."""
        if in_step:
            self.note()
            step = self.scheduler.next_step()
            if step:
                self.launching(step)
        unproven = {row.request for launched in self.out for row in launched.step.rows}
        self.start()
        for ledger in self.requests.values():
            ledger.replayed = True
            ledger.suspect = ledger.request in unproven
            assert self.scheduler.submit(self.message(ledger)) is None, "a replayed request is never rejected"

    def step(self) -> None:
        """One turn."""
        self.note()
        before = len(self.out)
        outputs = self.loop.turn(lambda: None)
        assert list(self.loop.out) == [launched.step for launched in self.out][self.loop.completed is not None :]
        if self.loop.completed is None:
            assert not outputs
            assert len(self.out) > before or not self.loop.busy, "a turn without a step, though somebody is in line"
            return
        launched = self.out.popleft()
        assert self.loop.completed is launched.step
        self.pending.subtract(launched.branches)
        alive = [key for key in launched.branches if key[1] in getattr(self.requests.get(key[0]), "open", ())]
        self.late += len(launched.branches) - len(alive)
        told = [key for owner, output in outputs.items() for key in self.hear(owner, output)]
        assert sorted(told) == sorted(alive), "one token for each row whose branch has not ended"

    def hear(self, owner: tuple[int, int], output: StepOutput) -> list[Branch]:
        api, epoch = owner
        assert epoch == self.epochs[api]
        assert output.generation == self.generation
        columns = (output.requests, output.branches, output.positions, output.tokens, output.finishes)
        for request, branch, position, token, finish in zip(*columns, strict=True):
            ledger = self.requests[request]
            assert ledger.api == api
            assert position == len(ledger.open[branch]), "positions are contiguous per branch"
            ledger.open[branch].append(token)
            ledger.suspect = False
            if finish:
                expected = reference(ledger.prompt, ledger.params, branch)
                assert ledger.open[branch] == expected
                assert finish == (FINISH_LENGTH if len(expected) == ledger.params.max_new_tokens else FINISH_STOP) or (
                    finish == FINISH_STOP and expected[-1] == EOS
                )
                self.close(ledger, branch)
            else:
                assert len(ledger.open[branch]) < ledger.params.max_new_tokens
        return list(zip(output.requests, output.branches, strict=True))

    def close(self, ledger: Ledger, branch: int) -> None:
        del ledger.open[branch]
        if not ledger.open:
            del self.requests[ledger.request]

    def drain(self) -> None:
        """Every request that is there ends."""
        left = sum(ledger.params.max_new_tokens * len(ledger.open) for ledger in self.requests.values())
        for _ in range(20 * left + 100):
            if not self.loop.busy:
                break
            self.step()
            self.check()
        assert not self.requests
        assert not self.out
        assert not self.scheduler.busy
        assert self.scheduler.keys.slots.free == self.limits.max_total_token_num
        assert self.scheduler.load().estimated_peak == 0

    # --- invariants ------------------------------------------------------------------------------------------
    def launching(self, step: Step) -> None:
        """Called with a step right before its launch."""
        self.steps += 1
        assert step.number == self.steps
        assert len(self.out) <= self.depth
        assert not any(launched.trial for launched in self.out), "nothing goes beside a suspect"
        for table_row in step.freed:
            del self.rows[table_row]
        paused = [sequence for sequence in self.running if sequence.state is State.PAUSED]
        if paused:
            assert self.limits.router_token_ratio > 0, "ratio 0 reserves the worst case, so nothing is ever paused"
            newest = max((sequence.order for sequence in self.scheduler.running), default=(0, 0, 0))
            assert min(sequence.order for sequence in paused) > newest, "newest first"
        assert (step.kind == "prefill") == bool(step.rows)
        assert 0 < step.size <= self.limits.running_max_req_size
        if step.rows:
            assert not step.decode.table_rows
            branches = self.prefill(step)
        else:
            branches = self.decode(step)
            self.round = set()
            ran_on = [(s.request, s.branch) for s in self.running if s.state is not State.PAUSED]
            assert branches == ran_on, "all that run take part"
        trial = bool({request for request, _ in branches} & self.suspects and step.rows)
        self.pending.update(branches)
        self.out.append(Launched(step, branches, trial))

    def prefill(self, step: Step) -> list[Branch]:
        branches = []
        for row in step.rows:
            ledger, owner = self.requests[row.request], (row.request, row.branch)
            emitted = ledger.open[row.branch]
            assert not self.pending[owner], "nobody is resumed while a token of theirs is out"
            assert row.table_row not in self.rows, "a table row has one owner"
            self.rows[row.table_row] = owner
            assert (row.start, row.tokens) == (0, ledger.prompt + emitted)
            assert len(row.slots) == len(row.tokens)
            assert row.sample
            assert row.position == len(emitted)
            assert row.sampling is not None
            assert row.sampling.emitted == emitted
            if not ledger.replayed and owner not in self.admitted:
                self.first_admissions.append((ledger.arrival, row.branch))
            self.admitted.add(owner)
            branches.append(owner)
        assert self.first_admissions == sorted(self.first_admissions), "first come, first served"
        assert step.fed <= self.limits.batch_max_tokens or len(step.rows) == 1
        on_trial = {row.request for row in step.rows} & self.suspects
        if on_trial:
            assert step.size == 1, "a suspect is tried alone"
            assert not self.out
            assert on_trial == {max(self.suspects)}, "newest first"
            assert not self.resuming, "suspects come after those who are none"
        elif self.suspects:
            assert all(self.requests[row.request].replayed for row in step.rows), "nobody new passes a suspect"
        if on_trial or not self.running or not self.round:
            self.round = self.line
        assert set(branches) <= self.round, "who comes during a round waits for the next"
        return branches

    def decode(self, step: Step) -> list[Branch]:
        branches = []
        decode = step.decode
        for table_row, start, position in zip(decode.table_rows, decode.starts, decode.positions, strict=True):
            request, branch = self.rows[table_row]
            ledger = self.requests[request]
            assert position == len(ledger.open[branch]) + self.pending[request, branch]
            assert position < ledger.params.max_new_tokens, "only eos and abort waste a row of a step"
            assert start == len(ledger.prompt) + position - 1
            branches.append((request, branch))
        return branches

    def check(self) -> None:
        self.scheduler.check()  # free + used == total, no slot and no row with two owners
        assert len(self.scheduler.running) <= self.limits.running_max_req_size
        for sequence in self.scheduler.running:
            assert len(sequence.slots) == sequence.length + sequence.pending - 1
            assert sequence.pending == self.pending[sequence.request, sequence.branch] <= len(self.out)


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
@pytest.mark.parametrize("depth", DEPTHS)
def test_drawn_operations_break_no_invariant_and_every_request_ends(depth: int) -> None:
    draw = random.Random(SEED + depth)
    done = pauses = late = 0
    while done < OPERATIONS / len(DEPTHS):
        model = Model(draw_limits(draw), depth)
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
        late += model.late
    assert pauses > done / 1000, "the draw reaches pausing"
    assert late > done / 100 if depth else not late


class SchedulerMachine(RuleBasedStateMachine):
    """The same model under hypothesis: what it finds comes shrunk."""

    @initialize(seed=st.integers(0, 10_000), depth=st.sampled_from(DEPTHS))
    def begin(self, seed: int, depth: int) -> None:
        self.model = Model(draw_limits(random.Random(seed)), depth)

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

"""The scheduler's world in one object: its clients, a device and an operator, with steps that overlap or don't.

Each operation is checked against what the documentation promises, by the steps and messages alone wherever they tell.
"""

from __future__ import annotations

from collections import Counter, deque
from dataclasses import dataclass

from lightllmd.config.bounds import least_prefill_budget, prefill_budget
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.scheduling.admission import SchedulerLimits
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.scheduling.sequence import SELF, Sequence, State
from lightllmd.engine.step import Row, Step
from lightllmd.ipc.messages import SamplingParams
from property.fuzz_clients import Clients, Ledger
from property.fuzz_device import Branch, Device
from property.fuzz_reference import READINGS, RESTRICTIONS

OWN: Branch = (0, 0)  # the engine's own request


@dataclass
class Launched:
    """A step that is out: whose tokens it makes, in their order; `alone`: a suspect's, or the engine's own."""

    step: Step
    branches: list[Branch]
    alone: bool


def key(sequence: Sequence) -> Branch:
    return sequence.request, sequence.branch


class Model(Clients):
    def __init__(self, limits: SchedulerLimits, depth: int, seen: Counter[str] | None = None) -> None:
        """`seen` counts what happened."""
        self.limits, self.depth = limits, depth
        self.seen: Counter[str] = Counter() if seen is None else seen
        self.now = 0.0
        super().__init__()
        self.start()

    def start(self) -> None:
        self.generation += 1
        self.scheduler = Scheduler(self.limits, self.generation, RESTRICTIONS, READINGS)
        runner = Device(self.limits.max_total_token_num, self.depth, self.seen)
        self.loop = StepLoop(self.scheduler, runner, self.launching)
        self.out: deque[Launched] = deque()
        self.pending: Counter[Branch] = Counter()  # tokens that are out
        self.rows: dict[int, Branch] = {}  # the runner's table as of the newest launch: row -> its owner
        self.left: dict[Branch, int] = {}  # tokens of its prompt to feed, of those that entered
        self.started: set[int] = set()  # batches of which something was admitted
        self.round = -1  # how many more the admission round may admit; -1: none goes on
        self.begun = 0  # how many more a round may admit that began, or goes on, without an admission to tell it by
        self.entered: Counter[Branch] = Counter()  # admissions
        self.answered = False  # the newest step was the engine's own
        self.head: tuple[object, int] = (None, 0)  # of the line, and the step by which it should have gone
        self.steps = 0
        self.note()

    def note(self) -> None:
        """How things stand before a turn."""
        scheduler = self.scheduler
        self.running = list(scheduler.running)
        self.going_on = [s for s in self.running if self.left.get(key(s)) == 0 and s.slots]
        self.suspects = {sequence.request for sequence in scheduler.queues.suspects}
        self.paused = set(map(key, scheduler.queues.paused))
        self.new = {key(sequence): sequence.tenant for sequence in scheduler.queues.waiting}
        suspects = sorted(scheduler.queues.suspects, key=lambda s: (s.suspect, -s.request, s.branch))
        self.suspect = suspects[0].request if suspects else 0
        line = [*scheduler.queues.paused, *suspects, *filter(None, [scheduler.queues.waiting.head])]
        self.line = len(scheduler.queues.paused) + len(suspects) + len(self.new)
        self.resuming = bool(scheduler.queues.paused)
        self.stepped = False
        head = (key(line[0]), self.entered[key(line[0])]) if line else None
        if head != self.head[0]:
            block = self.limits.splitfuse_block_size
            blocks = sum(1 + (s.target // least_prefill_budget(block) if block else 0) for s in self.running)
            tokens = max((s.params.max_new_tokens for s in self.running), default=0)
            self.head = head, self.steps + self.limits.router_max_wait_tokens + blocks + 2 * tokens + 10

    # --- operations ------------------------------------------------------------------------------------------
    def submit(
        self, prompt: list[int], params: SamplingParams, api: int, tenant: int = 0, further: bool = False
    ) -> None:
        """`further`: in the body of the one before, which is of the same api worker and tenant."""
        self.arrivals += 1
        if not further:
            self.batch = self.arrivals
            waiting = [sequence.tenant for sequence in self.scheduler.queues.waiting]
            self.room = len(waiting) < self.limits.max_queue * (1 if tenant in waiting else 2)
        number, limits = self.arrivals, self.limits
        beams = limits.beam_mode and params.n > 1
        ledger = Ledger(number, api, number, prompt, params, beams, {branch: [] for branch in range(params.n)})
        ledger.batch, ledger.tenant, ledger.since = self.batch, tenant, self.now
        rejected = self.scheduler.submit(self.message(ledger), self.now)
        width = params.n if beams else 1
        too_wide = beams and params.n > limits.running_max_req_size
        if too_wide or len(prompt) + width * params.max_new_tokens + 1 > limits.max_total_token_num:
            assert rejected
            assert rejected.reason == "invalid"
        elif not self.room:
            assert rejected
            assert rejected.reason == "queue_full"
            assert rejected.retry_after
        else:
            assert rejected is None
            self.requests[number] = ledger

    def abort(self, pick: int, whole: bool) -> None:
        if not self.requests:
            return
        request = list(self.requests)[pick % len(self.requests)]
        ledger = self.requests[request]
        branches = None if whole else [list(ledger.open)[pick % len(ledger.open)]]
        self.end(ledger, branches)

    def abort_leader(self) -> None:
        """Of one that feeds a prompt for others too."""
        for sequence in self.scheduler.running:
            if sequence.fork_lead is sequence and sequence.prefilling:
                self.seen["left by its leader"] += not sequence.beam
                self.end(self.requests[sequence.request], [sequence.branch])
                break

    def end(self, ledger: Ledger, branches: list[int] | None) -> None:
        self.scheduler.abort(ledger.request, branches)
        for branch in list(ledger.open) if branches is None or ledger.beams else branches:
            self.close(ledger, branch)

    def api_gone(self, api: int) -> None:
        late = next((ledger for ledger in self.requests.values() if ledger.api == api), None)
        if self.arrivals % 2:  # its replacement dies, and it goes on
            self.replacements[api] += 1
            self.scheduler.api_gone(api, self.epochs[api] + self.replacements[api])
            return
        self.scheduler.api_gone(api, self.epochs[api])
        self.requests = {number: ledger for number, ledger in self.requests.items() if ledger.api != api}
        if late:
            before = self.scheduler.busy
            assert self.scheduler.submit(self.message(late)) is None, "what a dead api worker still sent is dropped"
            assert self.scheduler.busy == before
        self.epochs[api] += self.replacements[api] + 1
        self.replacements[api] = 0

    def crash(self, in_step: bool) -> None:
        """The engine dies (in the middle of a turn, perhaps) and everything in flight is replayed on the next."""
        if in_step:
            self.note()
            step = self.scheduler.next_step()
            if step:
                self.launching(step)
        unproven = {row.request for launched in self.out for row in launched.step.rows}
        self.count_cache()
        self.start()
        for ledger in self.requests.values():
            ledger.replayed = True
            ledger.suspect += ledger.request in unproven
            ledger.since = self.now
            assert self.scheduler.submit(self.message(ledger), self.now) is None, "a replayed request is never rejected"

    def expire(self) -> None:
        waiting = {sequence.request for sequence in self.scheduler.queues.waiting}
        late = [
            ledger.request
            for ledger in self.requests.values()
            if ledger.request in waiting
            and ledger.batch not in self.started
            and 0 < self.limits.queue_timeout <= self.now - ledger.since
        ]
        told = self.scheduler.expire(self.now)
        assert sorted(rejected.request for _, rejected in told) == sorted(late)
        for owner, rejected in told:
            ledger = self.requests.pop(rejected.request)
            assert owner == (ledger.api, self.epochs[ledger.api])
            assert rejected.reason == "queue_timeout"
        self.seen["expired"] += len(late)

    def flush(self) -> None:
        self.scheduler.flush_cache()

    def clear(self) -> None:
        self.scheduler.clear()
        assert not self.scheduler.busy
        assert self.scheduler.keys.slots.free == self.limits.max_total_token_num
        self.requests = {}

    def step(self) -> None:
        """One turn."""
        self.note()
        self.now += 1
        before = len(self.out)
        told = self.loop.turn(lambda: None)
        if not self.stepped:
            self.idle()
        assert list(self.loop.out) == [launched.step for launched in self.out][self.loop.completed is not None :]
        if self.loop.completed is None:
            assert not told
            assert len(self.out) > before or not self.loop.busy, "a turn without a step, though somebody is in line"
            return
        launched = self.out.popleft()
        assert self.loop.completed is launched.step
        self.pending.subtract(launched.branches)
        if launched.branches == [OWN]:
            assert list(told) in ([SELF], [])  # or it was cleared away
            return
        alive = [branch for branch in launched.branches if branch[1] in getattr(self.ledger(branch), "open", ())]
        self.seen["late"] += len(launched.branches) - len(alive)
        alive = [branch for branch in alive if not self.requests[branch[0]].beams]
        heard = [branch for owner, output in told.items() for branch in self.hear(owner, output)]
        assert sorted(heard) == sorted(alive), "one token for each row whose branch has not ended"

    def drain(self) -> None:
        """Every request that is there ends."""
        left = sum(
            len(ledger.open) * ledger.params.max_new_tokens + len(ledger.prompt) for ledger in self.requests.values()
        )
        for _ in range(20 * left + 100):
            if not self.loop.busy:
                break
            self.step()
            self.check()
        assert not self.requests
        assert not self.out
        assert not self.scheduler.busy
        keys, total = self.scheduler.keys, self.limits.max_total_token_num
        assert keys.locked == 0
        assert keys.available == total
        assert self.scheduler.load().estimated_peak == 0
        self.count_cache()
        kept = total - keys.slots.free
        assert self.scheduler.flush_cache() == kept
        assert keys.slots.free == total
        assert not self.scheduler.cache_stats().get("cache_tokens")

    def count_cache(self) -> None:
        for name, value in self.scheduler.cache_stats().items():
            self.seen[name] += int(value)

    # --- invariants ------------------------------------------------------------------------------------------
    def idle(self) -> None:
        """No step could be made: all that go on wait for their tokens, or for a suspect's."""
        alone = any(launched.alone for launched in self.out) or (self.suspects and not self.resuming and self.out)
        if alone:
            self.begun = max(self.begun, self.round)  # a suspect's step interrupts a round, and does not end it
        self.round = -1
        self.pausing()  # perhaps for those who can't go on now
        if alone:
            return
        for sequence in self.going_on:
            assert sequence.state is not State.RUNNING or self.waits(sequence), "a stream stands still"

    def waits(self, sequence: Sequence) -> bool:
        """It can't go on before its token is here."""
        return sequence.beam and self.pending[key(sequence)] > 0

    def newly_paused(self) -> list[Sequence]:
        return [sequence for sequence in self.running if sequence.state is State.PAUSED]

    def launching(self, step: Step) -> None:
        """Called with a step right before its launch."""
        self.stepped = True
        self.steps += 1
        assert step.number == self.steps
        assert len(self.out) <= self.depth
        assert not any(launched.alone for launched in self.out), "nothing goes beside a suspect"
        for table_row in step.freed:
            del self.rows[table_row]
        self.pausing()
        answered, self.answered = self.answered, any(row.request == OWN[0] for row in step.rows)
        if self.answered:
            self.own(step)
            return
        going_on = self.decode(step)
        fed = 0
        feeding: list[Branch] = []
        branches = list(going_on)
        for row in step.rows:
            branch = (row.request, row.branch)
            assert branch not in going_on
            assert branch[1] in self.requests[row.request].open
            if row.sample:
                branches.append(branch)
            if self.is_prompt(row):
                feeding.append(branch)
                fed += len(row.tokens)
                self.prompt(row)
            else:
                going_on.append(branch)
                self.named(row)
        assert len(set(branches)) == len(branches)
        assert 0 < step.size <= self.limits.running_max_req_size
        assert step.kind == ("decode" if not feeding else "mixed" if going_on else "prefill")
        self.seen[step.kind] += 1
        suspect, admitted = self.admissions(feeding)
        assert not admitted or answered, "right after the engine's own"
        assert self.scheduler.quarantined == suspect
        self.shares(going_on, feeding, fed, suspect > 0)
        if not suspect and self.head[0] is not None:
            assert self.steps <= self.head[1], "the head of the line waits too long"
        self.pending.update(branches)
        self.out.append(Launched(step, branches, suspect > 0))

    def own(self, step: Step) -> None:
        """A request of the engine's own, before a suspect's first step."""
        (row,) = step.rows
        assert step.size == 1
        assert row.sample
        assert self.suspects
        assert not self.resuming
        assert not self.out
        assert self.scheduler.quarantined == 0
        self.seen["own"] += 1
        self.rows[row.table_row] = OWN
        self.pending[OWN] += 1
        self.out.append(Launched(step, [OWN], True))

    def pausing(self) -> None:
        paused = self.newly_paused()
        self.seen["paused"] += len(paused)
        if paused:
            self.round = -1
            assert self.limits.router_token_ratio > 0, "ratio 0 reserves the worst case, so nothing is ever paused"
            newest = max((sequence.order[:2] for sequence in self.scheduler.running), default=(0, 0))
            assert min(sequence.order[:2] for sequence in paused) >= newest, "newest first"

    def decode(self, step: Step) -> list[Branch]:
        branches = []
        decode = step.decode
        for table_row, start, position in zip(decode.table_rows, decode.starts, decode.positions, strict=True):
            branch = self.rows[table_row]
            ledger = self.requests[branch[0]]
            assert not ledger.beams
            assert position == len(ledger.open[branch[1]]) + self.pending[branch]
            assert position < ledger.params.max_new_tokens, "only eos and abort waste a row of a step"
            assert start == len(ledger.prompt) + position - 1
            branches.append(branch)
        return branches

    def is_prompt(self, row: Row) -> bool:
        """It feeds a part of a prompt, or follows one that does."""
        if row.sampling is None or self.rows.get(row.table_row) == (row.request, row.branch):
            return self.left[row.request, row.branch] > 0
        self.rows[row.table_row] = row.request, row.branch
        # A beam that had no past has one now, and goes on from what the search chose.
        return not self.requests[row.request].beams or not row.sampling.emitted

    def named(self, row: Row) -> None:
        branch = (row.request, row.branch)
        ledger = self.requests[row.request]
        self.left[branch] = 0
        assert len(row.tokens) == 1
        assert row.sample
        assert row.targets is None
        assert not self.pending[branch], "its token is here"
        if not ledger.beams:
            emitted = ledger.open[row.branch]
            assert (row.sampling, row.past, row.sibling_of) == (None, None, None)
            assert (row.position, row.tokens) == (len(emitted), emitted[-1:])
        elif row.sampling is not None:
            self.seen["other pasts"] += row.past is not None
            assert row.sampling.emitted[-1:] == row.tokens

    def prompt(self, row: Row) -> None:
        ledger, branch = self.requests[row.request], (row.request, row.branch)
        emitted = ledger.open[row.branch]
        assert not self.pending[branch], "nobody is resumed while a token of theirs is out"
        whole = ledger.prompt + emitted
        if row.sampling is not None:
            assert row.sampling.emitted == emitted
            assert row.sampling.prompt_ids == ledger.prompt
            self.left[branch] = len(whole) - row.start
            self.entering(row, ledger, whole)
        else:
            assert row.start == len(whole) - self.left[branch]
        end = row.start + len(row.tokens)
        assert row.tokens == whole[row.start : end]
        assert row.tokens or row.sibling_of is not None
        assert row.sample == (end == len(whole))
        assert row.position == len(emitted)
        self.left[branch] -= len(row.tokens)
        if ledger.params.prompt_logprobs >= 0 and row.branch == ledger.first and not emitted:
            assert row.targets == ledger.prompt[row.start + 1 : end + 1]
            assert row.top_targets == ledger.params.prompt_logprobs
        else:
            assert row.targets is None

    def entering(self, row: Row, ledger: Ledger, whole: list[int]) -> None:
        limits, params = self.limits, ledger.params
        emitted = len(whole) - len(ledger.prompt)
        if row.sibling_of is not None:
            self.seen["twins"] += 1
            assert limits.diverse_mode
            assert row.start == len(whole)
            return
        assert row.start < len(whole), "the logits of the last token are needed"
        if limits.use_dynamic_prompt_cache:
            if not emitted and row.branch == ledger.first:
                ledger.skipped = row.start
            if row.start and (not params.use_cache or (params.prompt_logprobs >= 0 and not emitted)):
                raise AssertionError("one that opted out, or whose prompt is scored, read the cache")
            self.seen["hits"] += row.start > 0
            self.seen["partial hits"] += 0 < row.start < len(whole) - 1
            self.seen["resumed by a hit"] += row.start > len(ledger.prompt)

    def admissions(self, feeding: list[Branch]) -> tuple[int, bool]:
        """Who was admitted, and whether that was right; the suspect that runs alone or 0, and whether it was admitted
        for this step."""
        before = set(map(key, self.running))
        running = [key(sequence) for sequence in self.scheduler.running]
        admitted = [branch for branch in running if branch not in before]
        admitted += [branch for branch in feeding if branch not in before and branch not in running]
        assert set(feeding) <= before.union(admitted)
        for branch in set(admitted).difference(feeding):
            self.left.pop(branch, None)
        if not self.limits.splitfuse_block_size:
            hanging = [s for s in self.scheduler.running if s.prefilling and not s.entered and s.slots]
            self.seen["waits"] += len(hanging)
        new = [branch for branch in admitted if branch in self.new]
        self.entered.update(admitted)
        self.started |= {self.requests[request].batch for request, _ in admitted if request in self.requests}
        if new:
            still = {key(sequence): sequence.tenant for sequence in self.scheduler.queues.waiting}
            for tenant in {self.new[branch] for branch in new}:
                last = max(branch for branch in new if self.new[branch] == tenant)
                assert all(branch > last for branch in still if still[branch] == tenant), "first come, first served"
            self.seen["passed"] += bool(still) and min(still) < max(new)
            left = set(map(key, self.scheduler.queues.paused))
            # With blocks, what was admitted for this step may be paused for it, too.
            assert not left & self.paused or self.limits.splitfuse_block_size, "nothing new passes a paused one"
            assert not self.suspects
        requests = {request for request, _ in feeding}
        entering = {request for request, _ in admitted} & self.suspects
        alone = entering or {s.request for s in self.running if s.suspect and key(s) in feeding}
        if alone:
            self.seen["suspects"] += bool(entering)
            assert requests == alone, "a suspect runs alone"
            assert len(feeding) == 1
            assert not self.out
            assert not entering or entering == {self.suspect}, "fewest deaths first, then newest"
            assert not entering or not self.resuming, "suspects come after those who are none"
        if not alone and self.suspects and not self.resuming:
            self.round = self.line  # a suspect is due at any time, even if there is no room for it
        if admitted:
            if entering or not self.running or self.round < 0:
                self.round = max(self.line, self.begun)
            self.begun = 0
            assert self.round > 0, "a round ends however many come"
            self.round = max(0, self.round - len(admitted))
        elif not feeding:
            self.round, self.begun = -1, 0
        elif self.round < 0:
            self.begun = max(self.begun, self.line)
        return max(alone, default=0), bool(entering)

    def shares(self, going_on: list[Branch], feeding: list[Branch], fed: int, suspect: bool) -> None:
        """Who has a part in the step: no prompt stalls the others."""
        block, most = self.limits.splitfuse_block_size, self.limits.batch_max_tokens
        if suspect:
            assert not going_on
            return
        could = [sequence for sequence in self.going_on if sequence.state not in (State.PAUSED, State.ENDED)]
        if block:
            budget = prefill_budget(block, len(going_on)) if could else max(block, most)
            assert fed <= budget, "a block of prompts beside decode rows"
        else:
            assert fed <= most or len(feeding) == 1
            assert not (feeding and going_on)
        if block or not feeding:
            part = set(going_on)
            for sequence in could:
                assert key(sequence) in part or self.waits(sequence), "a stream stands still"

    def check(self) -> None:
        scheduler = self.scheduler
        scheduler.check()  # each slot is free or has its owners, each row too
        keys, total = scheduler.keys, self.limits.max_total_token_num
        assert len(scheduler.running) <= self.limits.running_max_req_size
        assert keys.available + keys.used == total
        held = {slot for sequence in scheduler.running for slot in sequence.slots}
        assert len(held) == keys.used, "what nobody uses can be had"
        if not self.limits.use_dynamic_prompt_cache:
            assert keys.slots.used == keys.used, "nothing is kept without a cache"
        for sequence in scheduler.running:
            assert sequence.pending == self.pending[key(sequence)] <= len(self.out)
            if not sequence.prefilling:
                assert len(sequence.slots) == sequence.length + sequence.pending - 1
            elif sequence.fork_lead in (None, sequence):
                assert len(sequence.slots) == sequence.length
            else:
                assert not sequence.slots
                self.seen["beams without a past"] += sequence.beam and bool(sequence.emitted)

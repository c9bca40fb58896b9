"""Fair between tenants, in the order of arrival within one, and nothing waits for ever."""

from __future__ import annotations

import random
from collections import Counter

import msgspec
import pytest

from lightllmd.engine.scheduling.fair_queue import PRIORITY_STEP, FairQueue
from lightllmd.engine.scheduling.sequence import Sequence, sequences_of
from scheduler_samples import Steps, submit

WEIGHTS = (1.0, 2.0, 0.5, 4.0)  # of tenants that have one; their sums are exact


def sequence(number: int, tenant: int = 0, length: int = 10, weight: float = 1.0) -> Sequence:
    (made,) = sequences_of(submit(number, length, tenant=tenant, weight=weight))
    return made


def admit_all(queue: FairQueue) -> list[int]:
    order = []
    while (head := queue.head) is not None:
        order.append(head.request)
        queue.admit(head)
    assert not len(queue)
    return order


class Definition:
    """The rule as the module states it, with no index: all is looked through each time."""

    def __init__(self) -> None:
        self.lines: dict[int, list[Sequence]] = {}
        self.times: dict[int, float] = {}  # of tenants that were ever in line
        self.time = 0.0
        self.fresh = False

    def add(self, one: Sequence) -> None:
        if one.tenant not in self.lines:
            self.lines[one.tenant] = []
            self.times[one.tenant] = max(self.time, self.times.get(one.tenant, 0.0))
            self.fresh |= len(self.lines) == 2
        self.lines[one.tenant].append(one)
        self.lines[one.tenant].sort(key=lambda one: one.order)

    @property
    def head(self) -> Sequence | None:
        heads = [line[0] for line in self.lines.values()]
        return min(heads, key=lambda one: (self.times[one.tenant] + one.length / one.weight, one.order), default=None)

    def serve(self, tenant: int, tokens: int) -> None:
        self.times[tenant] += tokens / self.lines[tenant][0].weight
        self.time += tokens / sum(line[0].weight for line in self.lines.values())

    def admit(self, one: Sequence) -> None:
        self.serve(one.tenant, one.length)
        self.remove(one)

    def remove(self, one: Sequence) -> None:
        self.lines[one.tenant].remove(one)
        if not self.lines[one.tenant]:
            del self.lines[one.tenant]
        if not self.lines:
            self.time, self.times = 0.0, {}

    def charge(self, tokens: dict[int, int]) -> None:
        for tenant, count in tokens.items():
            if tenant in self.lines and count and not self.fresh:
                self.serve(tenant, count)
        self.fresh = False


@pytest.mark.parametrize("seed", range(20))
def test_the_queue_does_what_its_definition_says(seed: int) -> None:
    draw = random.Random(seed)
    queue, truth = FairQueue(), Definition()
    tenants = draw.choice([1, 2, 5, 100])
    weights = WEIGHTS if draw.random() < 0.7 else (1.0,)
    for number in range(1, 3000):
        act = draw.random()
        if act < 0.45:
            # A replayed one may be older than those that wait.
            tenant = draw.randrange(tenants)
            weight = weights[tenant % len(weights)]
            one = sequence(draw.randrange(1, 10**6), tenant, draw.choice([1, 2, 10, 500]), weight)
            queue.add(one)
            truth.add(one)
        elif act < 0.8 and queue.head is not None:
            one = queue.head
            queue.admit(one)
            truth.admit(one)
        elif act < 0.9 and len(queue):
            one = draw.choice(list(queue))
            queue.remove(one)
            truth.remove(one)
        elif act < 0.93 and queue.contested:
            tokens = {tenant: draw.randrange(100) for tenant in range(min(tenants, 8))}
            queue.charge(tokens)
            truth.charge(tokens)
        elif act < 0.94:
            while queue.head is not None and draw.random() < 0.99:
                assert queue.head is truth.head
                truth.admit(queue.head)
                queue.admit(queue.head)
        assert queue.head is truth.head, number
        assert len(queue) == sum(map(len, truth.lines.values()))
        assert queue.contested == (len(truth.lines) > 1)
        assert len(queue._heap) <= 4 * len(truth.lines) + 65, "what is outdated is bounded"
        assert len(queue._left) <= 2 * len(truth.lines) + 65 + tenants


def test_one_tenant_is_served_in_the_order_of_arrival() -> None:
    queue = FairQueue()
    for number, length in ((3, 1), (1, 500), (2, 50)):
        queue.add(sequence(number, length=length))
    assert admit_all(queue) == [1, 2, 3]


def test_a_short_prompt_passes_the_long_ones_of_others() -> None:
    queue = FairQueue()
    for number in range(1, 13):
        queue.add(sequence(number, tenant=number, length=2000))
    queue.add(sequence(99, tenant=99, length=20))
    assert admit_all(queue) == [99, *range(1, 13)]


def test_a_tenant_of_weight_three_is_served_three_times_as_much() -> None:
    queue = FairQueue()
    for number in range(400):
        queue.add(sequence(number, tenant=1, length=10, weight=3.0))
        queue.add(sequence(1000 + number, tenant=2, length=10))
    served: Counter[int] = Counter()
    for _ in range(200):
        served[queue.head.tenant] += 1
        queue.admit(queue.head)
    assert abs(served[1] - 150) <= 1


def test_tenants_share_by_tokens() -> None:
    queue = FairQueue()
    for number in range(400):
        queue.add(sequence(number, tenant=1, length=100))
        queue.add(sequence(1000 + number, tenant=2, length=10))
    served: Counter[int] = Counter()
    for _ in range(200):
        head = queue.head
        assert head is not None
        served[head.tenant] += head.length
        queue.admit(head)
    assert abs(served[1] - served[2]) <= 100


def test_what_its_sequences_generate_counts_for_a_tenant_that_waits_for_more() -> None:
    queue = FairQueue()
    queue.add(sequence(1, tenant=1, length=10))
    queue.add(sequence(2, tenant=2, length=50))
    queue.charge({1: 1000})  # before there were two
    queue.charge({1: 41})
    assert admit_all(queue) == [2, 1]


def test_who_comes_anew_has_no_credit_for_its_absence() -> None:
    queue = FairQueue()
    for number in range(10):
        queue.add(sequence(number, tenant=1, length=100))
    for _ in range(5):
        queue.admit(queue.head)
    for number in range(10):
        queue.add(sequence(100 + number, tenant=2, length=100))
    assert admit_all(queue)[:4] == [5, 100, 6, 101]


def test_leaving_the_line_for_a_moment_makes_nothing_forgotten() -> None:
    """One that asks again only when it was admitted gets its share, no more."""
    queue = FairQueue()
    for number in range(100):
        queue.add(sequence(number, tenant=1, length=10))
    queue.add(sequence(200, tenant=2, length=100))
    served: Counter[int] = Counter()
    for turn in range(60):
        head = queue.head
        assert head is not None
        served[head.tenant] += head.length
        queue.admit(head)
        if head.tenant == 2:
            queue.add(sequence(201 + turn, tenant=2, length=100))
    assert abs(served[1] - served[2]) <= 100


@pytest.mark.parametrize("others", ["fresh tenants", "one tenant", "many tenants"])
def test_a_long_prompt_waits_for_about_its_own_tokens_of_each_other_tenant(others: str) -> None:
    """However many short ones keep coming, from new tenants or old ones."""
    queue = FairQueue()
    for number in range(50):  # the virtual times are not those of the beginning
        queue.add(sequence(number, tenant=number % 7, length=30))
        queue.add(sequence(100 + number, tenant=7, length=30))
        queue.admit(queue.head)
    long = sequence(1001, tenant=-1, length=1000)
    queue.add(long)
    begun, number, tokens, most = len(queue), 2000, 0, 0
    while queue.head is not long:
        while len(queue) < begun + 20:
            number += 1
            tenant = {"fresh tenants": number, "one tenant": 5, "many tenants": number % 20}[others]
            queue.add(sequence(number, tenant=tenant, length=5))
        head = queue.head
        assert head is not None
        if head is not long:
            most = max(most, len({one.tenant for one in queue}))
            tokens += head.length
            queue.admit(head)
            assert tokens <= 1000 * most + 2000
    assert tokens > 900, "those with few tokens pass"


# --- in the scheduler ------------------------------------------------------------------------------------------------


def test_a_small_request_behind_many_long_prompts_has_the_next_prefill() -> None:
    long = [submit(number, 600, 5, tenant=number) for number in range(1, 13)]
    engine = Steps(*long, max_total_token_num=10_000, batch_max_tokens=700)
    engine.turn()
    engine.put(submit(99, 20, 5, tenant=99))
    assert [row.request for row in engine.turn().rows] == [99]
    prefills = [[row.request for row in step.rows] for step in engine.drain() if step.kind == "prefill"]
    assert prefills == [[number] for number in range(2, 13)]


@pytest.mark.parametrize(
    ("lengths", "tenants", "steps"),
    [
        ((20, 400), (1, 2), [[1, 2]]),
        ((20, 600), (1, 1), [[1, 2]]),
        ((100, 600), (1, 2), [[1, 2]]),
        ((20, 600), (1, 2), [[1], [2]]),
    ],
)
def test_a_long_prompt_has_a_step_of_its_own_behind_a_short_one_of_another_tenant(
    lengths: tuple[int, int], tenants: tuple[int, int], steps: list[list[int]]
) -> None:
    both = zip((1, 2), lengths, tenants, strict=True)
    engine = Steps(*(submit(number, length, 5, tenant=tenant) for number, length, tenant in both), batch_max_tokens=800)
    assert [[row.request for row in step.rows] for step in engine.drain() if step.rows] == steps


def test_a_full_queue_has_room_for_clients_of_whom_nothing_waits() -> None:
    engine = Steps(max_queue=4)
    told = [engine.scheduler.submit(submit(number, tenant=tenant)) for number, tenant in enumerate([1] * 5 + [2, 2, 3])]
    assert [answer is None for answer in told] == [True] * 4 + [False, True, False, True]
    told = [engine.scheduler.submit(submit(100 + tenant, tenant=tenant)) for tenant in range(10, 20)]
    assert sum(answer is None for answer in told) == 2, "no more than twice the bound wait"


def test_a_request_that_waited_too_long_is_told_so_unless_a_part_of_its_body_runs() -> None:
    engine = Steps(queue_timeout=5.0, running_max_req_size=1)
    scheduler = engine.scheduler
    scheduler.submit(submit(1, batch=1), now=10.0)
    scheduler.submit(submit(2, batch=1), now=10.0)
    scheduler.submit(submit(3, params={"n": 2}), now=10.0)
    scheduler.submit(submit(4), now=11.0)
    scheduler.submit(submit(5, replay=True, emitted=[[65]]), now=0.0)
    engine.turn()  # 5 runs
    scheduler.abort(5)
    engine.turn()
    engine.turn()  # 1 runs
    assert scheduler.expire(14.9) == []
    ((owner, rejected),) = scheduler.expire(15.0)
    assert (owner, rejected.request, rejected.reason) == ((0, 1), 3, "queue_timeout")
    assert "5 s (http.queue_timeout)" in rejected.message
    assert [sequence.request for sequence in scheduler.queues.waiting] == [2, 4]
    assert [rejected.request for _, rejected in scheduler.expire(1000.0)] == [4]
    engine.drain()


def prioritised(number: int, priority: int, tenant: int = 0, length: int = 10, ageing: float = 10.0) -> Sequence:
    """`number`: seconds of its arrival, too."""
    message = submit(number, length, tenant=tenant, priority=priority)
    (made,) = sequences_of(msgspec.structs.replace(message, arrival_ns=number * 10**9), ageing)
    return made


def test_less_priority_is_sooner_and_waiting_makes_up_for_it() -> None:
    queue = FairQueue()
    for number, priority in ((1, 1), (2, 0), (10, 0), (12, 0), (13, -2)):
        queue.add(prioritised(number, priority))
    assert admit_all(queue) == [13, 2, 10, 1, 12], "a step is worth ten seconds: 12 came too late to pass 1"


def test_without_ageing_priorities_have_no_effect() -> None:
    queue = FairQueue()
    for number, priority in ((3, -100), (1, 100), (2, 0)):
        queue.add(prioritised(number, priority, tenant=number, ageing=0.0))
    assert admit_all(queue) == [1, 2, 3]


def test_a_priority_buys_a_tenant_an_earlier_turn_and_no_larger_share() -> None:
    queue = FairQueue()
    for number in range(400):
        queue.add(prioritised(number, -1, tenant=1, length=100))
        queue.add(prioritised(1000 + number, 0, tenant=2, length=100))
    served: Counter[int] = Counter()
    for turn in range(600):
        head = queue.head
        assert head is not None
        assert head.tenant == 1 or turn >= PRIORITY_STEP // 100, "the urgent go first"
        served[head.tenant] += head.length
        queue.admit(head)
    assert abs(served[1] - served[2]) <= PRIORITY_STEP + 100

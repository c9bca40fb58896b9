"""The documented scheduling rules, one by one, with steps that end before the next is scheduled."""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.scheduling.admission import Admission
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.scheduling.sequence import SELF, Sequence, sequences_of
from lightllmd.engine.scheduling.submissions import MOST_SUBMISSIONS
from lightllmd.engine.step import Step, StepResult
from lightllmd.ipc.messages import (
    FINISH_ABORT,
    FINISH_LENGTH,
    FINISH_NONE,
    FINISH_STOP,
    Rejected,
    StepOutput,
    Submit,
)
from scheduler_samples import Steps, limits, submit


class Engine:
    """A scheduler with a runner that does not overlap."""

    def __init__(self, **changes: object) -> None:
        self.scheduler = Scheduler(limits(**changes), 1)
        self.loop = StepLoop(self.scheduler, FakeRunner(FakeSettings()))
        self.last: Step | None = None

    def put(self, *messages: Submit) -> list[Rejected | None]:
        return [self.scheduler.submit(message) for message in messages]

    def step(self) -> StepOutput | None:
        outputs = self.loop.turn(lambda: None)
        self.last = self.loop.completed
        self.scheduler.check()
        return outputs.get((0, 1)) or outputs.get(SELF)

    def steps(self) -> Iterator[StepOutput]:
        while output := self.step():
            yield output

    def prefills(self) -> list[list[tuple[int, int]]]:
        """(request, branch) of each prefill until all is done."""
        return [
            [(row.request, row.branch) for row in self.last.rows] for _ in self.steps() if self.last.kind == "prefill"
        ]


def waiting(count: int, length: int, most: int) -> list[Sequence]:
    return [sequence for i in range(count) for sequence in sequences_of(submit(i, length, most))]


@pytest.mark.parametrize(("used", "admitted", "load"), [(0, 6, 0.978), (499, 6, 0.978), (500, 2, 0.998)])
def test_worked_example_of_the_admission_rule(used: int, admitted: int, load: float) -> None:
    admission = Admission(limits(router_token_ratio=0.5), [], used)
    candidates = waiting(6, length=100, most=400)
    assert [admission.fits([candidate]) for candidate in candidates[: admitted + 1]][:admitted] == [True] * admitted
    assert admission.peak / 1000 == pytest.approx(load)
    assert admitted == 6 or not admission.fits([candidates[admitted]])


def test_ratio_zero_always_reserves_the_worst_case() -> None:
    admission = Admission(limits(), [], used=0)
    assert [admission.fits([candidate]) for candidate in waiting(3, 100, 400)] == [True, True, False]


def test_ignore_eos_is_reserved_in_full_whatever_the_ratio() -> None:
    admission = Admission(limits(router_token_ratio=1.0), [], used=0)
    candidates = [sequences_of(submit(i, 100, 400, params={"ignore_eos": True}))[0] for i in range(3)]
    assert [admission.fits([candidate]) for candidate in candidates] == [True, True, False]


def test_whatever_validation_lets_pass_runs_alone_on_an_empty_server() -> None:
    """The comparison is strict, so this is about the largest: prompt + max_new_tokens + 1 == max_total_token_num."""
    total = 12
    for length in range(1, total - 1):
        for already in range(total - 1 - length):
            engine = Engine(max_total_token_num=total, batch_max_tokens=total)
            most = total - 1 - length
            emitted = [[65] * already]
            assert engine.put(submit(1, length, most, replay=bool(already), emitted=emitted)) == [None]
            tokens = [output.tokens for output in engine.steps()]
            assert len(tokens) == most - already


def test_what_can_never_fit_is_refused_as_invalid() -> None:
    engine = Engine(max_total_token_num=12)
    too_long, empty, done = engine.put(submit(1, 6, 6), submit(2, 0, 3), submit(3, 1, 1, replay=True, emitted=[[65]]))
    assert too_long.reason == empty.reason == done.reason == "invalid"
    assert "max_total_token_num 12" in too_long.message
    assert not engine.scheduler.busy


def test_running_max_req_size_counts_every_branch() -> None:
    engine = Engine(running_max_req_size=3)
    engine.put(submit(1, params={"n": 2}), submit(2, params={"n": 2}), submit(3))
    assert engine.prefills() == [[(1, 0), (1, 1), (2, 0)], [(2, 1), (3, 0)]]


def test_batch_max_tokens_bounds_one_prefill() -> None:
    engine = Engine(batch_max_tokens=25)
    engine.put(*(submit(i, length=10) for i in (1, 2, 3)))
    assert engine.prefills() == [[(1, 0), (2, 0)], [(3, 0)]]


def test_a_resumed_one_longer_than_batch_max_tokens_goes_alone() -> None:
    engine = Engine(batch_max_tokens=25)
    engine.put(
        submit(1, length=10, replay=True, emitted=[[65]]),
        submit(2, 20, 40, replay=True, emitted=[[65] * 30]),
        submit(3),
    )
    assert engine.prefills() == [[(1, 0)], [(2, 0)], [(3, 0)]]


def test_nobody_overtakes_the_head_of_the_line() -> None:
    engine = Engine(max_total_token_num=100)
    engine.put(submit(1, 10, 60), submit(2, 10, 60), submit(3, 1, 1))
    engine.step()
    assert [row.request for row in engine.last.rows] == [1]
    assert engine.prefills() == [[(2, 0), (3, 0)]]


def test_a_prefill_goes_before_decode_and_waits_for_enough_rounds() -> None:
    engine = Engine(router_max_wait_tokens=3)
    engine.put(submit(1))
    engine.step()
    engine.put(submit(2))
    kinds = []
    for _ in range(5):
        engine.step()
        kinds.append(engine.last.kind)
    assert kinds == ["decode", "decode", "decode", "prefill", "decode"]


def test_rounds_that_nobody_waited_through_count_too() -> None:
    engine = Engine(router_max_wait_tokens=3)
    engine.put(submit(1))
    for _ in range(5):
        engine.step()
    engine.put(submit(2))
    engine.step()
    assert engine.last.kind == "prefill"


def test_out_of_slots_pauses_the_newest_and_resumes_it_by_recompute() -> None:
    engine = Engine(
        max_total_token_num=60, router_token_ratio=1.0, router_max_new_token_len=2, router_max_wait_tokens=0
    )
    engine.put(submit(1, 10, 40), submit(2, 10, 40))
    tokens: dict[int, list[int]] = {1: [], 2: []}
    resumed = []
    for output in engine.steps():
        if engine.last.kind == "prefill" and engine.last.rows[0].position:
            (row,) = engine.last.rows
            resumed.append(row.request)
            assert row.tokens == [row.request] * 10 + tokens[row.request]
            assert row.sampling.emitted == tokens[row.request]
        for request, position, token in zip(output.requests, output.positions, output.tokens, strict=True):
            assert position == len(tokens[request])
            tokens[request].append(token)
    assert set(resumed) == {2}, "the newest was paused, and came back"
    assert [len(tokens[1]), len(tokens[2])] == [40, 40]


def test_an_undisturbed_paused_one_is_ahead_of_the_queue() -> None:
    engine = Engine()
    engine.put(submit(5), *(submit(i, replay=True, emitted=[[65]]) for i in (9, 7)), submit(4, replay=True))
    assert engine.prefills() == [[(7, 0), (9, 0), (4, 0), (5, 0)]], "one without a token waits, as it did"


OWN = (0, 0)  # the engine's own request


def test_suspects_run_one_at_a_time_newest_first_after_the_others_and_before_new_ones() -> None:
    engine = Engine()
    engine.put(
        *(submit(i, replay=True, suspect=1) for i in (1, 2, 3)), submit(4, replay=True, emitted=[[65]]), submit(5)
    )
    assert engine.prefills() == [[(4, 0)], [OWN], [(3, 0)], [OWN], [(2, 0)], [OWN], [(1, 0)], [(5, 0)]]


def test_suspects_of_more_deaths_run_later() -> None:
    engine = Engine()
    engine.put(*(submit(i, replay=True, suspect=deaths) for i, deaths in ((1, 2), (2, 1), (3, 4), (4, 2))))
    assert engine.prefills()[1::2] == [[(2, 0)], [(4, 0)], [(1, 0)], [(3, 0)]]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_suspect_runs_in_the_step_right_after_the_answer_to_the_engines_own_request(overlap: bool) -> None:
    engine = Steps(submit(1, most=6, replay=True, emitted=[[65]]), overlap=overlap, running_max_req_size=1)
    engine.put(submit(2, replay=True, suspect=1), submit(3))
    seen = []
    while engine.scheduler.busy and len(seen) < 9:
        step = engine.turn()
        if step is not None:
            seen.append(([row.request for row in step.rows], engine.scheduler.quarantined))
    assert seen == [([1], 0), *[([], 0)] * 4, ([0], 0), ([2], 2), ([], 0), ([], 0)], (
        "no own request until there is room"
    )


def test_a_suspect_that_produced_a_token_is_a_normal_request_again() -> None:
    engine = Engine()
    engine.put(submit(1, replay=True, suspect=1, params={"n": 3}), submit(2))
    engine.step()
    assert [row.request for row in engine.last.rows] == [0]
    assert engine.scheduler.quarantined == 0
    engine.step()
    assert [row.branch for row in engine.last.rows] == [0]
    assert not engine.scheduler.queues.suspects
    assert [sequence.branch for sequence in engine.scheduler.queues.paused] == [1, 2]
    assert engine.prefills() == [[(1, 1), (1, 2), (2, 0)]]


def test_abort_ends_a_branch_in_any_state() -> None:
    engine = Engine(running_max_req_size=1)
    engine.put(submit(1), submit(2), submit(3, replay=True, emitted=[[65]]), submit(4, replay=True, suspect=1))
    engine.step()
    running, rest = engine.last.rows[0].request, {1, 2, 4}
    assert running == 3
    for request in (3, *rest):
        assert engine.scheduler.busy
        engine.scheduler.abort(request)
        engine.scheduler.check()
    engine.scheduler.abort(99)
    assert not engine.scheduler.busy
    assert engine.scheduler.keys.slots.used == 0


def test_abort_of_some_branches_leaves_the_others() -> None:
    engine = Engine()
    engine.put(submit(1, most=3, params={"n": 3}))
    engine.step()
    engine.scheduler.abort(1, [0, 2])
    assert [output.branches for output in engine.steps()] == [[1], [1]]


def test_a_dead_api_workers_requests_end_and_its_late_ones_are_dropped() -> None:
    engine = Engine()
    other = submit(9)
    other.api = 1
    engine.put(submit(1), other)
    engine.scheduler.api_gone(0, 1)
    assert engine.put(submit(2)) == [None]
    assert [sequence.request for sequence in engine.scheduler.queues.waiting] == [9]
    reborn = submit(10)
    reborn.epoch = 2
    engine.put(reborn)
    assert [sequence.request for sequence in engine.scheduler.queues.waiting] == [9, 10]


def test_a_dead_replacement_silences_no_process_that_serves() -> None:
    """Of one api worker two processes live at a time while one replaces the other."""
    engine = Engine()
    engine.put(submit(1))
    for epoch in (2, 3):
        engine.scheduler.api_gone(0, epoch)
    engine.put(submit(2))
    late = submit(3)
    late.epoch = 2
    engine.put(late)
    assert [sequence.request for sequence in engine.scheduler.queues.waiting] == [1, 2]


def test_a_full_queue_turns_away_new_ones_but_no_replayed_one() -> None:
    engine = Engine(max_queue=3)
    rejected = engine.put(submit(1, params={"n": 2}), submit(2, params={"n": 2}), submit(3), submit(4, replay=True))
    assert [answer and answer.reason for answer in rejected] == [None, None, "queue_full", None]
    assert rejected[2].retry_after > 0
    assert "max_queue is 3" in rejected[2].message


def test_a_batch_within_the_bound_enters_an_idle_server_whole_and_runs() -> None:
    engine = Engine(max_queue=2, running_max_req_size=2)
    assert engine.put(*(submit(i, most=3, batch=1) for i in range(1, 5))) == [None] * 4
    assert engine.prefills() == [[(1, 0), (2, 0)], [(3, 0), (4, 0)]]


def test_a_batch_is_taken_or_turned_away_as_one() -> None:
    engine = Engine(max_queue=2)
    engine.put(submit(1, batch=1), submit(2, batch=1), submit(3, batch=1))
    engine.scheduler.abort(2)
    full = engine.put(submit(4, batch=4))
    engine.scheduler.abort(1)
    rest = engine.put(submit(5, batch=4), submit(6))
    assert [answer and answer.reason for answer in full + rest] == ["queue_full", "queue_full", None]


def test_bodies_that_come_mingled_are_each_taken_or_turned_away_as_one() -> None:
    engine = Engine(max_queue=2)
    engine.put(submit(1, batch=1), submit(2, batch=2), submit(3, batch=1), submit(4, batch=2))
    full = engine.put(submit(5, batch=5))
    assert engine.put(submit(6, batch=1), submit(7, batch=2)) == [None] * 2
    for number in (1, 2, 3, 4, 6, 7):
        engine.scheduler.abort(number)
    rest = engine.put(submit(8, batch=8), submit(9, batch=5), submit(10, batch=8))
    assert [answer and answer.reason for answer in full + rest] == ["queue_full", None, "queue_full", None]


def test_however_many_bodies_come_few_are_remembered() -> None:
    engine = Engine()
    for number in range(1, MOST_SUBMISSIONS + 10):
        engine.put(submit(number))
        engine.scheduler.abort(number)
    assert len(engine.scheduler.submissions) == MOST_SUBMISSIONS


def test_a_request_that_was_turned_away_finds_room_when_it_comes_again() -> None:
    engine = Engine(max_queue=1)
    assert [answer and answer.reason for answer in engine.put(submit(1), submit(2))] == [None, "queue_full"]
    engine.scheduler.abort(1)
    assert engine.put(submit(2)) == [None]


def finishes(eos: int, **params: object) -> list[int]:
    """The finish marks of one branch whose tokens are all `eos`."""
    engine = Engine(eos_ids=frozenset([7]))
    engine.put(submit(1, most=4, params=params))
    marks = []
    while engine.scheduler.next_step():
        marks += engine.scheduler.complete(StepResult([eos], [-1.0], [None], [None]))[0, 1].finishes
    return marks


def test_a_branch_ends_by_eos_or_by_length() -> None:
    assert finishes(7) == [FINISH_STOP]
    assert finishes(8) == [FINISH_NONE] * 3 + [FINISH_LENGTH]
    assert finishes(7, min_new_tokens=3) == [FINISH_NONE] * 2 + [FINISH_STOP]
    assert finishes(7, ignore_eos=True) == [FINISH_NONE] * 3 + [FINISH_LENGTH]


def test_a_branch_without_a_probability_is_ended_and_the_others_go_on() -> None:
    scheduler = Scheduler(limits(), 1)
    for number in (1, 2):
        scheduler.submit(submit(number))
    step = scheduler.next_step()
    assert step is not None
    outputs = scheduler.complete(StepResult([5, 5], [math.nan, -1.0], [None, None], [None, None]))
    assert [output.finishes for output in outputs.values()] == [[FINISH_ABORT, FINISH_NONE]]
    assert [sequence.request for sequence in scheduler.running] == [2]
    scheduler.check()


def test_alternatives_are_sent_only_where_asked_for() -> None:
    engine = Engine()
    engine.put(submit(1, most=1), submit(2, most=1, params={"top_logprobs": 2}), submit(3, most=1))
    output = engine.step()
    assert [row and len(row) for row in output.alternatives] == [None, 2, None]
    engine.put(submit(4, most=1))
    assert engine.step().alternatives is None


def test_load_says_what_the_admission_rule_sees() -> None:
    engine = Engine(running_max_req_size=2)
    engine.put(*(submit(i, 100, 400) for i in range(3)), submit(9, 10, 3, replay=True, emitted=[[65]]))
    engine.step()
    load = engine.scheduler.load()
    assert (load.running, load.waiting, load.paused) == (2, 2, 0)
    assert load.slots_used == 111
    # running (L + o, M - o - 1): (101, 398) and (11, 0)
    assert load.estimated_peak == pytest.approx((398 + 101) / 1000)


def test_slots_of_a_lone_request_are_contiguous_even_while_others_came_and_went() -> None:
    engine = Engine()
    engine.put(submit(1, 5, 10), submit(2, 5, 100), submit(3, 5, 10))
    for _ in engine.steps():
        for sequence in engine.scheduler.running:
            assert sequence.slots == list(range(sequence.slots[0], sequence.slots[0] + len(sequence.slots)))

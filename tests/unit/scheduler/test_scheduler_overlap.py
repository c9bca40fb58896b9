"""The scheduling rules for steps that are scheduled while others are out."""

from __future__ import annotations

import math

from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.scheduling.sequence import State
from lightllmd.engine.step import Step, StepResult
from lightllmd.ipc.messages import FINISH_ABORT, FINISH_LENGTH, FINISH_NONE, FINISH_STOP, StepOutput, Submit
from scheduler_samples import limits, submit

EOS = 7


class Engine:
    """A scheduler whose steps are launched and completed one by one. Each step makes the token that the test says."""

    def __init__(self, *messages: Submit, **changes: object) -> None:
        self.scheduler = Scheduler(limits(eos_ids=frozenset([EOS]), **changes), 1)
        self.out: list[Step] = []
        for message in messages:
            assert self.scheduler.submit(message) is None

    def launch(self) -> Step | None:
        step = self.scheduler.next_step()
        self.scheduler.check()
        if step is not None:
            self.out.append(step)
        return step

    def complete(self, *tokens: int, logprob: float = -1.0) -> StepOutput | None:
        """`tokens` of its rows, each 50 if none are given."""
        size = self.out.pop(0).size
        chosen = list(tokens) or [50] * size
        outputs = self.scheduler.complete(StepResult(chosen, [logprob] * size, [None] * size, [None] * size))
        self.scheduler.check()
        return outputs.get((0, 1))

    def in_line(self) -> list[int]:
        return [sequence.request for sequence in (*self.scheduler.queues.paused, *self.scheduler.queues.waiting)]


def requests(step: Step | None) -> list[int]:
    assert step is not None
    return [row.request for row in step.rows]


def test_a_step_is_scheduled_before_the_tokens_of_the_one_before_are_known() -> None:
    engine = Engine(submit(1, length=10))
    prefill, first, second = engine.launch(), engine.launch(), None
    assert prefill.rows[0].position == 0
    assert (first.decode.starts, first.decode.positions) == ([10], [1])
    assert engine.complete(40).positions == [0]
    second = engine.launch()
    assert (second.decode.starts, second.decode.positions) == ([11], [2])
    assert second.decode.table_rows == first.decode.table_rows == [prefill.rows[0].table_row]
    assert len({*prefill.rows[0].slots, *first.decode.slots, *second.decode.slots}) == 12
    output = engine.complete(41)
    assert (output.positions, output.tokens) == ([1], [41])


def test_a_row_whose_last_token_is_out_is_in_no_further_step() -> None:
    engine = Engine(submit(1, most=2), submit(2, most=3))
    engine.launch()
    assert engine.launch().size == 2
    engine.complete()
    assert engine.launch().size == 1
    assert engine.complete().finishes == [FINISH_LENGTH, FINISH_NONE]
    assert engine.launch() is None, "nobody can run until a step completes"
    assert engine.complete().finishes == [FINISH_LENGTH]
    assert not engine.scheduler.busy


def test_slots_and_row_of_one_whose_last_token_is_out_serve_others_in_the_next_step() -> None:
    """It takes part in no further step, and whatever the next owner does is ordered behind."""
    engine = Engine(submit(1, 10, 1), submit(2, 10, 1), max_total_token_num=12, running_max_req_size=1)
    first = engine.launch()
    second = engine.launch()
    assert (requests(first), requests(second)) == ([1], [2])
    assert second.freed == [first.rows[0].table_row] == [second.rows[0].table_row]
    assert first.freed == []
    assert engine.complete().requests == [1]
    assert engine.complete().requests == [2]
    assert engine.scheduler.keys.slots.used == 0


def test_the_token_behind_an_end_is_dropped_and_its_slots_are_free_when_the_end_is_noticed() -> None:
    engine = Engine(submit(1), submit(2))
    engine.launch()
    engine.complete()
    engine.launch()
    late = engine.launch()
    assert late.size == 2
    assert engine.complete(EOS, 50).finishes == [FINISH_STOP, FINISH_NONE]
    assert engine.scheduler.keys.slots.used == 12
    following = engine.launch()
    assert following.freed == [late.decode.table_rows[0]]
    assert following.decode.table_rows == late.decode.table_rows[1:]
    assert engine.complete(50, 51).requests == [2], "the late token is not told"


def test_the_token_behind_an_abort_is_dropped() -> None:
    engine = Engine(submit(1), submit(2), submit(3))
    other = submit(4)
    other.api = 1
    engine.scheduler.submit(other)
    engine.launch()
    engine.launch()
    engine.scheduler.abort(1)
    engine.scheduler.api_gone(1, 1)
    for _ in range(2):
        assert engine.complete().requests == [2, 3]
    engine.scheduler.abort(2)
    engine.scheduler.abort(3)
    assert not engine.scheduler.busy
    assert engine.scheduler.keys.slots.used == 0


def test_an_abort_reaches_one_whose_last_token_is_out() -> None:
    engine = Engine(submit(1, most=1))
    engine.launch()
    engine.scheduler.abort(1)
    assert not engine.scheduler.busy
    assert engine.complete() is None


def paused_with_a_step_out() -> Engine:
    """Request 2 is paused while the decode step that makes its second token is out."""
    engine = Engine(
        submit(1, 10, 9),
        submit(2, 10, 9),
        max_total_token_num=23,
        router_token_ratio=1.0,
        router_max_new_token_len=1,
        router_max_wait_tokens=0,
    )
    assert requests(engine.launch()) == [1, 2]
    assert engine.launch().size == 2
    assert engine.complete(50, 60).requests == [1, 2]
    assert engine.launch().size == 1, "one slot is free"
    assert engine.in_line() == [2]
    return engine


def test_the_token_of_one_that_was_paused_meanwhile_counts() -> None:
    engine = paused_with_a_step_out()
    output = engine.complete(51, 61)
    assert (output.requests, output.positions, output.tokens) == ([1, 2], [1, 1], [51, 61])
    (paused,) = engine.scheduler.queues.paused
    assert paused.emitted == [60, 61]
    assert paused.state is State.PAUSED


def test_the_token_of_one_that_was_paused_meanwhile_may_end_it() -> None:
    engine = paused_with_a_step_out()
    assert engine.complete(51, EOS).finishes == [FINISH_NONE, FINISH_STOP]
    assert engine.in_line() == []
    assert engine.scheduler.keys.slots.used == len(engine.scheduler.running[0].slots)


def test_nobody_is_resumed_while_their_token_is_out() -> None:
    engine = paused_with_a_step_out()
    engine.scheduler.abort(1)
    assert engine.launch() is None, "2 is alone, but what it goes on from is not known"
    engine.complete(51, 61)
    resumed = engine.launch()
    assert resumed.rows[0].tokens == [2] * 10 + [60, 61]
    assert resumed.rows[0].position == 2


def test_an_end_without_a_probability_is_noticed_late_too() -> None:
    engine = Engine(submit(1))
    engine.launch()
    engine.launch()
    assert engine.complete(logprob=math.nan).finishes == [FINISH_ABORT]
    assert engine.complete(logprob=math.nan) is None
    assert engine.launch() is None


def test_nothing_is_out_beside_a_suspect() -> None:
    engine = Engine(submit(1))
    engine.launch()
    for suspect in (2, 3):
        engine.scheduler.submit(submit(suspect, replay=True, suspect=1))
    engine.scheduler.submit(submit(4))
    for request in (0, 3, 0, 2):  # the engine's own before each
        assert engine.launch() is None, "it waits until nothing is out"
        engine.complete()
        assert requests(engine.launch()) == [request]
    assert engine.launch() is None
    engine.scheduler.abort(2)
    assert engine.launch() is None, "its step is out still"
    assert engine.complete() is None
    assert requests(engine.launch()) == [4]
    assert engine.launch().size == 3, "the others go on, and overlap"


def test_pending_tokens_count_in_what_the_admission_rule_estimates() -> None:
    engine = Engine(submit(1, length=10, most=20))
    engine.launch()
    engine.launch()
    (sequence,) = engine.scheduler.running
    assert sequence.pending == 2
    assert sequence.estimate(True, 64) == (12, 17)
    engine.complete()
    assert sequence.estimate(True, 64) == (12, 17)

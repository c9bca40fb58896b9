"""Admission rounds: who is in line when one begins is admitted before decoding goes on."""

from __future__ import annotations

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.ipc.messages import Submit
from scheduler_samples import limits, submit


class Engine:
    def __init__(self, overlap: bool = False, **changes: object) -> None:
        self.scheduler = Scheduler(limits(**{"batch_max_tokens": 25} | changes), 1)
        self.loop = StepLoop(self.scheduler, FakeRunner(FakeSettings(overlap=overlap)))

    def put(self, *messages: Submit) -> None:
        for message in messages:
            assert self.scheduler.submit(message) is None

    def turns(self, count: int) -> list[list[int] | str]:
        """The steps of some turns: whom a prefill admits, or "decode"."""
        steps = []
        for _ in range(count):
            self.loop.turn(lambda: None)
            step = self.loop.completed
            steps.append([row.request for row in step.rows] or "decode")
        return steps


def test_a_round_is_as_many_prefills_as_its_tokens_take() -> None:
    engine = Engine()
    engine.put(*(submit(request) for request in range(1, 7)))
    assert engine.turns(4) == [[1, 2], [3, 4], [5, 6], "decode"]


def test_those_who_come_during_a_round_wait_for_the_next() -> None:
    engine = Engine(router_max_wait_tokens=2)
    engine.put(*(submit(request) for request in (1, 2, 3)))
    assert engine.turns(1) == [[1, 2]]
    engine.put(*(submit(request) for request in (4, 5, 6)))
    assert engine.turns(6) == [[3], "decode", "decode", [4, 5], [6], "decode"]


def test_decoding_gets_its_turn_however_many_come_and_whatever_the_wait() -> None:
    engine = Engine(router_max_wait_tokens=0)
    steps = []
    for request in range(1, 9):
        engine.put(submit(request))
        steps += engine.turns(1)
    assert steps == [[1], "decode", [2, 3], "decode", [4, 5], "decode", [6, 7], "decode"]


def test_a_round_ends_at_the_first_that_does_not_fit() -> None:
    engine = Engine(running_max_req_size=3)
    engine.put(*(submit(request, most=4) for request in range(1, 6)))
    assert engine.turns(6) == [[1, 2], [3], "decode", "decode", "decode", [4, 5]]


def test_one_that_leaves_the_line_during_a_round_is_not_waited_for() -> None:
    engine = Engine()
    engine.put(*(submit(request) for request in (1, 2, 3, 4)))
    engine.turns(1)
    engine.scheduler.abort(3)
    assert engine.turns(2) == [[4], "decode"]


def test_the_prefills_of_a_round_overlap() -> None:
    engine = Engine(overlap=True)
    engine.put(*(submit(request) for request in (1, 2, 3)))
    assert not engine.loop.turn(lambda: None)
    assert engine.turns(3) == [[1, 2], [3], "decode"]

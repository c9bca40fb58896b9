"""A request ends at its own deadline, wherever it is then."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.frontend_harness import frames, run, stack, until
from ledger_bench import Bench
from lightllmd.errors import DeadlineExceeded
from lightllmd.ipc.messages import FINISH_NONE, SamplingParams
from lightllmd.requests.branch import TextOptions, open_branches
from lightllmd.requests.urgency import Turn, Urgency


def opened(bench: Bench, timeout: float | None, priority: int | None = None):
    params = SamplingParams(max_new_tokens=8)
    branches = open_branches(1, [1], TextOptions(), None)
    return bench.ledger.open([1], params, branches, lambda: None, turn=Turn(7, 1.0, Urgency(priority, timeout)))


def test_the_engine_is_told_to_drop_what_is_late_and_the_rest_goes_on() -> None:
    bench = Bench()
    bench.up()
    late, patient, free = opened(bench, 2.0, priority=-4), opened(bench, 3.0), opened(bench, None)
    assert [message.priority for message in bench.link.submits] == [-4, 0, 0]
    bench.say((late, 0, 0, 65, FINISH_NONE))
    bench.now = 1.99
    bench.ledger.expire()
    assert bench.link.aborts == []
    bench.now = 2.0
    bench.ledger.expire()
    assert [message.request for message in bench.link.aborts] == [late.request]
    assert isinstance(late.error, DeadlineExceeded)
    assert late.error.message == "timeout: the 2 s that the request may take are over"
    assert (late.outcome, patient.outcome, free.outcome) == ("failed", None, None)


def test_a_deadline_holds_while_no_engine_is_there_and_in_the_next_revision() -> None:
    bench, successor = Bench(), Bench()
    held, moved = opened(bench, 1.0), opened(bench, 5.0)
    bench.now = 1.0
    bench.ledger.expire()
    assert isinstance(held.error, DeadlineExceeded)
    bench.ledger.migrate(successor.ledger)
    successor.up()
    successor.now = 4.9
    successor.ledger.expire()
    assert moved.outcome is None
    successor.now = 5.0
    successor.ledger.expire()
    assert isinstance(moved.error, DeadlineExceeded)


def test_what_is_late_before_it_is_entered_never_reaches_the_engine() -> None:
    bench = Bench()
    bench.up()
    params, branches = SamplingParams(max_new_tokens=8), open_branches(1, [1], TextOptions(), None)
    bench.now = 3.0
    with pytest.raises(DeadlineExceeded):
        bench.ledger.open([1], params, branches, lambda: None, arrived_at=1.0, turn=Turn(urgency=Urgency(timeout=2.0)))
    assert bench.link.submits == []
    assert bench.ledger.in_flight == 0


def test_deadlines_of_requests_that_ended_are_forgotten() -> None:
    bench = Bench()
    for _ in range(5):
        for entry in [opened(bench, 86_400.0) for _ in range(500)]:
            bench.ledger.cancel(entry)
        bench.ledger.expire()
    assert len(bench.ledger._deadlines) < 100


CHAT = {"messages": [{"role": "user", "content": "x"}], "max_tokens": 50}
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("/generate", {"inputs": "x", "parameters": {"max_new_tokens": 50, "timeout": 0.3}}),
    ("/v1/completions", {"prompt": "x", "max_tokens": 50, "timeout": 0.3}),
    ("/v1/chat/completions", CHAT | {"timeout": 0.3}),
]


@pytest.mark.parametrize(("path", "body"), ASKED, ids=lambda one: one if isinstance(one, str) else "")
def test_a_late_answer_is_504_and_leaves_nothing_behind(tmp_path: Any, path: str, body: dict[str, Any]) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, engine=False) as one:
            await one.up()  # it makes no token
            answer = await one.client.post(path, json=body)
            assert answer.status_code == 504
            assert "timeout: the 0.3 s that the request may take are over" in answer.text
            assert one.stats["in_flight"] == 0

    run(scenario())


def test_a_begun_stream_ends_with_the_error(tmp_path: Any) -> None:
    async def scenario() -> None:
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            body = CHAT | {"stream": True}
            headers = {"X-Request-Timeout": "1", "X-Request-Priority": "-2"}
            asked = asyncio.create_task(one.client.post("/v1/chat/completions", json=body, headers=headers))
            await engine.submitted(1)
            assert engine.submits[0].priority == -2
            engine.step()
            answer = await asked
            assert answer.status_code == 200
            *_, last = frames(answer.text)
            assert "1 s that the request may take" in last["error"]["message"]
            await until(lambda: not one.stats["in_flight"])

    run(scenario())

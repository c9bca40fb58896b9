"""splitfuse: prompts go beside those who go on, in blocks."""

from __future__ import annotations

import pytest

from lightllmd.engine.scheduling.admission import Admission
from lightllmd.engine.scheduling.constraint import Constraints
from lightllmd.engine.scheduling.sequence import Sequence, sequences_of
from lightllmd.engine.step import Step
from lightllmd.ipc.messages import Submit
from scheduler_samples import Steps, limits, submit

STEPWISE = {"bad_words": [[5, 6]]}  # its steps wait for the token before


def prompt_tokens(step: Step) -> int:
    """Those of request 2."""
    return sum(len(row.tokens) for row in step.rows if row.request == 2)


def test_a_long_prompt_comes_in_blocks_and_every_stream_is_in_every_step() -> None:
    engine = Steps(submit(1, 10, 30), splitfuse_block_size=16, router_max_wait_tokens=0)
    assert [engine.turn().kind, engine.turn().kind] == ["prefill", "decode"]
    engine.put(submit(2, 100, 2))
    steps = [engine.turn() for _ in range(8)]
    assert [step.kind for step in steps] == ["mixed"] * 7 + ["decode"]
    assert [prompt_tokens(step) + len(step.decode.table_rows) for step in steps[:6]] == [16] * 6
    assert [step.rows[0].sample for step in steps[:7]] == [False] * 6 + [True]
    assert [step.decode.table_rows[0] for step in steps] == [engine.launched[0].rows[0].table_row] * 8
    assert [position for step in steps for position in step.decode.positions[:1]] == list(range(2, 10))


def test_half_of_a_block_at_least_is_left_to_prompts() -> None:
    engine = Steps(submit(1, 2, 30, params={"n": 12}), splitfuse_block_size=16, router_max_wait_tokens=0)
    engine.turn()
    engine.turn()
    engine.put(submit(2, 100, 2))
    assert prompt_tokens(engine.turn()) == 8


def test_a_stream_that_waits_for_its_own_token_holds_prompts_to_a_block_too() -> None:
    engine = Steps(submit(1, 10, 30, params=STEPWISE), overlap=True, splitfuse_block_size=16, router_max_wait_tokens=0)
    for _ in range(4):
        engine.turn()
    engine.put(submit(2, 300, 2))
    before = len(engine.launched)
    for _ in range(10):
        engine.turn()
    steps = engine.launched[before:]
    assert {prompt_tokens(step) for step in steps} == {15, 16}
    rows = [sum(row.request == 1 for row in step.rows) for step in steps]
    assert rows in ([1, 0] * 5, [0, 1] * 5), "it takes part in each step but those that its token is awaited in"


def test_while_nobody_goes_on_prompts_come_as_in_a_prefill() -> None:
    engine = Steps(submit(1, 500, 2), splitfuse_block_size=16)
    step = engine.turn()
    assert (step.kind, len(step.rows[0].tokens)) == ("prefill", 500)


def test_no_suspect_is_admitted_beside_one_whose_blocks_are_not_all_fed() -> None:
    suspects = [submit(request, 40, 2, replay=True, suspect=1) for request in (1, 2)]
    engine = Steps(*suspects, splitfuse_block_size=16, batch_max_tokens=16)
    rows = [[row.request for row in step.rows] for step in engine.drain() if step.kind != "decode"]
    assert rows == [[0], [2], [2], [2], [0], [1], [1], [1]]


def candidate(message: Submit) -> Sequence:
    (sequence,) = sequences_of(message)
    sequence.constraint = Constraints(256, [], None).of(message.params)
    return sequence


@pytest.mark.parametrize(
    ("block", "length", "most", "params"),
    [(1, 10, 2, {}), (0, 10, 4, STEPWISE)],
    ids=["in blocks", "stepwise"],
)
def test_slots_are_reserved_for_as_long_as_one_takes_that_falls_behind(
    block: int, length: int, most: int, params: dict[str, object]
) -> None:
    """In lockstep it would give its slots back before the other one needs them."""
    together = limits(max_total_token_num=18, splitfuse_block_size=block)
    other, slow = candidate(submit(1, 1, 12)), candidate(submit(2, length, most, params=params))
    admission = Admission(together, [], used=0)
    assert admission.fits([other])
    assert not admission.fits([slow])
    admission = Admission(limits(max_total_token_num=18), [], used=0)
    assert admission.fits([other])
    assert admission.fits([candidate(submit(2, length, most))])


def test_whoever_falls_behind_is_admitted_alone_if_it_fits_at_all() -> None:
    admission = Admission(limits(max_total_token_num=18, splitfuse_block_size=1), [], used=0)
    assert admission.fits([candidate(submit(1, 10, 7, params=STEPWISE))])

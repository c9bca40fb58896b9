"""splitfuse: prompts go beside those who go on, in blocks."""

from __future__ import annotations

import pytest

from lightllmd.config.bounds import PREFILL_ROWS, mixed_shapes, most_step_tokens, prefill_budget, prefill_sizes
from lightllmd.config.load import load
from lightllmd.engine.runners.step_shapes import StepShapes
from lightllmd.engine.scheduling.admission import Admission
from lightllmd.engine.scheduling.beam_sequences import fork
from lightllmd.engine.scheduling.sequence import Sequence, sequences_of
from lightllmd.engine.step import Step
from lightllmd.ipc.messages import Submit
from scheduler_samples import Steps, limits, submit

RESTRICTED = {"bad_words": [[5, 6]]}  # what is generated decides what may come next


def prompt_tokens(step: Step) -> int:
    """Those of request 2."""
    return sum(len(row.tokens) for row in step.rows if row.request == 2)


def decode_rows(step: Step) -> int:
    return len(step.decode.table_rows) + sum(row.position > 0 for row in step.rows)


def test_a_long_prompt_comes_in_blocks_and_every_stream_is_in_every_step() -> None:
    engine = Steps(submit(1, 10, 30), splitfuse_block_size=45, router_max_wait_tokens=0)
    assert [engine.turn().kind, engine.turn().kind] == ["prefill", "decode"]
    engine.put(submit(2, 100, 2))
    steps = [engine.turn() for _ in range(6)]
    assert [step.kind for step in steps] == ["mixed"] * 5 + ["decode"]
    assert [prompt_tokens(step) for step in steps] == [23, 23, 23, 23, 8, 0]
    assert [step.rows[0].sample for step in steps[:5]] == [False] * 4 + [True]
    assert [step.decode.table_rows[0] for step in steps] == [engine.launched[0].rows[0].table_row] * 6
    assert [position for step in steps for position in step.decode.positions[:1]] == list(range(2, 8))


def test_half_of_a_block_at_least_is_left_to_prompts() -> None:
    engine = Steps(submit(1, 2, 30, params={"n": 12}), splitfuse_block_size=16, router_max_wait_tokens=0)
    engine.turn()
    engine.turn()
    engine.put(submit(2, 100, 2))
    assert prompt_tokens(engine.turn()) == 8


@pytest.mark.parametrize(("block", "most"), [(16, 33), (100, 140), (256, 140)])
def test_a_full_block_beside_any_number_of_decode_rows_has_a_captured_shape_and_fits_the_workspace(
    block: int, most: int
) -> None:
    """Joins scheduler, shapes and budget: prompts of one token and rows that wait for their own token included."""
    settings = {"model_dir": "m", "splitfuse_mode": True, "splitfuse_block_size": block, "running_max_req_size": most}
    params = load(None, settings).params
    shapes = StepShapes(most, prefill_sizes(2 * block), mixed_shapes(params))
    captured = set(mixed_shapes(params))
    for streams in range(1, most):
        engine = Steps(
            submit(1, 1, 50, params={"n": streams - streams // 7}),
            splitfuse_block_size=block,
            batch_max_tokens=2 * block,
            max_total_token_num=10_000,
            running_max_req_size=most,
            router_max_wait_tokens=0,
            max_queue=1000,
        )
        if streams >= 7:
            engine.put(submit(2, 1, 50, params=RESTRICTED | {"n": streams // 7}))
        assert any(decode_rows(step) == streams for step in iter(engine.turn, None))
        engine.put(*[submit(10, 3, 2), submit(11, 1, 2), submit(12, 2 * block, 2)][streams - most :])
        step = next(step for step in iter(engine.turn, None) if any(row.request >= 10 for row in step.rows))
        assert decode_rows(step) == streams
        assert step.fed - streams == prefill_budget(block, streams)
        shape = shapes.of(step)
        assert shape.padded
        assert (shape.decode_tokens, shape.prefill_tokens) in captured
        assert shape.tokens <= most_step_tokens(2 * block, most)


def test_no_more_prompts_than_a_padded_step_has_room_for_go_beside_a_decode_row() -> None:
    engine = Steps(submit(0, 10, 30), splitfuse_block_size=512, router_max_wait_tokens=0)
    engine.turn()
    engine.put(*(submit(1 + number, 2, 2) for number in range(PREFILL_ROWS + 5)))
    counts = [len(engine.turn().rows) for _ in range(3)]
    assert counts == [0, PREFILL_ROWS, 5]


def test_a_stream_whose_tokens_restrict_the_next_is_in_each_step() -> None:
    message = submit(1, 10, 30, params=RESTRICTED)
    engine = Steps(message, overlap=True, splitfuse_block_size=16, router_max_wait_tokens=0)
    for _ in range(4):
        engine.turn()
    engine.put(submit(2, 300, 2))
    before = len(engine.launched)
    for _ in range(10):
        engine.turn()
    steps = engine.launched[before:]
    assert {prompt_tokens(step) for step in steps} == {8}
    assert [decode_rows(step) for step in steps] == [1] * 10


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
    """The first of the beams, if there are several."""
    sequences = sequences_of(message)
    if len(sequences) > 1:
        fork(sequences, frozenset())
    return sequences[0]


@pytest.mark.parametrize(
    ("block", "length", "most", "params"),
    [(1, 10, 2, {}), (0, 10, 4, {"n": 2})],
    ids=["in blocks", "a beam"],
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
    assert admission.fits([candidate(submit(1, 10, 7, params=RESTRICTED))])

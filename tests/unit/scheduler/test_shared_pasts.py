"""Who need not compute what others did: the prompt cache, branches of one request, beams."""

from __future__ import annotations

from lightllmd.engine.step import Row, Step
from scheduler_samples import Steps, submit

COMMON = list(range(1, 101))


def fed(step: Step | None) -> list[tuple[int, int, int, int]]:
    """(request, branch, start, tokens) of its rows."""
    assert step is not None
    return [(row.request, row.branch, row.start, len(row.tokens)) for row in step.rows]


def test_a_prompt_that_is_computed_in_this_very_step_is_waited_for() -> None:
    engine = Steps(submit(1, prompt=COMMON), submit(2, prompt=COMMON), use_dynamic_prompt_cache=True)
    first, second = engine.turn(), engine.turn()
    assert fed(first) == [(1, 0, 0, 100)]
    assert fed(second) == [(2, 0, 99, 1)], "the logits of the last token are needed"
    assert second.rows[0].past == first.rows[0].slots[:99]
    assert dict(pair for output in engine.told for pair in output.cached) == {2: 99}


def test_a_few_tokens_in_common_are_not_waited_for() -> None:
    messages = [submit(request, prompt=[*COMMON[:40], request]) for request in (1, 2)]
    engine = Steps(*messages, use_dynamic_prompt_cache=True)
    assert fed(engine.turn()) == [(1, 0, 0, 41), (2, 0, 0, 41)]


def test_who_waited_for_a_prompt_counts_in_the_batch_of_the_next_step() -> None:
    messages = [submit(request, prompt=COMMON + [request] * 20) for request in (1, 2)]
    engine = Steps(*messages, submit(3, 240), use_dynamic_prompt_cache=True, batch_max_tokens=250)
    assert [fed(engine.turn()) for _ in range(3)] == [[(1, 0, 0, 120)], [(2, 0, 100, 20)], [(3, 0, 0, 240)]]


def test_branches_that_draw_for_themselves_have_one_prefill() -> None:
    engine = Steps(submit(1, 50, 4, params={"n": 4, "do_sample": True, "seed": 3}), diverse_mode=True)
    step = engine.turn()
    assert fed(step) == [(1, 0, 0, 50), (1, 1, 50, 0), (1, 2, 50, 0), (1, 3, 50, 0)]
    assert [(row.sibling_of, row.past) for row in step.rows[1:]] == [(0, step.rows[0].slots)] * 3
    assert engine.scheduler.keys.used == 50
    following = engine.turn()
    assert len(set(following.decode.slots)) == 4, "from here on each has slots of its own"
    engine.drain()
    assert engine.scheduler.keys.slots.used == 0


def test_the_followers_of_an_aborted_leader_feed_the_prompt_themselves() -> None:
    engine = Steps(submit(1, 5, 40), diverse_mode=True, splitfuse_block_size=30, router_max_wait_tokens=0)
    engine.turn()
    engine.turn()
    engine.put(submit(2, 40, 2, params={"n": 3}))
    assert fed(engine.turn()) == [(2, 0, 0, 15)]
    engine.scheduler.abort(2, [0])
    engine.scheduler.check()
    assert fed(engine.turn()) == [], "they are in line again, for the next round"
    assert [fed(engine.turn()) for _ in range(3)] == [
        [(2, 1, 0, 15)],
        [(2, 1, 15, 15)],
        [(2, 1, 30, 10), (2, 2, 40, 0)],
    ]


def test_a_prompt_is_reserved_as_long_as_a_branch_is_there() -> None:
    """Its leader leaves; those who share it hold it still, though none of them fed it."""
    branches = submit(1, 60, 20, params={"n": 2, "use_cache": False})
    engine = Steps(branches, diverse_mode=True, max_total_token_num=100, router_max_wait_tokens=0)
    engine.turn()
    engine.scheduler.abort(1, [0])
    engine.put(submit(2, 20, 15))
    kinds = [(step.kind, step.rows[0].request if step.rows else 1) for step in engine.drain()]
    assert kinds == [("decode", 1)] * 19 + [("prefill", 2)] + [("decode", 1)] * 14


def test_who_opts_out_reads_nothing_and_leaves_nothing() -> None:
    def ask(request: int, use_cache: bool) -> Row:
        engine.put(submit(request, most=1, prompt=COMMON, params={"use_cache": use_cache}))
        return engine.turn().rows[0]

    engine = Steps(use_dynamic_prompt_cache=True)
    assert ask(1, False).start == 0
    assert engine.scheduler.cache_stats()["cache_tokens"] == 0
    assert ask(2, True).start == 0
    assert ask(3, False).start == 0
    assert ask(4, True).start == 99


def test_without_a_cache_nothing_is_told_of_hits() -> None:
    together = [submit(request, prompt=COMMON, params={"n": 2}) for request in (1, 2)]
    engine = Steps(*together, diverse_mode=True)
    engine.drain()
    assert not any(output.cached for output in engine.told)
    assert engine.scheduler.cache_stats() == {}


def test_a_prompt_whose_log_probabilities_are_asked_for_is_computed_whole() -> None:
    engine = Steps(submit(1, most=1, prompt=COMMON), use_dynamic_prompt_cache=True, splitfuse_block_size=30)
    engine.turn()
    engine.put(submit(2, 3, 30))
    engine.turn()
    engine.put(submit(3, most=2, prompt=COMMON, params={"prompt_logprobs": 1}))
    engine.drain()
    parts = [part for output in engine.told for part in output.prompts]
    assert len(parts) > 1
    assert [part.first for part in parts] == [
        1 + sum(len(part.logprobs) for part in parts[:at]) for at in range(len(parts))
    ]
    assert sum(len(part.logprobs) for part in parts) == 99
    assert not any(output.cached for output in engine.told)


def test_one_that_is_paused_leaves_its_tokens_and_comes_back_by_a_hit() -> None:
    engine = Steps(
        *(submit(request, 10, 40) for request in (1, 2)),
        max_total_token_num=80,
        router_token_ratio=1.0,
        router_max_new_token_len=2,
        router_max_wait_tokens=0,
        use_dynamic_prompt_cache=True,
    )
    resumed = [row for step in engine.drain() for row in step.rows if row.position]
    assert resumed
    assert {row.request for row in resumed} == {2}, "the newest was paused"
    assert all(row.start + len(row.tokens) == 10 + row.position for row in resumed)
    assert any(row.start > 10 for row in resumed), "not its prompt alone was found"


def test_beams_share_the_prompt_and_what_they_have_in_common() -> None:
    engine = Steps(submit(1, 50, 8, params={"n": 3}), beam_mode=True)
    first = engine.turn()
    assert fed(first) == [(1, 0, 0, 50)]
    prompt = first.rows[0].slots
    second = engine.turn()
    assert [row.past for row in second.rows[1:]] == [prompt, prompt], "the first goes on where it is"
    slots = {row.branch: [*prompt, *row.slots] for row in second.rows}
    moved = 0
    for step in engine.drain():
        before = {branch: list(own) for branch, own in slots.items()}
        for row in step.rows:
            if row.past is not None:
                moved += 1
                assert row.past in before.values(), "the past of a beam that was"
                slots[row.branch] = list(row.past)
            assert row.start == len(slots[row.branch])
            slots[row.branch] += row.slots
        assert len({own[-1] for own in slots.values()}) == 3, "two beams write to one slot"
    assert moved
    assert engine.scheduler.keys.slots.used == 0


def test_beams_are_reserved_for_while_the_step_that_parts_them_is_out() -> None:
    """Each needs a slot as soon as the first has fed the prompt; nobody is admitted into those."""
    options = {"max_total_token_num": 100, "batch_max_tokens": 50, "router_max_wait_tokens": 0}
    engine = Steps(submit(1, 33, 13), overlap=True, beam_mode=True, **options)
    for _ in range(10):
        engine.turn()
    engine.put(submit(2, 50, 6, params={"n": 4}))
    engine.turn()
    engine.put(submit(3, 1, 8))
    engine.drain()
    fed_from_the_start = [row.request for step in engine.launched for row in step.rows if row.start == 0]
    assert fed_from_the_start == [1, 2, 3], "nobody is paused"


def test_a_beam_that_enters_anew_gives_its_table_row_back() -> None:
    """Penalties make all beams enter anew with each step."""
    engine = Steps(submit(1, 5, 30, params={"n": 2, "presence_penalty": 0.5}), beam_mode=True)
    for _ in range(3):
        engine.turn()
    rows = {row.table_row for row in engine.launched[-1].rows}
    engine.scheduler.abort(1)
    engine.put(submit(2))
    assert set(engine.turn().freed) == rows


def test_a_search_with_fewer_beams_than_it_is_wide_ends_its_quarantine() -> None:
    params = {"n": 4, "allowed_token_ids": [97, 98]}
    engine = Steps(submit(1, 5, 4, replay=True, suspect=1, params=params), submit(2, 5, 2), beam_mode=True)
    steps = engine.drain()
    assert [fed(step) for step in steps[:2]] == [[(0, 0, 0, 1)], [(1, 0, 0, 5)]]
    assert len(steps[2].rows) == 2 or steps[2].kind == "prefill"
    assert not engine.scheduler.busy


def test_more_beams_than_rows_are_refused() -> None:
    engine = Steps(beam_mode=True, running_max_req_size=3)
    rejected = engine.scheduler.submit(submit(1, params={"n": 4}))
    assert rejected is not None
    assert rejected.message == "4 beams exceed running_max_req_size 3"

"""Requests that end with their prompts: whatever way a prompt takes through the steps, its vectors are the same, they
come once, and nothing is left of it."""

from __future__ import annotations

import random
import struct

import pytest

from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.runners.fake_model import fake_score
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.engine.step import Step
from lightllmd.ipc.messages import Pooled, PoolingParams, SamplingParams, Submit
from scheduler_samples import limits

MARK = 9


def pooled(number: int, prompt: list[int], at: list[int] | None = None, **fields: object) -> Submit:
    params = PoolingParams(at, **fields.pop("params", {}))
    return Submit(number, 0, 1, number, prompt, params, branches=[0], emitted=[[]], **fields)


def drive(scheduler: Scheduler, requests: list[Submit], overlap: bool) -> tuple[dict[int, Pooled], list[Step]]:
    """What each request gets, and the steps that it took."""
    steps: list[Step] = []
    loop = StepLoop(scheduler, FakeRunner(FakeSettings(overlap=overlap)), steps.append)
    got: dict[int, Pooled] = {}
    for request in requests:
        assert scheduler.submit(request) is None
    while loop.busy:
        for output in loop.turn(lambda: None).values():
            assert not output.tokens
            for one in output.pooled:
                if one.request:
                    assert one.request not in got
                    got[one.request] = one
        scheduler.check()
    return got, steps


def expected(prompt: list[int], at: list[int] | None) -> list[bytes]:
    ends = [len(prompt) - 1] if at is None else at
    return [struct.pack("<f", fake_score(prompt[: end + 1])) for end in ends]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("block", [0, 16])
@pytest.mark.parametrize("cache", [False, True])
def test_vectors_do_not_depend_on_how_a_prompt_is_computed(overlap: bool, block: int, cache: bool) -> None:
    """Prompts with prefixes in common, some scored at marks on the way; slots for a few of them at a time."""
    drawn = random.Random(7)
    prefixes = [[drawn.choice([1, 2, 3, MARK]) for _ in range(150)] for _ in range(2)]
    requests = []
    for number in range(1, 60):
        own = [drawn.choice([4, 5, 6, MARK]) for _ in range(drawn.randrange(1, 90))]
        prompt = drawn.choice(prefixes)[: drawn.randrange(0, 150)] + own
        at = [index for index, token in enumerate(prompt) if token == MARK]
        requests.append(pooled(number, prompt, at if at and number % 2 else None))
    scheduler = Scheduler(
        limits(
            generates=False,
            max_total_token_num=600,
            batch_max_tokens=300,
            use_dynamic_prompt_cache=cache,
            splitfuse_block_size=block,
        ),
        1,
    )
    got, steps = drive(scheduler, requests, overlap)
    assert {number: one.vectors for number, one in got.items()} == {
        request.request: expected(request.prompt_ids, request.params.at) for request in requests
    }
    assert scheduler.keys.used == 0
    assert all(not step.decode.table_rows for step in steps)
    fed = sum(step.fed for step in steps)
    assert (fed < sum(len(request.prompt_ids) for request in requests)) == cache


def test_a_prompt_that_fills_every_slot_but_one_is_admitted() -> None:
    scheduler = Scheduler(limits(generates=False, max_total_token_num=40), 1)
    prompt = list(range(39))
    got, _ = drive(scheduler, [pooled(1, prompt)], False)
    assert got[1].vectors == expected(prompt, None)
    refused = scheduler.submit(pooled(2, [1] * 40))
    assert refused is not None
    assert refused.reason == "invalid"


def test_what_is_computed_again_for_a_mark_is_not_what_the_cache_has_before_it() -> None:
    scheduler = Scheduler(limits(generates=False, max_total_token_num=600, use_dynamic_prompt_cache=True), 1)
    prompt = [1] * 50 + [MARK] + [2] * 49
    drive(scheduler, [pooled(1, prompt)], False)
    got, steps = drive(scheduler, [pooled(2, prompt, [50])], False)
    assert got[2].vectors == expected(prompt, [50])
    assert [(row.start, len(row.tokens)) for row in steps[-1].rows] == [(50, 50)]


def test_those_that_come_while_blocks_are_computed_join_the_next_step() -> None:
    """No one waits for tokens between, so that nothing is held up by another admission."""
    scheduler = Scheduler(limits(generates=False, splitfuse_block_size=16, batch_max_tokens=16), 1)
    scheduler.submit(pooled(1, [1] * 64))
    assert [row.request for row in scheduler.next_step().rows] == [1]
    scheduler.submit(pooled(2, [2] * 4))
    scheduler.next_step()
    assert [sequence.request for sequence in scheduler.running] == [1, 2]


@pytest.mark.parametrize("overlap", [False, True])
def test_a_suspect_runs_alone_behind_a_score_of_the_engines_own(overlap: bool) -> None:
    scheduler = Scheduler(limits(generates=False), 1)
    requests = [pooled(number, [number] * 9, replay=True, suspect=1) for number in (1, 2)]
    requests.append(pooled(3, [3] * 9))
    got, steps = drive(scheduler, requests, overlap)
    assert sorted(got) == [1, 2, 3]
    assert [[row.request for row in step.rows] for step in steps] == [[0], [2], [0], [1], [3]]


def test_tokens_of_a_model_without_a_head_for_them_are_rejected() -> None:
    tokens = Submit(1, 0, 1, 1, [1], SamplingParams(), branches=[0], emitted=[[]])
    assert Scheduler(limits(generates=False), 1).submit(tokens).reason == "invalid"


def test_aborted_on_its_way_it_leaves_nothing() -> None:
    scheduler = Scheduler(limits(generates=False, splitfuse_block_size=16, batch_max_tokens=16), 1)
    runner = FakeRunner(FakeSettings(overlap=True))
    loop = StepLoop(scheduler, runner)
    scheduler.submit(pooled(1, [1] * 64))
    loop.turn(lambda: None)
    scheduler.abort(1)
    while loop.busy:
        assert not any(output.pooled for output in loop.turn(lambda: None).values())
    assert scheduler.keys.used == 0
    scheduler.check()


@pytest.mark.parametrize("seed", range(6))
def test_whatever_comes_and_goes_each_gets_its_vectors_once_or_none(seed: int) -> None:
    """Requests, aborts, deaths of api workers and replayed suspects at any moment, in a cache that is too small."""
    drawn = random.Random(seed)
    cache, block, overlap = drawn.random() < 0.5, drawn.choice([0, 8, 32]), drawn.random() < 0.5
    scheduler = Scheduler(
        limits(
            generates=False,
            max_total_token_num=300,
            batch_max_tokens=100,
            running_max_req_size=5,
            use_dynamic_prompt_cache=cache,
            splitfuse_block_size=block,
        ),
        1,
    )
    loop = StepLoop(scheduler, FakeRunner(FakeSettings(overlap=overlap)))
    asked: dict[int, Submit] = {}
    got: dict[int, Pooled] = {}
    ended: set[int] = set()
    epochs = {0: 1, 1: 1}

    def told() -> None:
        for owner, output in loop.turn(lambda: None).items():
            for one in output.pooled:
                if one.request:
                    assert one.request not in got
                    assert one.request not in ended
                    assert (asked[one.request].api, asked[one.request].epoch) == owner
                    got[one.request] = one
        scheduler.check()

    for number in range(1, 400):
        dice = drawn.random()
        if dice < 0.55:
            prompt = drawn.choices([1, 2, MARK], k=drawn.randrange(1, 120))
            marks = [index for index, token in enumerate(prompt) if token == MARK]
            api, suspect = drawn.randrange(2), drawn.random() < 0.1
            submit = pooled(number, prompt, marks if marks and drawn.random() < 0.5 else None)
            submit.api, submit.epoch, submit.tenant = api, epochs[api], drawn.randrange(3)
            submit.replay, submit.suspect = suspect or drawn.random() < 0.2, int(suspect)
            asked[number] = submit
            if scheduler.submit(submit) is not None:
                ended.add(number)
        elif dice < 0.65 and asked:
            request = drawn.choice(list(asked))
            scheduler.abort(request)
            ended.add(request)
        elif dice < 0.66:
            api = drawn.randrange(2)
            scheduler.api_gone(api, epochs[api])
            ended |= {number for number, submit in asked.items() if submit.api == api}
            epochs[api] += 1
        elif dice < 0.67:
            scheduler.flush_cache()
        else:
            told()
        ended -= got.keys()
    while loop.busy:
        told()
    assert got.keys() | ended == asked.keys()
    assert len(got) > 50
    for number, one in got.items():
        assert one.vectors == expected(asked[number].prompt_ids, asked[number].params.at)
    assert scheduler.keys.used == 0

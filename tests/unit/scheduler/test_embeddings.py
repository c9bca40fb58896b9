"""Embeddings beside generation: vectors are the same whatever way prompts take, and cost no stream a token."""

from __future__ import annotations

import random
from array import array

import pytest

from fake_embeddings import SIZE, fake_embedding
from lightllmd.config.parameters import FakeSettings
from lightllmd.engine.loop import StepLoop
from lightllmd.engine.runners.fake import FakeRunner
from lightllmd.engine.runners.fake_model import fake_token
from lightllmd.engine.scheduling.scheduler import Scheduler
from lightllmd.ipc.messages import PoolingParams, SamplingParams, Submit
from scheduler_samples import limits

KINDS = {
    "last": PoolingParams(),
    "mean": PoolingParams(mean=True),
    "cls": PoolingParams([0]),
    "short": PoolingParams(mean=True, size=3, unit=True),
}


class Run:
    """Vectors and tokens by request."""

    def __init__(self, scheduler: Scheduler, requests: list[Submit], overlap: bool) -> None:
        runner = FakeRunner(FakeSettings(overlap=overlap, embedding_size=SIZE))
        runner._embeds = True  # as of a plan whose model doesn't score
        loop = StepLoop(scheduler, runner)
        self.vectors: dict[int, list[float]] = {}
        self.tokens: dict[int, list[int]] = {request.request: [] for request in requests}
        for request in requests:
            assert scheduler.submit(request) is None
        while loop.busy:
            for output in loop.turn(lambda: None).values():
                for number, token in zip(output.requests, output.tokens, strict=True):
                    self.tokens[number].append(token)
                for one in output.pooled:
                    assert one.request not in self.vectors
                    (vector,) = one.vectors
                    self.vectors[one.request] = array("f", vector).tolist()
            scheduler.check()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(("block", "cache"), [(0, False), (0, True), (16, False), (16, True)])
def test_neither_depends_on_the_other(overlap: bool, block: int, cache: bool) -> None:
    """Prompts with prefixes in common, slots for a few of them, and tokens that are paused for want of slots."""
    drawn = random.Random(11)
    prefixes = [[drawn.randrange(1, 90) for _ in range(80)] for _ in range(2)]
    requests = []
    for number in range(1, 70):
        own = [drawn.randrange(1, 90) for _ in range(drawn.randrange(1, 60))]
        prompt = drawn.choice(prefixes)[: drawn.randrange(0, 80)] + own
        params = drawn.choice([*KINDS.values(), SamplingParams(max_new_tokens=drawn.randrange(1, 60), ignore_eos=True)])
        requests.append(Submit(number, 0, 1, number, prompt, params, branches=[0], emitted=[[]]))
    scheduler = Scheduler(
        limits(
            max_total_token_num=600,
            batch_max_tokens=300,
            router_token_ratio=0.5,
            router_max_new_token_len=4,
            use_dynamic_prompt_cache=cache,
            splitfuse_block_size=block,
        ),
        1,
    )
    run = Run(scheduler, requests, overlap)
    for request in requests:
        params = request.params
        if isinstance(params, PoolingParams):
            assert run.vectors[request.request] == pytest.approx(fake_embedding(request.prompt_ids, params), abs=1e-6)
            assert run.tokens[request.request] == []
        else:
            written = [fake_token(request.prompt_ids, 0, 0, at) for at in range(params.max_new_tokens)]
            assert run.tokens[request.request] == written
    assert scheduler.keys.used == 0


def test_a_mean_or_a_first_token_is_computed_whole_and_a_last_one_behind_the_cache() -> None:
    scheduler = Scheduler(limits(max_total_token_num=600, use_dynamic_prompt_cache=True), 1)
    prompt = [*range(1, 61)]
    fed = {}
    for number, (name, params) in enumerate([("last", KINDS["last"]), *KINDS.items()], 1):
        steps = []
        runner = FakeRunner(FakeSettings(embedding_size=SIZE))
        runner._embeds = True
        loop = StepLoop(scheduler, runner, steps.append)
        assert scheduler.submit(Submit(number, 0, 1, number, prompt, params, [0], [[]])) is None
        while loop.busy:
            loop.turn(lambda: None)
        fed[name] = sum(step.fed for step in steps)
    assert fed == {"last": 1, "mean": 60, "cls": 60, "short": 60}


def test_a_vector_that_is_not_finite_is_no_result() -> None:
    scheduler = Scheduler(limits(), 1)

    class Broken(FakeRunner):
        def _states(self, row, pooling):  # type: ignore[no-untyped-def]
            return [array("f", [float("nan")] * SIZE).tobytes()]

    runner = Broken(FakeSettings())
    runner._embeds = True
    loop = StepLoop(scheduler, runner)
    scheduler.submit(Submit(1, 0, 1, 1, [1, 2], PoolingParams(mean=True, unit=True), [0], [[]]))
    told = []
    while loop.busy:
        for output in loop.turn(lambda: None).values():
            told += output.pooled
    assert [one.vectors for one in told] == [None]

"""A body of many prompts is entered in parts, between which other requests have their turn; all of it or nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any

import pytest

from api.frontend_harness import ScriptedEngine, Stack, expected, make_plan, run, stack, until
from lightllmd.api.dialects.openai.bodies import CompletionBody
from lightllmd.api.inflight.pending import Pending
from lightllmd.errors import NotReady
from lightllmd.ipc import messages
from lightllmd.requests.urgency import ANY_TURN

PROMPTS = [f"p{number}" for number in range(200)]
ONE = {"prompt": "one", "max_tokens": 1, "temperature": 0}


async def begun(one: Stack) -> asyncio.Task[Pending]:
    """The first part is entered, the others are not."""
    revision = one.worker.revisions.current
    jobs = await revision.intake.jobs(CompletionBody(prompt=PROMPTS, max_tokens=3, temperature=0).asked())
    opening = asyncio.create_task(revision.open(jobs, 0.0, ANY_TURN))
    await asyncio.sleep(0)
    assert 0 < one.ledger.in_flight < len(PROMPTS)
    return opening


async def texts(pending: Pending) -> list[str]:
    while not pending.done:
        assert pending.error is None
        await pending.signal.wait()
    return [entry.branches[0].text for entry in pending.entries]


def in_parts(work: Callable[[Stack, ScriptedEngine, asyncio.Task[Pending]], Awaitable[None]], path: Any) -> None:
    """`work` begins when the first part is entered, with an engine that doesn't run by itself."""

    async def scenario() -> None:
        async with stack(path, engine=False) as one:
            engine = await one.up()
            await work(one, engine, await begun(one))

    run(scenario())


WHOLE = [expected(prompt, 3) for prompt in PROMPTS]


def test_others_have_their_turn_and_every_part_is_of_the_same_body(tmp_path):
    async def work(one: Stack, engine: ScriptedEngine, opening: asyncio.Task[Pending]) -> None:
        small = await one.worker.revisions.current.intake.jobs(CompletionBody(**ONE).asked())
        await one.worker.revisions.current.open(small, 0.0, ANY_TURN)
        assert not opening.done()
        engine.free_run = True
        assert await texts(await opening) == WHOLE
        submits = [submit for submit in engine.submits if submit.prompt_ids != [*b"one"]]
        assert [submit.request for submit in submits] != [*range(submits[0].request, submits[0].request + 200)]
        assert {submit.batch for submit in submits} == {submits[0].request}

    in_parts(work, tmp_path)


def test_what_the_engine_turns_away_is_not_entered_to_its_end(tmp_path):
    async def work(one: Stack, engine: ScriptedEngine, opening: asyncio.Task[Pending]) -> None:
        first = next(iter(one.ledger.entries))
        one.ledger._rejected(messages.Rejected(1, first.request, "queue_full", "full", 1.0), first.group)
        pending = await opening
        assert len(pending.entries) < len(PROMPTS)
        assert pending.error is first.error
        pending.cancel()
        assert one.ledger.in_flight == 0

    in_parts(work, tmp_path)


def test_an_engine_that_dies_meanwhile_loses_no_part(tmp_path):
    async def work(one: Stack, engine: ScriptedEngine, opening: asyncio.Task[Pending]) -> None:
        await one.kill()
        (await one.up()).free_run = True
        assert await texts(await opening) == WHOLE

    in_parts(work, tmp_path)


def test_parts_follow_the_first_one_into_the_next_revision(tmp_path):
    async def work(one: Stack, engine: ScriptedEngine, opening: asyncio.Task[Pending]) -> None:
        opening.cancel()
        with pytest.raises(asyncio.CancelledError):
            await opening
        before = one.worker.revisions.current
        await one.prepare(2, make_plan())
        (await one.up(2)).free_run = True
        opening = await begun(one)
        one.worker.revisions.commit(2, carry=True)
        assert before.ledger.in_flight == 0
        assert await texts(await opening) == WHOLE
        assert before.ledger.in_flight == 0

    in_parts(work, tmp_path)


@pytest.mark.parametrize("how", ["cancelled", "refused"])
def test_what_can_not_be_entered_whole_is_not_entered(tmp_path, how):
    async def work(one: Stack, engine: ScriptedEngine, opening: asyncio.Task[Pending]) -> None:
        if how == "cancelled":
            opening.cancel()
        else:
            one.worker.revisions.refuse("no more")
        with pytest.raises(asyncio.CancelledError if how == "cancelled" else NotReady):
            await opening
        assert one.ledger.in_flight == 0
        await until(lambda: len(engine.aborts) == len(engine.submits))

    in_parts(work, tmp_path)

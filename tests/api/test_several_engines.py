"""Two engines side by side behind one api worker, over HTTP."""

from __future__ import annotations

import asyncio

from api.frontend_harness import expected, frames, run, stack, until
from lightllmd.ipc import messages


def test_streams_of_a_dead_engine_go_on_at_once_on_the_other_and_nothing_says_unready(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            first, second = one.engines[0], await one.up(replica=1)
            first.free_run = False

            async def stream(number: int) -> str:
                body = {"inputs": f"p{number}", "parameters": {"max_new_tokens": 30, "ignore_eos": True}}
                return (await one.client.post("/generate_stream", json=body)).text

            streams = [asyncio.create_task(stream(number)) for number in range(8)]
            await until(lambda: len(first.submits) + len(second.submits) == 8)
            assert 2 <= len(first.submits) <= 6
            for engine in (first, second):
                for _ in range(10):
                    engine.step()
            await until(lambda: all(entry.generated == 10 for entry in one.ledger.entries))
            moved = {submit.request for submit in first.submits}
            await one.kill_one(first)
            assert one.ledger.held == 0
            assert (await one.client.get("/readiness")).status_code == 200
            second.free_run = True
            answers = await asyncio.gather(*streams)
            for number, answer in enumerate(answers):
                assert "".join(f["token"]["text"] for f in frames(answer)) == expected(f"p{number}", 30)
            replayed = [submit for submit in second.submits if submit.replay]
            assert {submit.request for submit in replayed} == moved
            assert all(len(submit.emitted[0]) == 10 for submit in replayed)
            assert one.stats["failed"] == 0

    run(scenario())


def test_client_hears_429_only_when_every_queue_is_full(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            second = await one.up(replica=1)
            second.free_run = True
            refusal = messages.Rejected(1, 0, "queue_full", "the queue is full", 3.0)
            one.engines[0].reject = refusal
            for number in range(6):
                answer = await one.generate(f"q{number}", max_new_tokens=5)
                assert answer.json()["generated_text"] == [expected(f"q{number}", 5)]
            second.reject = messages.Rejected(2, 0, "queue_full", "the queue is full", 2.0)
            answer = await one.generate("late", max_new_tokens=5)
            assert answer.status_code == 429
            assert answer.headers["retry-after"] == "2"

    run(scenario())


def test_branches_priorities_and_patterns_survive_a_move(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engines = [await one.up(replica=0), await one.up(replica=1)]
            parameters = {"best_of": 3, "do_sample": True, "seed": 7, "ignore_eos": True, "max_new_tokens": 12}
            asked = asyncio.create_task(one.generate("branches", **parameters))
            await until(lambda: any(engine.submits for engine in engines))
            here = next(engine for engine in engines if engine.submits)
            other = next(engine for engine in engines if engine is not here)
            for _ in range(4):
                here.step()
            await until(lambda: all(entry.generated == 12 for entry in one.ledger.entries))
            await one.kill_one(here)
            await other.submitted(1)
            before, after = here.submits[0], other.submits[0]
            assert (after.params, after.priority, after.tenant) == (before.params, before.priority, before.tenant)
            other.free_run = True
            texts = (await asked).json()["generated_text"]
            assert texts == [expected("branches", 12, seed=7, branch=branch) for branch in range(3)]

    run(scenario())

"""New requests wait at the gate, bounded in number and time, and then belong to the revision in force."""

from __future__ import annotations

import asyncio

import pytest

from api.frontend_harness import Stack, expected, frames, make_plan, run, stack, until
from api.test_hold_and_replay import raw_request
from api.test_revisions import generate, other, other_tokens, streaming, text_of
from lightllmd.ipc import messages


async def shut(one: Stack) -> None:
    one.tell(messages.Hold())
    await until(lambda: one.worker.revisions.gate.shut)


async def swap(one: Stack) -> None:
    """The second revision comes up and into force; the gate stays as it is."""
    await one.prepare(2, make_plan())
    (await one.up(2, token=other_tokens)).free_run = True
    one.tell(messages.Commit(2))
    await until(lambda: one.worker.revisions.number == 2)


def test_what_waits_at_the_gate_is_answered_by_the_revision_in_force_after_it(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            first = await one.up()
            before = streaming(one, "before", 6)
            await first.submitted(1)
            await shut(one)
            waiting = [asyncio.create_task(generate(one, f"w{number}")) for number in range(5)]
            streams = [streaming(one, f"s{number}") for number in range(5)]
            await until(lambda: one.stats["gated"] == 10)
            assert (one.stats["in_flight"], one.stats["held"], one.stats["in_flight@1"]) == (11, 10, 1)
            first.free_run = True
            assert text_of((await before).text) == expected("before", 6)
            await swap(one)
            assert one.stats["gated"] == 10
            one.tell(messages.Release())
            assert await asyncio.gather(*waiting) == [other(f"w{number}", 4) for number in range(5)]
            for number, answer in enumerate(streams):
                assert text_of((await answer).text) == other(f"s{number}", 4)
            assert len(first.submits) == 1
            assert (one.stats["gated"], one.stats["ok"]) == (0, 11)

    run(scenario())


def test_rolled_back_gate_lets_all_in_to_the_old_revision(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            await shut(one)
            waiting = asyncio.create_task(generate(one, "w"))
            await until(lambda: one.stats["gated"] == 1)
            await one.prepare(2, make_plan())
            one.tell(messages.Forget(2, "rolled back"))
            one.tell(messages.Release())
            assert await waiting == expected("w", 4)

    run(scenario())


def test_gate_that_shuts_again_at_once_lets_nobody_slip_by(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            await shut(one)
            waiting = [asyncio.create_task(generate(one, f"w{number}")) for number in range(5)]
            await until(lambda: one.stats["gated"] == 5)
            one.tell(messages.Release())
            one.tell(messages.Hold())
            await swap(one)
            assert one.stats["gated"] == 5
            assert not one.engines[0].submits
            one.tell(messages.Release())
            assert await asyncio.gather(*waiting) == [other(f"w{number}", 4) for number in range(5)]

    run(scenario())


@pytest.mark.parametrize("chat", [False, True], ids=["native", "openai"])
def test_stream_at_the_gate_is_kept_alive_and_told_of_errors_in_its_own_format(tmp_path, chat):
    async def scenario():
        async with stack(tmp_path, hold_keepalive=0.1) as one:
            await shut(one)
            path = "/v1/chat/completions" if chat else "/generate_stream"
            limit = {"stream": True, "max_tokens": 2}
            good = {"messages": [{"role": "user", "content": "x"}]} | limit if chat else {"inputs": "x"}
            bad = {"messages": [{"role": "user", "content": "x" * 3000}]} | limit if chat else {"inputs": "x" * 3000}
            async with (
                one.client.stream("POST", path, json=good) as fine,
                one.client.stream("POST", path, json=bad) as faulty,
            ):
                assert (fine.status_code, fine.headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
                body, faults = fine.aiter_text(), faulty.aiter_text()
                comments = [await anext(body), await anext(body), await anext(faults)]
                assert set("".join(comments).split("\n\n")) == {": held", ""}
                assert one.stats["gated"] == 2
                one.tell(messages.Release())
                told = frames("".join([piece async for piece in faults]))
                rest = "".join([piece async for piece in body])
            assert "3000" in str(told[-1]) or "max_req_input_len" in str(told[-1])
            assert told[-1]["error"]["code"] == "context_length_exceeded" if chat else told[-1]["status"] == 400
            assert rest.endswith("data: [DONE]\n\n") if chat else text_of(rest) == expected("x", 16)

    run(scenario())


def test_gate_s_bounds_are_429_and_504(tmp_path):
    async def scenario():
        async with stack(tmp_path, max_held=2, hold_timeout=3, hold_keepalive=60) as one:
            await shut(one)
            patient = [asyncio.create_task(one.generate("w", max_new_tokens=2)), streaming(one, "s")]
            await until(lambda: one.stats["gated"] == 2)
            full = await one.generate("x", max_new_tokens=2)
            assert (full.status_code, bool(full.headers["retry-after"])) == (429, True)
            for answer in await asyncio.gather(*patient):
                assert answer.status_code == 504
                assert "3 s" in answer.json()["message"]
            assert one.stats["gated"] == one.stats["in_flight"] == 0

    run(scenario())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_client_that_goes_away_leaves_the_gate(tmp_path, path):
    async def scenario():
        async with stack(tmp_path, hold_keepalive=0.1) as one:
            await shut(one)
            _, writer = await raw_request(one, {"inputs": "x"}, path)
            await until(lambda: one.stats["gated"] == 1)
            writer.close()
            await until(lambda: one.stats["gated"] == 0)
            one.tell(messages.Release())
            assert await generate(one, "next") == expected("next", 4)
            assert len(one.engine.submits) == 1

    run(scenario())


@pytest.mark.parametrize("message", [messages.Drain(), messages.Stop()])
def test_who_waits_at_the_gate_is_refused_when_nobody_is_let_in_any_more(tmp_path, message):
    async def scenario():
        async with stack(tmp_path) as one:
            await shut(one)
            waiting = [asyncio.create_task(one.generate("w", max_new_tokens=2)), streaming(one, "s")]
            await until(lambda: one.stats["gated"] == 2)
            one.tell(message)
            for answer in await asyncio.gather(*waiting):
                assert (answer.status_code, bool(answer.headers["retry-after"])) == (503, True)

    run(scenario())

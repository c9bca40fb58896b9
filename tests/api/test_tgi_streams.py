"""TGI's routes while engines die, don't come, refuse, or are taken away: every token once, errors in TGI's shape."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from api.frontend_harness import Stack, expected, frames, make_plan, run, stack, until
from lightllmd.errors import NotReady
from lightllmd.ipc import messages

TGI = {"use_tgi_api": True}


def asking(one: Stack, path: str, prompt: str, count: int, **parameters: Any) -> asyncio.Task[Any]:
    body = {"inputs": prompt, "parameters": {"max_new_tokens": count} | parameters, "stream": path == "/"}
    return asyncio.create_task(one.client.post(path, json=body))


def told(raw: str, prompt: str, count: int, seed: int = 0) -> None:
    """Every token has come once, in its order, and the end tells of all of them."""
    got = frames(raw)
    text = expected(prompt, count, seed=seed)
    assert [event["index"] for event in got] == list(range(1, count + 1))
    assert "".join(event["token"]["text"] for event in got) == text
    assert [event["generated_text"] for event in got] == [None] * (count - 1) + [text]
    assert got[-1]["details"] == {
        "finish_reason": "length",
        "generated_tokens": count,
        "seed": seed or None,
        "input_length": len(prompt),
    }


def test_a_stream_has_every_token_once_wherever_engines_die(tmp_path):
    """Streams of both routes and an answer in one piece; before the first token, between any two."""

    async def scenario():
        async with stack(tmp_path, TGI, engine=False, hold_keepalive=0.05) as one:
            engine = await one.up()
            running = [
                asking(one, path, prompt, 12, details=True, **parameters)
                for path, prompt, parameters in (
                    ("/generate_stream", "hello", {}),
                    ("/", "again", {"do_sample": True, "seed": 5}),
                    ("/generate", "whole", {}),
                )
            ]
            for _ in range(11):
                await engine.submitted(3)
                await one.kill()
                assert one.stats["held"] == 3
                engine = await one.up()
                await engine.submitted(3)
                engine.step()
                await until(lambda: len({entry.generated for entry in one.ledger.entries}) == 1)
            await one.kill()
            # The streams stay open by comments, which no event is.
            await until(lambda: all(stream.started for stream in one.worker.revisions.streams))
            (await one.up()).free_run = True
            first, second, whole = [(await task) for task in running]
            told(first.text, "hello", 12)
            told(second.text, "again", 12, seed=5)
            assert whole.json()["generated_text"] == expected("whole", 12)

    run(scenario())


@pytest.mark.parametrize("begun", [False, True])
def test_a_stream_that_no_engine_goes_on_with_ends_with_an_error_event(tmp_path, begun):
    async def scenario():
        async with stack(tmp_path, TGI, engine=False, hold_keepalive=0.05) as one:
            engine = await one.up()
            running = asking(one, "/generate_stream", "s", 9)
            await engine.submitted(1)
            if begun:
                engine.step()
                await until(lambda: next(iter(one.ledger.entries)).generated)
            await one.kill()
            await one.expire(1)
            answer = await running
            assert answer.status_code == 200
            *events, error = frames(answer.text)
            assert len(events) == begun
            message = "no engine became ready within the 0.4 s that a request is held"
            assert error == {"error": message, "error_type": "timeout"}
            raw = f'data:{{"error":"{message}","error_type":"timeout"}}\n\n'
            assert answer.text.endswith(raw)

    run(scenario())


def test_a_stream_that_waits_at_the_gate_and_is_refused_there_ends_with_an_error_event(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI, hold_keepalive=0.05) as one:
            one.tell(messages.Hold())
            await until(lambda: one.worker.revisions.gate.shut)
            async with one.client.stream("POST", "/generate_stream", json={"inputs": "s"}) as answer:
                assert answer.status_code == 200  # as a comment was sent
                one.tell(messages.Drain())
                raw = (await answer.aread()).decode()
            assert raw.startswith(": held")
            message = "Model is overloaded: the server is draining: it takes no new requests"
            assert frames(raw) == [{"error": message, "error_type": "overloaded"}]

    run(scenario())


def test_an_answer_that_is_broken_off_is_incomplete(tmp_path):
    reason = "the model was replaced by force"

    async def scenario():
        async with stack(tmp_path, TGI, engine=False) as one:
            engine = await one.up()
            begun = asking(one, "/generate_stream", "s", 9)
            await engine.submitted(1)
            for _ in range(2):
                engine.step()
            await until(lambda: next(iter(one.ledger.entries)).generated == 2)
            silent, whole = asking(one, "/", "silent", 9), asking(one, "/generate", "w", 9)
            await engine.submitted(3)
            await one.prepare(2, make_plan(TGI))
            (await one.up(2)).free_run = True
            one.tell(messages.Commit(2))
            one.tell(messages.Forget(1, reason))
            *events, error = frames((await begun).text)
            assert "".join(event["token"]["text"] for event in events) == expected("s", 2)
            assert all(event["generated_text"] is None for event in events)
            assert error == {"error": f"Incomplete generation: {reason}", "error_type": "incomplete_generation"}
            for refused in (await silent, await whole):
                assert refused.status_code == 503
                assert refused.json() == {"error": f"Model is overloaded: {reason}", "error_type": "overloaded"}
                assert refused.headers["retry-after"]

    run(scenario())


def test_a_failure_in_a_stream_comes_after_the_tokens_that_were_there(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI, engine=False) as one:
            engine = await one.up()
            running = asking(one, "/generate_stream", "s", 9)
            await engine.submitted(1)
            engine.step()
            await until(lambda: next(iter(one.ledger.entries)).generated)
            one.ledger.fail_all(NotReady("the server is stopping"))
            event, error = frames((await running).text)
            assert event["token"]["text"] == expected("s", 1)
            assert error == {"error": "Model is overloaded: the server is stopping", "error_type": "overloaded"}

    run(scenario())


def test_what_the_engine_refuses_has_tgi_s_status(tmp_path):
    async def scenario():
        async with stack(tmp_path, TGI, engine=False) as one:
            engine = await one.up()
            for reason, message, status, error_type, error in (
                ("queue_full", "1024 wait", 429, "overloaded", "Model is overloaded: 1024 wait"),
                ("queue_timeout", "waited 600 s", 504, "timeout", "waited 600 s"),
                ("invalid", "never fits", 422, "validation", "Input validation error: never fits"),
            ):
                engine.reject = messages.Rejected(1, 0, reason, message, 3.0)
                for path in ("/generate", "/generate_stream", "/"):
                    answer = await asking(one, path, "x", 1)
                    assert (answer.status_code, answer.json()) == (status, {"error": error, "error_type": error_type})
                    assert answer.headers.get("retry-after") == (None if reason == "invalid" else "3")

    run(scenario())


@pytest.mark.parametrize("path", ["/generate", "/generate_stream"])
def test_a_request_that_kills_engines_gets_424(tmp_path, path):
    async def scenario():
        async with stack(tmp_path, TGI, engine=False) as one:
            running = asking(one, path, "bad", 9)
            for _ in range(3):
                engine = await one.up()
                await engine.submitted(1)
                (submit,) = engine.submits
                await one.kill([submit.request], quarantined=submit.request)
            answer = await running
            assert answer.status_code == 424
            assert answer.json() == {
                "error": "Request failed during generation: the engine died 3 times when it ran this request alone; "
                "it is not tried again",
                "error_type": "generation",
            }

    run(scenario())

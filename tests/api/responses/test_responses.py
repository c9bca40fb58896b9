"""/v1/responses answers as OpenAI's does, whole and in events."""

from __future__ import annotations

import asyncio

import pytest

from api.frontend_harness import expected, run, stack, until
from api.responses.speech import events, plain, respond, said, streamed, told
from lightllmd.errors import NotReady
from lightllmd.ipc.messages import Rejected

PROMPT = "user: hi\nassistant: "


def message(text: str, status: str = "completed", number: int = 1) -> dict:
    content = [{"type": "output_text", "text": text, "annotations": [], "logprobs": []}]
    return {"id": f"msg_{number}", "status": status, "type": "message", "role": "assistant", "content": content}


def golden(status: str = "completed", **more) -> dict:
    return {
        "id": "resp_0",
        "object": "response",
        "created_at": 0,
        "model": "fake-model",
        "status": status,
        "completed_at": 0 if status == "completed" else None,
        "error": None,
        "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
        "output": [],
        "usage": None,
        "background": False,
        "instructions": None,
        "max_output_tokens": None,
        "max_tool_calls": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "reasoning": {"effort": None, "summary": None},
        "safety_identifier": None,
        "service_tier": "default",
        "store": True,
        "temperature": 1.0,
        "text": {"format": {"type": "text"}},
        "tool_choice": "auto",
        "tools": [],
        "top_logprobs": 0,
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    } | more


def tokens(given: int, made: int, cached: int = 0, reasoning: int = 0) -> dict:
    return {
        "input_tokens": given,
        "input_tokens_details": {"cached_tokens": cached, "cache_write_tokens": 0},
        "output_tokens": made,
        "output_tokens_details": {"reasoning_tokens": reasoning},
        "total_tokens": given + made,
    }


def test_whole_answer_is_the_golden_one(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.engine.cached = 5
            asked = {"temperature": 0, "max_output_tokens": 6, "metadata": {"a": "b"}, "user": "me"}
            response = plain(await respond(one, model="x", input="hi", **asked))
            used = tokens(len(PROMPT), 6, cached=5)
            output = [message(expected(PROMPT, 6), "incomplete")]
            told = asked | {"temperature": 0.0}
            assert response == golden("incomplete", output=output, usage=used, **told)
            assert list(response) == list(golden())

    run(scenario())


def test_stream_is_the_golden_one(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=said("yes"))).free_run = True
            found = plain(await streamed(one, input="hi"))
            begun = golden("in_progress")
            place = {"output_index": 0, "content_index": 0, "item_id": "msg_1"}
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            deltas = [event for event in found if event["type"] == "response.output_text.delta"]
            assert "".join(delta["delta"] for delta in deltas) == "yes"
            others = [event for event in found if event not in deltas]
            assert [
                {name: value for name, value in event.items() if name != "sequence_number"} for event in others
            ] == [
                {"type": "response.created", "response": begun},
                {"type": "response.in_progress", "response": begun},
                {
                    "type": "response.output_item.added",
                    "output_index": 0,
                    "item": message("", "in_progress") | {"content": []},
                },
                {"type": "response.content_part.added", **place, "part": part},
                {"type": "response.output_text.done", **place, "text": "yes", "logprobs": []},
                {"type": "response.content_part.done", **place, "part": part | {"text": "yes"}},
                {"type": "response.output_item.done", "output_index": 0, "item": message("yes")},
                {
                    "type": "response.completed",
                    "response": golden(output=[message("yes")], usage=tokens(len(PROMPT), 4)),
                },
            ]
            assert deltas[0] == {
                "type": "response.output_text.delta",
                "item_id": "msg_1",
                "output_index": 0,
                "content_index": 0,
                "delta": deltas[0]["delta"],
                "logprobs": [],
                "sequence_number": 4,
            }

    run(scenario())


@pytest.mark.parametrize(
    "body",
    [
        {"input": "hi"},
        {"input": "hi", "max_output_tokens": 3},
        {"input": "hi", "include": ["message.output_text.logprobs"]},
        {"input": "hi", "top_logprobs": 2, "max_output_tokens": 2},
        {"input": [{"role": "user", "content": "hi"}], "instructions": "be short", "temperature": 0.5, "seed": 3},
        {"input": "hi", "stop": "s"},
    ],
)
def test_stream_and_whole_answer_say_the_same(tmp_path, body):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=said("yes, it is"))).free_run = True
            whole = await respond(one, **body)
            assert plain(told(await streamed(one, **body))) == plain(whole)

    run(scenario())


def test_logprobs_go_with_the_text_that_they_belong_to(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=said("hé!"))).free_run = True
            body = {"input": "hi", "top_logprobs": 2}
            found = await streamed(one, **body)
            deltas = [event for event in found if event["type"] == "response.output_text.delta"]
            by_text = [(event["delta"], len(event["logprobs"])) for event in deltas]
            assert by_text == [("h", 1), ("é", 2), ("!", 1)]  # two bytes are one character
            told(found)
            (part,) = found[-1]["response"]["output"][0]["content"]
            assert part["logprobs"] == [one for event in deltas for one in event["logprobs"]]
            assert part["logprobs"][0] == {
                "token": "h",
                "bytes": [104],
                "logprob": -0.5,
                "top_logprobs": [
                    {"token": "h", "bytes": [104], "logprob": -0.5},
                    {"token": "A", "bytes": [65], "logprob": -1.5},
                ],
            }

    run(scenario())


def test_a_refusal_of_the_engine_has_its_own_status_and_a_late_one_an_event(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False, hold_keepalive=0.01) as one:
            engine = await one.up()
            engine.reject = Rejected(1, 0, "queue_full", retry_after=2.0, message="it is full")
            for stream in (False, True):
                answer = await one.client.post("/v1/responses", json={"input": "hi", "stream": stream})
                assert (answer.status_code, answer.headers["retry-after"]) == (429, "2")
                assert answer.json()["error"]["type"] == "rate_limit_error"
            engine.reject = None
            late = asyncio.create_task(one.client.post("/v1/responses", json={"input": "hi", "stream": True}))
            await engine.submitted(3)
            await until(lambda: any(stream.started for stream in one.worker.revisions.streams))  # by a comment
            one.ledger.fail_all(NotReady("it went away"))
            found = events((await late).text)
            assert found == [
                {
                    "type": "error",
                    "code": "server_error",
                    "message": "it went away",
                    "param": None,
                    "sequence_number": 0,
                }
            ]

    run(scenario())


def test_a_stream_that_breaks_off_fails_with_what_was_said(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up(token=said("yes, it is"))
            task = asyncio.create_task(one.client.post("/v1/responses", json={"input": "hi", "stream": True}))
            await engine.submitted(1)
            engine.step()
            await until(lambda: any(stream.started for stream in one.worker.revisions.streams))
            one.ledger.fail_all(NotReady("it went away"))
            found = events((await task).text)
            assert [event["type"] for event in found[-2:]] == ["error", "response.failed"]
            response = plain(found[-1]["response"])
            assert response == golden(
                "failed",
                error={"code": "server_error", "message": "it went away"},
                output=[message("y", "incomplete")],
                usage=tokens(len(PROMPT), 1),
            )
            kept = await one.client.get(f"/v1/responses/{found[-1]['response']['id']}")
            assert plain(kept.json()) == response

    run(scenario())


@pytest.mark.parametrize("stream", [False, True])
def test_a_response_that_is_cut_off_by_a_swap_says_so(tmp_path, stream):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up(token=said("yes, it is"))
            task = asyncio.create_task(one.client.post("/v1/responses", json={"input": "hi", "stream": stream}))
            await engine.submitted(1)
            engine.step()
            await one.token()
            one.ledger.cut("another model is served now")
            answer = await task
            if stream:
                found = events(answer.text)
                assert [event["type"] for event in found[-2:]] == ["error", "response.failed"]
                assert found[-1]["response"]["error"]["message"] == "another model is served now"
            else:
                assert (answer.status_code, answer.json()["error"]["type"]) == (503, "service_unavailable_error")

    run(scenario())


@pytest.mark.parametrize("tools", [False, True])
def test_killed_engines_lose_no_event_and_repeat_none(tmp_path, tools):
    text = 'yes <tool_call>\n{"name": "look", "arguments": {"at": "the sky"}}\n</tool_call>' if tools else "yes, it is"
    body = {"input": "hi", "tools": [{"type": "function", "name": "look"}] if tools else None}

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=said(text))).free_run = True
            whole = plain(await respond(one, **body))
            await one.kill()
            engine = await one.up(token=said(text))
            task = asyncio.create_task(one.client.post("/v1/responses", json=body | {"stream": True}))
            await engine.submitted(1)
            for _ in range(len(text)):
                engine.step()
                (entry,) = one.ledger.entries
                count = len(entry.branches[0].ids) + 1
                await until(lambda entry=entry, count=count: len(entry.branches[0].ids) >= count)
                await one.kill()
                engine = await one.up(token=said(text))
                await engine.submitted(1)
            engine.free_run = True
            answer = told(events((await task).text))
            assert plain(answer) == whole

    run(scenario())

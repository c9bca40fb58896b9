"""Golden transcripts of the Responses API: answers and streams, and each kind of refusal and error."""

from __future__ import annotations

import asyncio
from typing import Any

import httpx

import transcripts
from api.frontend_harness import Stack, make_plan, run, stack, until
from api.responses.speech import checked, events, said, told
from api.responses.test_bad_requests import FAULTS
from api.responses.test_tools_and_reasoning import CALLS, LOOK, NAP, THINKING, thinks
from lightllmd.errors import RequestFailed
from lightllmd.ipc.messages import Rejected

MESSAGES = [
    {"role": "developer", "content": "Be brief."},
    {"role": "user", "content": [{"type": "input_text", "text": "h"}, {"type": "input_text", "text": "i"}]},
    {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "yes"}]},
    {"type": "function_call", "call_id": "call_1", "name": "look", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "call_1", "output": "blue"},
]
SCHEMA = {"type": "json_schema", "name": "place", "schema": {"type": "object"}, "strict": True}
# Name, what the model says, body.
GOOD: list[tuple[str, str, dict[str, Any]]] = [
    ("text", "hello", {"input": "hi", "model": "any", "temperature": 0}),
    ("length", "hello", {"input": "hi", "max_output_tokens": 2}),
    ("items", "hello", {"input": MESSAGES, "instructions": "Be kind.", "metadata": {"a": "b"}, "user": "me"}),
    ("calls", CALLS, {"input": "hi", "tools": [LOOK, NAP], "tool_choice": "auto", "parallel_tool_calls": True}),
    ("reasoning", THINKING, {"input": "hi", "reasoning": {"effort": "low"}}),
    ("summary", THINKING, {"input": "hi", "reasoning": {"summary": "detailed"}}),
    ("logprobs", "hé", {"input": "hi", "include": ["message.output_text.logprobs"], "top_logprobs": 1}),
    ("structured", '{"a": 1}', {"input": "hi", "text": {"format": SCHEMA, "verbosity": "low"}, "store": False}),
    ("nothing", "", {"input": "hi"}),
]


async def post(one: Stack, body: dict[str, Any]) -> httpx.Response:
    return await one.client.post("/v1/responses", json=body)


def test_answers_and_streams_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            thinks(one)
            for case, text, body in GOOD:
                (await one.up(token=said(text))).free_run = True
                whole = await post(one, body)
                checked(whole)
                transcripts.check(f"responses/{case}", transcripts.transcript(body, whole))
                one.engine.free_run = False
                streaming = asyncio.create_task(post(one, body | {"stream": True}))
                await one.engine.submitted(2)
                for position in range(len(text.encode()) + 1):  # a token at a time, so that no two share an event
                    one.engine.step()
                    await until(lambda at=position: not one.ledger.in_flight or generated(one) > at)
                    await until(lambda at=position, task=streaming: task.done() or told_tokens(one) > at)
                stream = await streaming
                told(events(stream.text))
                transcripts.check(f"responses/{case}, stream", transcripts.transcript(body | {"stream": True}, stream))
                await one.kill()

    def generated(one: Stack) -> int:
        return sum(entry.generated for entry in one.ledger.entries)

    def told_tokens(one: Stack) -> int:
        return sum(stream.frames._reader._read for stream in one.worker.revisions.streams)

    run(scenario())


def test_refusals_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            parts = []
            for body, _, _ in FAULTS:
                shown = body if len(str(body)) < 1000 else {"input": "…"}
                parts.append(transcripts.transcript(shown, await post(one, body)))
            transcripts.check("responses/refusals", "\n".join(parts))

    run(scenario())


def test_errors_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        keys = tmp_path / "keys"
        keys.write_text("secret\n")
        plan = make_plan(names=["fake-model", "other"], api_keys_file=str(keys), max_body_bytes=3000)
        async with stack(tmp_path, plan=plan) as one:
            parts = []

            def told_as(case: str, answer: httpx.Response, status: int) -> None:
                parts.append(f"# {case}\n{transcripts.transcript(None, answer)}")
                assert answer.status_code == status, case

            served = {"input": "hi", "model": "fake-model", "temperature": 0}
            told_as("no key", await post(one, served), 401)
            one.client.headers["authorization"] = "Bearer secret"
            told_as("an unknown model", await post(one, served | {"model": "any"}), 404)
            told_as("a model that is not served", await post(one, served | {"model": "other"}), 503)
            told_as("a large body", await post(one, served | {"input": "x" * 4000}), 413)
            told_as("another method", await one.client.put("/v1/responses"), 405)
            told_as("a response that is not kept", await one.client.get("/v1/responses/resp_1"), 404)
            kept = checked(await post(one, served | {"max_output_tokens": 1}))
            path = f"/v1/responses/{kept['id']}"
            told_as("a stream of a kept response", await one.client.get(f"{path}?stream=true"), 400)
            told_as("a cancel", await one.client.post(f"{path}/cancel"), 400)
            told_as("a limit", await one.client.get(f"{path}/input_items?limit=101"), 400)
            told_as("an order", await one.client.get(f"{path}/input_items?order=up"), 400)
            told_as("an item that is none", await one.client.get(f"{path}/input_items?after=msg_1"), 400)
            one.engine.reject = Rejected(1, 0, "queue_full", "64 requests wait", 7.0)
            told_as("a full queue", await post(one, served), 429)
            told_as("a full queue, stream", await post(one, served | {"stream": True}), 429)
            one.engine.reject = None
            one.engine.free_run = False
            for stream in (False, True):
                failing = asyncio.create_task(post(one, served | {"stream": stream}))
                await until(lambda: one.ledger.in_flight)
                if stream:
                    await until(lambda: one.engine.running)
                    one.engine.step()
                    await until(lambda: any(stream.started for stream in one.worker.revisions.streams))
                one.ledger.fail_all(RequestFailed("the request ended the engine more than once"))
                told_as(f"a request that failed{', stream' * stream}", await failing, 200 if stream else 500)
            one.worker.revisions.refuse("the daemon is stopping")
            told_as("no engine", await post(one, served), 503)
            transcripts.check("responses/errors", "\n".join(parts))

    run(scenario())

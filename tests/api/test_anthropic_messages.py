"""Anthropic's routes: bodies, answers, streams and errors as its documentation and client have them."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import transcripts
from api.frontend_harness import EOS, expected, make_plan, run, stack, until
from lightllmd.api.dialects.anthropic.blocks import turns
from lightllmd.api.dialects.anthropic.bodies import MessagesBody
from lightllmd.api.web import bodies
from lightllmd.errors import RequestFailed
from lightllmd.ipc import messages as ipc
from long_run import LONG

VERSION = {"anthropic-version": "2023-06-01"}
HI = [{"role": "user", "content": "hi"}]
PROMPT = "user: hi\nassistant: "
BODY = {"model": "any", "max_tokens": 5, "temperature": 0, "messages": HI}
TEXT = expected(PROMPT, 5)


async def post(one: Any, body: Any, path: str = "/v1/messages") -> httpx.Response:
    return await one.client.post(path, json=body, headers=VERSION)


def events(raw: str) -> list[dict[str, Any]]:
    """The data of each event of a stream; the name of an event is its type."""
    found = []
    for block in raw.split("\n\n"):
        if not block or block.startswith(":"):
            continue
        name, data = block.split("\n")
        found.append(json.loads(data.removeprefix("data: ")))
        assert name == f"event: {found[-1]['type']}"
    return found


def text_of(raw: str) -> str:
    return "".join(event["delta"].get("text", "") for event in events(raw) if event["type"] == "content_block_delta")


def decoded(**body: Any) -> MessagesBody:
    return bodies.decode(json.dumps(BODY | body).encode(), MessagesBody, set())


def turns_of(messages: list[Any], system: Any = None) -> list[dict[str, Any]]:
    body = decoded(messages=messages, system=system)
    return turns(body.system, body.messages)


# --- transcripts --------------------------------------------------------------------------------------------------

BLOCKS = [
    {"role": "user", "content": [{"type": "text", "text": "h", "cache_control": {"type": "ephemeral"}}]},
    {"role": "assistant", "content": [{"type": "text", "text": "i"}]},
    {"role": "user", "content": "?"},
]
GOOD = {
    "whole": {},
    "stream": {"stream": True},
    "system and blocks": {"system": [{"type": "text", "text": "Be brief."}], "messages": BLOCKS},
    "stop sequence": {"stop_sequences": ["none", TEXT[2:4]]},
    "stop sequence in a stream": {"stop_sequences": [TEXT[2:4]], "stream": True},
    "nothing generated": {"max_tokens": 0},
    "without effect": {
        "metadata": {"user_id": "u"},
        "service_tier": "auto",
        "container": None,
        "mcp_servers": [],
        "context_management": {"edits": []},
    },
    "sampling": {"temperature": 1, "top_p": 0.9, "top_k": 1, "stop_sequences": [], "max_tokens": 1},
}


def test_answers_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for case, fields in GOOD.items():
                body = BODY | fields
                if case == "sampling":
                    one.engine.token = lambda submit, branch, position: 65
                transcripts.check(f"anthropic/{case}", transcripts.transcript(body, await post(one, body)))
            counted = {"model": "any", "messages": BLOCKS, "system": "Be brief."}
            answer = await post(one, counted, "/v1/messages/count_tokens")
            transcripts.check("anthropic/count tokens", transcripts.transcript(counted, answer))

    run(scenario())


BAD: dict[str, Any] = {
    "no max_tokens": {"max_tokens": None},
    "no model": {"model": None},
    "no messages": {"messages": []},
    "a role that is none": {"messages": [{"role": "tool", "content": "x"}]},
    "an image": {"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]},
    "a document in a tool's result": {
        "messages": [
            {
                "role": "user",
                "content": [{"type": "tool_result", "tool_use_id": "a", "content": [{"type": "document"}]}],
            }
        ]
    },
    "a call by the user": {
        "messages": [{"role": "user", "content": [{"type": "tool_use", "id": "a", "name": "b", "input": {}}]}]
    },
    "a result by the assistant": {
        "messages": [*HI, {"role": "assistant", "content": [{"type": "tool_result", "tool_use_id": "a"}]}]
    },
    "temperature": {"temperature": 1.5},
    "an empty stop": {"stop_sequences": [""]},
    "a server's tool": {"tools": [{"type": "web_search_20250305", "name": "web_search"}]},
    "a tool without a schema": {"tools": [{"name": "f"}]},
    "a container": {"container": "c"},
    "mcp servers": {"mcp_servers": [{"type": "url", "url": "http://x", "name": "x"}]},
    "thinking without a budget": {"thinking": {"type": "enabled"}},
    "a budget that is too small": {"thinking": {"type": "enabled", "budget_tokens": 1000}, "max_tokens": 2000},
    "a budget beyond max_tokens": {"thinking": {"type": "enabled", "budget_tokens": 2000}, "max_tokens": 2000},
    "a budget without thinking": {"thinking": {"type": "disabled", "budget_tokens": 2000}},
    "two formats": {
        "output_format": {"type": "json_schema", "schema": {}},
        "output_config": {"format": {"type": "json_schema", "schema": {}}},
    },
    "a format without a schema": {"output_format": {"type": "json_schema"}},
    "a prompt that is too long": {"messages": [{"role": "user", "content": "x" * 4000}]},
}


def test_refusals_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            parts = []
            for case, fields in BAD.items():
                body = {name: value for name, value in (BODY | fields).items() if value is not None}
                answer = await post(one, body)
                shown = body if len(str(body)) < 1000 else {"messages": "…"}
                parts.append(f"# {case}\n{transcripts.transcript(shown, answer)}")
                assert answer.status_code == 400
                error = answer.json()
                assert error["request_id"] == answer.headers["request-id"] == answer.headers["x-request-id"]
            transcripts.check("anthropic/refusals", "\n".join(parts))

    run(scenario())


def test_each_kind_of_error_has_anthropic_s_type_and_status(tmp_path):
    async def scenario():
        keys = tmp_path / "keys"
        keys.write_text("secret\n")
        plan = make_plan(names=["fake-model", "other"], api_keys_file=str(keys), max_body_bytes=3000)
        async with stack(tmp_path, plan=plan) as one:
            parts = []

            async def told(case: str, answer: httpx.Response, status: int, kind: str) -> None:
                parts.append(f"# {case}\n{transcripts.transcript(None, answer)}")
                assert (answer.status_code, answer.json()["error"]["type"]) == (status, kind), case

            served = BODY | {"model": "fake-model"}
            await told("no key", await post(one, served), 401, "authentication_error")
            one.client.headers["x-api-key"] = "secret"
            assert (await post(one, served)).status_code == 200
            await told("an unknown model", await post(one, BODY), 404, "not_found_error")
            await told(
                "a model that is not served", await post(one, BODY | {"model": "other"}), 529, "overloaded_error"
            )
            long = BODY | {"messages": [{"role": "user", "content": "x" * 4000}]}
            await told("a large body", await post(one, long), 413, "request_too_large")
            wrong = await one.client.get("/v1/messages", headers=VERSION)
            await told("another method", wrong, 405, "invalid_request_error")
            nowhere = await one.client.get("/v1/nothing", headers=VERSION)
            await told("no such route", nowhere, 404, "not_found_error")
            one.engine.reject = ipc.Rejected(1, 0, "queue_full", "64 requests wait", 7.0)
            await told("a full queue", await post(one, served), 429, "rate_limit_error")
            one.engine.reject = None
            one.engine.free_run = False
            failing = asyncio.create_task(post(one, served))
            await until(lambda: one.ledger.in_flight)
            one.ledger.fail_all(RequestFailed("the request ended the engine more than once"))
            await told("a request that failed", await failing, 500, "api_error")
            one.worker.revisions.refuse("the daemon is stopping")
            await told("no engine", await post(one, served), 529, "overloaded_error")
            transcripts.check("anthropic/errors", "\n".join(parts))

    run(scenario())


# --- streams ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("position", range(6))
def test_no_event_is_lost_or_told_twice_wherever_the_engine_dies(tmp_path, position):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            streamed = asyncio.create_task(post(one, BODY | {"stream": True}))
            await engine.submitted(1)
            for _ in range(min(position, 4)):
                engine.step()
            if position < 5:
                await until(lambda: one.stats["in_flight"])
                await one.kill()
                engine = await one.up()
                await engine.submitted(1)
                assert engine.submits[0].replay
            engine.free_run = True
            found = events((await streamed).text)
            assert text_of((await streamed).text) == TEXT
            kinds = [event["type"] for event in found if event["type"] != "content_block_delta"]
            assert kinds == [
                *("message_start", "content_block_start", "content_block_stop", "message_delta", "message_stop")
            ]
            assert found[-2]["usage"]["output_tokens"] == 5
            assert {event["index"] for event in found if "index" in event} == {0}

    run(scenario())


def test_a_quiet_stream_gets_comments_before_its_message_and_pings_within(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False, hold_keepalive=0.1) as one:
            engine = await one.up()
            async with one.client.stream("POST", "/v1/messages", json=BODY | {"stream": True}) as answer:
                parts = answer.aiter_text()
                assert await anext(parts) == ": waiting\n\n"
                engine.step()
                read = ""
                while "event: ping" not in read:
                    read += await anext(parts)
                assert events(read.replace(": waiting\n\n", ""))[0]["type"] == "message_start"
                engine.free_run = True
                read += "".join([part async for part in parts])
            assert text_of(read) == TEXT

    run(scenario())


def test_what_can_not_go_on_ends_with_an_error_event(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            streamed = asyncio.create_task(post(one, BODY | {"stream": True}))
            await engine.submitted(1)
            engine.step()
            await one.token()
            await one.kill()
            await one.expire(1)
            *_, last = events((await streamed).text)
            assert last["type"] == "error"
            assert last["error"]["type"] == "timeout_error"
            assert (await streamed).text.endswith("\n\n")

    run(scenario())


def test_an_answer_that_is_broken_off_says_so(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up()
            streamed = asyncio.create_task(post(one, BODY | {"stream": True}))
            await engine.submitted(1)
            engine.step()
            await one.token()
            one.worker.revisions.cut(1, "the model was swapped")
            *_, last = events((await streamed).text)
            assert (last["type"], last["error"]["type"]) == ("error", "overloaded_error")

    run(scenario())


# --- what is asked ------------------------------------------------------------------------------------------------


def test_reasons_to_stop(tmp_path):
    async def scenario():
        async with stack(tmp_path, {"max_req_input_len": 60, "max_req_total_len": 70}) as one:

            async def reason(**fields: Any) -> tuple[str, str | None, int]:
                body = (await post(one, BODY | fields)).json()
                return body["stop_reason"], body["stop_sequence"], body["usage"]["output_tokens"]

            assert await reason() == ("max_tokens", None, 5)
            # More than fits: as Anthropic does, what fits is generated.
            assert await reason(max_tokens=51) == ("model_context_window_exceeded", None, 50)
            assert await reason(max_tokens=50) == ("max_tokens", None, 50)
            assert await reason(stop_sequences=["?!?", TEXT[1]]) == ("stop_sequence", TEXT[1], 2)
            one.engine.token = lambda submit, branch, position: EOS if position == 2 else 65
            assert await reason() == ("end_turn", None, 3)
            assert await reason(max_tokens=3) == ("end_turn", None, 3)

    run(scenario())


def test_tokens_from_the_prompt_cache_are_no_input_tokens(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.engine.cached = 16
            usage = {
                "input_tokens": 4,
                "cache_creation_input_tokens": 0,
                "cache_read_input_tokens": 16,
                "output_tokens": 5,
            }
            assert (await post(one, BODY)).json()["usage"] == usage
            found = events((await post(one, BODY | {"stream": True})).text)
            assert found[0]["message"]["usage"] == usage | {"output_tokens": 1}
            assert found[-2]["usage"] == usage

    run(scenario())


def test_sampling_fields_reach_the_engine(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            await post(one, BODY | {"temperature": 0.5, "top_p": 0.25, "top_k": 7})
            params = one.engine.submits[-1].params
            assert (params.do_sample, params.temperature, params.top_p, params.top_k) == (True, 0.5, 0.25, 7)
            await post(one, {name: value for name, value in BODY.items() if name != "temperature"})
            params = one.engine.submits[-1].params
            assert (params.do_sample, params.temperature, params.top_p, params.top_k) == (True, 1.0, 1.0, -1)
            await post(one, BODY)
            assert not one.engine.submits[-1].params.do_sample

    run(scenario())


def test_the_answer_goes_on_with_a_last_message_of_the_assistant(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            begun = [*HI, {"role": "assistant", "content": "The answer is ("}]
            answer = await post(one, BODY | {"messages": begun})
            prompt = "user: hi\nassistant: The answer is ("
            assert answer.json()["content"] == [{"type": "text", "text": expected(prompt, 5)}]
            assert bytes(one.engine.submits[-1].prompt_ids).decode() == prompt

    run(scenario())


def test_turns_are_openai_s():
    assert turns_of(HI, "Be brief.") == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "hi"}]
    call = {"type": "tool_use", "id": "t1", "name": "f", "input": {"x": "é"}, "cache_control": {"type": "ephemeral"}}
    conversation = [
        {"role": "user", "content": "a"},
        {"role": "user", "content": [{"type": "text", "text": "b"}, {"type": "text", "text": "c", "citations": None}]},
        {
            "role": "assistant",
            "content": [
                {"type": "thinking", "thinking": "hm", "signature": "s"},
                {"type": "redacted_thinking", "data": "secret"},
                {"type": "text", "text": "d"},
                call,
                call | {"id": "t2", "input": {}, "caller": {"type": "direct"}},
            ],
        },
        {
            "role": "user",
            "content": [
                {"type": "tool_result", "tool_use_id": "t1", "content": "1"},
                {"type": "tool_result", "tool_use_id": "t2", "content": [{"type": "text", "text": "2"}]},
                {"type": "tool_result", "tool_use_id": "t3", "is_error": True},
                {"type": "text", "text": "e"},
            ],
        },
        {"role": "assistant", "content": "f"},
        {"role": "assistant", "content": "g"},
        {"role": "system", "content": "h"},
    ]
    function = {"name": "f", "arguments": '{"x": "é"}'}
    assert turns_of(conversation) == [
        {"role": "user", "content": "a\nb\nc"},
        {
            "role": "assistant",
            "content": "d",
            "reasoning_content": "hm",
            "tool_calls": [
                {"id": "t1", "type": "function", "function": function},
                {"id": "t2", "type": "function", "function": function | {"arguments": "{}"}},
            ],
        },
        {"role": "tool", "tool_call_id": "t1", "content": "1"},
        {"role": "tool", "tool_call_id": "t2", "content": "2"},
        {"role": "tool", "tool_call_id": "t3", "content": "error"},
        {"role": "user", "content": "e"},
        {"role": "assistant", "content": "f\ng"},
        {"role": "system", "content": "h"},
    ]


def test_counted_tokens_are_those_of_the_prompt(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            for fields in ({}, {"system": "s"}, {"messages": BLOCKS}, {"messages": [*HI, BLOCKS[1]]}):
                usage = (await post(one, BODY | fields)).json()["usage"]
                body = {
                    name: value for name, value in (BODY | fields).items() if name in ("model", "messages", "system")
                }
                answer = await post(one, body, "/v1/messages/count_tokens")
                assert answer.json() == {"input_tokens": usage["input_tokens"]}

    run(scenario())


# --- models -------------------------------------------------------------------------------------------------------


def test_models_are_told_in_the_form_of_who_asks(tmp_path):
    async def scenario():
        plan = make_plan(names=["fake-model", "b", "c"])
        async with stack(tmp_path, plan=plan) as one:

            async def page(query: str = "") -> tuple[list[str], bool]:
                told = (await one.client.get(f"/v1/models{query}", headers=VERSION)).json()
                ids = [info["id"] for info in told["data"]]
                assert (told["first_id"], told["last_id"]) == ((ids[0], ids[-1]) if ids else (None, None))
                return ids, told["has_more"]

            assert (await one.client.get("/v1/models")).json()["object"] == "list"
            assert await page() == (["fake-model", "b", "c"], False)
            assert await page("?limit=2") == (["fake-model", "b"], True)
            assert await page("?limit=2&after_id=b") == (["c"], False)
            assert await page("?limit=1&before_id=c") == (["b"], True)
            assert await page("?after_id=c") == ([], False)
            for query in ("?limit=0", "?limit=1001", "?limit=x", "?after_id=z"):
                refused = await one.client.get(f"/v1/models{query}", headers=VERSION)
                assert (refused.status_code, refused.json()["error"]["type"]) == (400, "invalid_request_error")
            served = (await one.client.get("/v1/models/fake-model", headers=VERSION)).json()
            assert (served["type"], served["id"], served["max_tokens"]) == ("model", "fake-model", 3072)
            unknown = await one.client.get("/v1/models/z", headers=VERSION)
            assert (unknown.status_code, unknown.json()["error"]["type"]) == (404, "not_found_error")

    run(scenario())


# --- any body -----------------------------------------------------------------------------------------------------

_SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=8)
_JSON = st.recursive(
    _SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=8,
)
_TYPES = st.sampled_from(["text", "thinking", "redacted_thinking", "tool_use", "tool_result", "image", "x"])


def _object(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    """Any of the fields, each as it should be or anything."""
    return st.fixed_dictionaries({}, optional={name: value | _JSON for name, value in fields.items()})


_SHORT = st.text(max_size=6)
_BLOCK = _object(
    type=_TYPES,
    text=_SHORT,
    thinking=_SHORT,
    signature=_SHORT,
    data=_SHORT,
    id=_SHORT,
    name=_SHORT,
    input=st.dictionaries(_SHORT, _JSON, max_size=2),
    tool_use_id=_SHORT,
    content=_SHORT | st.lists(st.fixed_dictionaries({"type": st.just("text"), "text": _SHORT}), max_size=2),
    is_error=st.booleans(),
)
_MESSAGE = _object(role=st.sampled_from(["user", "assistant", "system"]), content=_SHORT | st.lists(_BLOCK, max_size=3))
_SCHEMA = st.sampled_from([{"type": "object"}, {"type": "object", "properties": {"x": {"type": "integer"}}}, {}])
_TOOL = _object(name=_SHORT, description=_SHORT, input_schema=_SCHEMA, type=st.just("custom"), strict=st.booleans())
_BODY = _object(
    model=_SHORT,
    max_tokens=st.integers(0, 6),
    messages=st.lists(_MESSAGE, min_size=1, max_size=3),
    system=_SHORT,
    stop_sequences=st.lists(_SHORT, max_size=2),
    stream=st.booleans(),
    temperature=st.floats(0, 1),
    top_p=st.floats(0, 1),
    top_k=st.integers(-1, 5),
    tools=st.lists(_TOOL, max_size=2),
    tool_choice=_object(type=st.sampled_from(["auto", "any", "tool", "none"]), name=_SHORT),
    thinking=_object(type=st.sampled_from(["enabled", "disabled", "adaptive"]), budget_tokens=st.integers(0, 3000)),
    output_config=_object(effort=st.sampled_from(["low", "max"])),
    metadata=_JSON,
)
_ANY_BODY = st.builds(
    lambda body, drop: BODY | {k: v for k, v in body.items() if k not in drop}, _BODY, st.sets(_SHORT)
)


def test_any_body_is_answered_or_refused(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            loop, client = asyncio.get_running_loop(), one.client

            @settings(
                max_examples=1500 if LONG else 60, deadline=None, database=None, suppress_health_check=list(HealthCheck)
            )
            @given(_ANY_BODY | _BODY, st.sampled_from(["/v1/messages", "/v1/messages/count_tokens"]))
            def ask(body: Any, path: str) -> None:
                raw = json.dumps(body).encode()
                sent = client.post(path, content=raw, headers=VERSION)
                answer = asyncio.run_coroutine_threadsafe(sent, loop).result(30)
                assert answer.status_code == 200 or 400 <= answer.status_code < 500, answer.text
                if answer.status_code != 200:
                    assert answer.json()["type"] == "error"

            await asyncio.to_thread(ask)

    run(scenario())

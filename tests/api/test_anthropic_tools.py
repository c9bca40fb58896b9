"""Tools, thinking and structured output on /v1/messages: what is rendered, what is told, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
from pydantic_core import from_json

import transcripts
from api.frontend_harness import EOS, run, stack, until
from api.test_anthropic_messages import BODY, VERSION, events, post
from lightllmd.grammar.ebnf.translation import translated
from lightllmd.ipc.messages import Grammar
from lightllmd.text import tokenizer as tokenizers

WEATHER = {
    "name": "get_weather",
    "description": "The weather in a city",
    "input_schema": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
TIME = {"name": "get_time", "input_schema": {"type": "object", "properties": {}}}
INPUT = {"city": 'Paris "<tool_call>"'}
CALL = f'<tool_call>\n{{"name": "get_weather", "arguments": {json.dumps(INPUT)}}}\n</tool_call>'
TWO = f"I look.\n{CALL}\n{CALL}"
ASKED = BODY | {"max_tokens": 500, "tools": [WEATHER, TIME]}
THINKING = (  # a template that begins the answer within reasoning
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think></think>{% endif %}{% endif %}"
)
THOUGHTS = "I add é.\n</think>\n\nFour."


def saying(text: str) -> Callable[[Any, int, int], int]:
    """An engine's tokens."""
    encoded = text.encode()
    return lambda submit, branch, position: encoded[position] if position < len(encoded) else EOS


async def told(one: Any, **fields: Any) -> dict[str, Any]:
    """The message, which is the same whole and as the client puts a stream together."""
    answer = await post(one, ASKED | fields)
    assert answer.status_code == 200, answer.text
    streamed = put_together(events((await post(one, ASKED | fields | {"stream": True})).text))
    whole = answer.json()
    assert without_ids(streamed) == without_ids(whole)
    return whole


def put_together(found: list[dict[str, Any]]) -> dict[str, Any]:
    """A message, of the events of its stream; checks their order."""
    (start, *middle, delta, stop) = found
    assert (start["type"], delta["type"], stop["type"]) == ("message_start", "message_delta", "message_stop")
    message = start["message"]
    content = message["content"]
    open_block: int | None = None
    inputs: dict[int, str] = {}
    for event in middle:
        match event["type"]:
            case "content_block_start":
                assert open_block is None
                assert event["index"] == len(content)
                open_block = event["index"]
                content.append(event["content_block"])
            case "content_block_delta":
                assert event["index"] == open_block
                block, change = content[open_block], dict(event["delta"])
                kind = change.pop("type")
                ((name, text),) = change.items()
                assert text
                if kind == "input_json_delta":
                    inputs[open_block] = inputs.get(open_block, "") + text
                else:
                    block[name] += text
            case "content_block_stop":
                assert event["index"] == open_block
                if open_block in inputs:
                    content[open_block]["input"] = json.loads(inputs[open_block])
                open_block = None
            case other:
                raise AssertionError(other)
    assert open_block is None
    return message | delta["delta"] | {"usage": delta["usage"]}


def without_ids(message: dict[str, Any]) -> dict[str, Any]:
    content = [{name: value for name, value in block.items() if name != "id"} for block in message["content"]]
    return message | {"id": "", "content": content}


def test_calls_are_blocks_behind_the_text(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.engine.token = saying(TWO)
            answer = await told(one)
            text, *calls = answer["content"]
            assert text == {"type": "text", "text": "I look."}
            assert [(call["type"], call["name"], call["input"]) for call in calls] == [
                ("tool_use", "get_weather", INPUT)
            ] * 2
            assert len({call["id"] for call in calls}) == 2
            assert (answer["stop_reason"], answer["stop_sequence"]) == ("tool_use", None)
            one.engine.token = saying("No tool.")
            answer = await told(one)
            assert (answer["content"], answer["stop_reason"]) == ([{"type": "text", "text": "No tool."}], "end_turn")
            # Where no tool may be called the text is no call.
            one.engine.token = saying(CALL)
            answer = await told(one, tool_choice={"type": "none"})
            assert answer["content"] == [{"type": "text", "text": CALL}]
            answer = await told(one, tools=[])
            assert answer["content"] == [{"type": "text", "text": CALL}]

    run(scenario())


def test_a_call_that_is_cut_off_has_the_input_so_far(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.engine.token = saying(CALL)
            for tokens in range(len("<tool_call>\n{"), len(CALL), 7):
                answer = await post(one, ASKED | {"max_tokens": tokens})
                assert answer.status_code == 200
                body = answer.json()
                assert body["stop_reason"] == "max_tokens"
                for block in body["content"]:
                    if block["type"] == "tool_use":
                        assert INPUT["city"].startswith(block["input"].get("city", ""))

    run(scenario())


def test_arguments_that_are_no_json_end_where_they_were(tmp_path):
    """Clients read the input as it comes, and fail at what can be no object."""
    broken = {
        "{city: 1}": {},
        '{"city": "Paris", nonsense}': {"city": "Paris"},
        "[1, 2]": {},
        '"x"': {},
        '{"a": tru}': {},
        '{"a": [1, {"b": "c\\q"}]}': {"a": [1, {"b": "c"}]},
    }

    async def scenario():
        async with stack(tmp_path) as one:
            for arguments, read in broken.items():
                one.engine.token = saying(CALL.replace(json.dumps(INPUT), arguments))
                (call,) = (await post(one, ASKED)).json()["content"]
                found = events((await post(one, ASKED | {"stream": True})).text)
                parts = [event["delta"]["partial_json"] for event in found if event["type"] == "content_block_delta"]
                told = from_json("".join(parts), allow_partial="trailing-strings") if parts else {}
                assert (call["input"], told) == (read, read), arguments

    run(scenario())


def test_tools_and_their_results_are_in_the_prompt(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            one.engine.token = saying("Fine.")
            conversation = [
                *BODY["messages"],
                {
                    "role": "assistant",
                    "content": [{"type": "tool_use", "id": "c1", "name": "get_weather", "input": INPUT}],
                },
                {"role": "user", "content": [{"type": "tool_result", "tool_use_id": "c1", "content": "sunny"}]},
            ]
            await told(one, messages=conversation)
            prompt = bytes(one.engine.submits[-1].prompt_ids).decode()
            assert all(
                word in prompt for word in ("get_weather", "The weather in a city", "get_time", "sunny", "Paris")
            )
            counted = await post(
                one, {"model": "m", "messages": conversation, "tools": [WEATHER, TIME]}, "/v1/messages/count_tokens"
            )
            assert counted.json()["input_tokens"] == len(prompt.encode())
            await told(one, tool_choice={"type": "tool", "name": "get_time"})
            await told(one, tool_choice={"type": "none"})
            assert "get_weather" not in bytes(one.engine.submits[-1].prompt_ids).decode()

    run(scenario())


REFUSED: dict[str, dict[str, Any]] = {
    "any without tools": {"tools": [], "tool_choice": {"type": "any"}},
    "a tool that is none": {"tool_choice": {"type": "tool", "name": "f"}},
    "a tool without its name": {"tool_choice": {"type": "tool"}},
    "a name with any": {"tool_choice": {"type": "any", "name": "get_time"}},
    "a choice that is none": {"tool_choice": {"type": "required"}},
    "the same name twice": {"tools": [TIME, TIME]},
    "a name of other letters": {"tools": [TIME | {"name": "get time"}]},
    "a schema that is no object": {"tools": [TIME | {"input_schema": []}]},
}


def test_refusals_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            parts = []
            for case, fields in REFUSED.items():
                answer = await post(one, ASKED | fields)
                assert answer.status_code == 400
                parts.append(f"# {case}\n{transcripts.transcript(fields, answer)}")
            transcripts.check("anthropic/refusals of tools", "\n".join(parts))

    run(scenario())


def test_answers_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        with patch.object(tokenizers, "_PLAIN_TEMPLATE", THINKING):
            async with stack(tmp_path) as one:
                one.engine.token = saying(f"Hm.</think>{TWO}")
                for case, stream in (("whole", False), ("stream", True)):
                    body = ASKED | {"stream": stream}
                    answer = await post(one, body)
                    transcripts.check(f"anthropic/thinking and tools, {case}", transcripts.transcript(body, answer))

    run(scenario())


def test_thinking_is_a_block_with_a_signature(tmp_path):
    async def scenario():
        with patch.object(tokenizers, "_PLAIN_TEMPLATE", THINKING):
            async with stack(tmp_path) as one:
                one.engine.token = saying(THOUGHTS)
                for asked in (None, {"type": "enabled", "budget_tokens": 1024}, {"type": "adaptive"}):
                    answer = await told(one, thinking=asked, max_tokens=2000, tools=[])
                    thinking, text = answer["content"]
                    assert (thinking["type"], thinking["thinking"]) == ("thinking", "I add é.")
                    assert thinking["signature"]
                    assert text == {"type": "text", "text": "Four."}
                    assert 0 < answer["usage"]["output_tokens_details"]["thinking_tokens"] < len(THOUGHTS.encode())
                answer = await told(one, thinking={"type": "adaptive", "display": "omitted"}, tools=[])
                thinking, text = answer["content"]
                assert (thinking["thinking"], bool(thinking["signature"])) == ("", True)
                one.engine.token = saying("Four.")
                answer = await told(one, thinking={"type": "disabled"}, tools=[])
                assert answer["content"] == [{"type": "text", "text": "Four."}]
                assert bytes(one.engine.submits[-1].prompt_ids).decode().endswith("<think></think>")

    run(scenario())


@pytest.mark.parametrize("position", range(0, len(TWO), 23))
def test_no_event_of_a_call_is_lost_or_told_twice_wherever_the_engine_dies(tmp_path, position):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            engine = await one.up(token=saying(TWO))
            streamed = asyncio.create_task(post(one, ASKED | {"stream": True}))
            await engine.submitted(1)
            for _ in range(position):
                engine.step()
            if position:
                await until(lambda: next(iter(one.ledger.entries)).generated == position)
            await one.kill()
            engine = await one.up(token=saying(TWO))
            engine.free_run = True
            answer = put_together(events((await streamed).text))
            assert [block.get("input", block.get("text")) for block in answer["content"]] == ["I look.", INPUT, INPUT]
            assert answer["usage"]["output_tokens"] == len(TWO) + 1

    run(scenario())


def test_the_output_s_format_is_a_constraint(tmp_path):
    schema = {
        "type": "object",
        "properties": {"x": {"type": "integer"}},
        "required": ["x"],
        "additionalProperties": False,
    }
    wanted = {"type": "json_schema", "schema": schema}

    async def scenario():
        async with stack(tmp_path) as one:
            one.engine.token = saying('{"x": 1}')
            for fields in ({"output_format": wanted}, {"output_config": {"format": wanted, "effort": "max"}}):
                answer = await told(one, tools=[], **fields)
                assert answer["content"] == [{"type": "text", "text": '{"x": 1}'}]
                grammar = one.engine.submits[-1].params.grammar
                assert grammar == translated(Grammar("json_schema", json.dumps(schema)), "output_format")
            bad = {"type": "json_schema", "schema": {"type": "object", "properties": {"x": {"type": "what"}}}}
            refused = await one.client.post("/v1/messages", json=BODY | {"output_format": bad}, headers=VERSION)
            assert refused.status_code == 400
            assert "output_format.schema" in refused.json()["error"]["message"]

    run(scenario())

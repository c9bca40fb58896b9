"""Tools and reasoning on /v1/chat/completions: what is rendered, what is told, whole and as a stream."""

from __future__ import annotations

import asyncio
import json
from typing import Any
from unittest.mock import patch

import pytest

import transcripts
from api.frontend_harness import EOS, frames, run, stack, until
from lightllmd.text import tokenizer as tokenizers

WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
    },
}
QUESTION = [{"role": "user", "content": "Weather in Paris?"}]
CALL = '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Paris \\"<tool_call>\\""}}\n</tool_call>'
ARGUMENTS = '{"city": "Paris \\"<tool_call>\\""}'
TWO = f"I look.\n{CALL}\n{CALL}"
THINKING = (  # a template that begins the answer within reasoning
    "{% for message in messages %}{{ message.role }}: {{ message.content }}\n{% endfor %}"
    "{% if tools %}<tool_call>{{ tools | tojson }}{% endif %}"
    "{% if add_generation_prompt %}assistant: {% if enable_thinking is not defined or enable_thinking %}<think>\n"
    "{% else %}<think></think>{% endif %}{% endif %}"
)


def saying(*texts: str):
    """An engine's tokens: branch i says texts[i], or the only one."""

    def token(submit, branch: int, position: int) -> int:
        text = texts[branch % len(texts)].encode()
        return text[position] if position < len(text) else EOS

    return token


async def ask(one, **fields: Any) -> dict[str, Any]:
    body = {"messages": QUESTION, "max_tokens": 500} | fields
    answer = await one.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


async def streamed(one, **fields: Any) -> list[dict[str, Any]]:
    body = {"messages": QUESTION, "max_tokens": 500, "stream": True} | fields
    answer = await one.client.post("/v1/chat/completions", json=body)
    assert answer.status_code == 200, answer.text
    return frames(answer.text)


def put_together(chunks: list[dict[str, Any]], index: int = 0) -> tuple[dict[str, Any], str | None]:
    """The message and finish reason that a client makes of a stream's deltas."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    finish = None
    for choice in (choice for chunk in chunks for choice in chunk["choices"] if choice["index"] == index):
        delta = choice["delta"]
        message["content"] += delta.get("content") or ""
        message["reasoning_content"] += delta.get("reasoning_content") or ""
        for call in delta.get("tool_calls", []):
            if call["index"] == len(message["tool_calls"]):  # its first piece has its name and id
                assert (call["type"], call["function"]["arguments"]) == ("function", "")
                message["tool_calls"].append({"id": call["id"], **call["function"]})
            else:
                assert sorted(call) == ["function", "index"]
                message["tool_calls"][call["index"]]["arguments"] += call["function"]["arguments"]
        finish = choice["finish_reason"] or finish
    return message, finish


def test_calls_are_told_whole_and_as_deltas_and_results_go_back_in(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=saying(TWO))).free_run = True
            whole = await ask(one, tools=[WEATHER])
            (choice,) = whole["choices"]
            message = choice["message"]
            assert choice["finish_reason"] == "tool_calls"
            assert message["content"] == "I look."
            assert [call["function"] for call in message["tool_calls"]] == [
                {"name": "get_weather", "arguments": ARGUMENTS}
            ] * 2
            ids = [call["id"] for call in message["tool_calls"]]
            assert len({*ids}) == 2
            assert all(call["type"] == "function" for call in message["tool_calls"])
            assert "get_weather" in bytes(one.engine.submits[-1].prompt_ids).decode()
            counted = await one.client.post("/tokenize", json={"messages": QUESTION, "tools": [WEATHER]})
            assert counted.json()["count"] == whole["usage"]["prompt_tokens"]

            chunks = await streamed(one, tools=[WEATHER])
            told, finish = put_together(chunks)
            assert finish == "tool_calls"
            assert told["content"] == "I look."
            assert [call["arguments"] for call in told["tool_calls"]] == [ARGUMENTS] * 2
            assert len({call["id"] for call in told["tool_calls"]} | {*ids}) == 4

            # Back in, with the results.
            results = [{"role": "tool", "tool_call_id": call, "content": f"{n} degrees"} for n, call in enumerate(ids)]
            await ask(one, messages=[*QUESTION, message, *results], tools=[WEATHER])
            prompt = bytes(one.engine.submits[-1].prompt_ids).decode()
            assert prompt.endswith(
                f"assistant: {TWO}\nuser: <tool_response>\n0 degrees\n</tool_response>\n"
                "<tool_response>\n1 degrees\n</tool_response>\nassistant: "
            )

    run(scenario())


@pytest.mark.parametrize("streams", [False, True])
def test_a_call_in_the_older_form(tmp_path, streams):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=saying(TWO))).free_run = True
            fields = {"functions": [WEATHER["function"]], "function_call": "auto"}
            if streams:
                choices = [choice for chunk in await streamed(one, **fields) for choice in chunk["choices"]]
                told = [choice["delta"]["function_call"] for choice in choices if "function_call" in choice["delta"]]
                called = {"name": told[0]["name"], "arguments": "".join(piece["arguments"] for piece in told)}
                finish = choices[-1]["finish_reason"]
            else:
                (choice,) = (await ask(one, **fields))["choices"]
                called, finish = choice["message"]["function_call"], choice["finish_reason"]
                messages = [*QUESTION, choice["message"], {"role": "function", "name": "get_weather", "content": "5"}]
                await ask(one, messages=messages)
                assert bytes(one.engine.submits[-1].prompt_ids).endswith(
                    b"user: <tool_response>\n5\n</tool_response>\nassistant: "
                )
            assert called == {"name": "get_weather", "arguments": ARGUMENTS}
            assert finish == "function_call"

    run(scenario())


def test_sequences_of_a_stream_are_told_apart_with_log_probabilities_and_usage(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=saying(TWO, "No idea."))).free_run = True
            options = {"include_usage": True}
            chunks = await streamed(one, tools=[WEATHER], n=2, logprobs=True, temperature=1, stream_options=options)
            first, finish = put_together(chunks, 0)
            assert ([call["arguments"] for call in first["tool_calls"]], finish) == ([ARGUMENTS] * 2, "tool_calls")
            second, finish = put_together(chunks, 1)
            assert (second["content"], second["tool_calls"], finish) == ("No idea.", [], "stop")
            scored = [
                token["bytes"][0]
                for chunk in chunks
                for choice in chunk["choices"]
                if choice["index"] == 0 and choice["logprobs"]
                for token in choice["logprobs"]["content"]
            ]
            assert bytes(scored[: len(TWO)]).decode() == TWO
            assert chunks[-1]["usage"]["completion_tokens"] == len(TWO) + len("No idea.") + 2

    run(scenario())


def test_no_tool_is_called_or_shown_where_none_may_be(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=saying(TWO))).free_run = True
            (choice,) = (await ask(one, tools=[WEATHER], tool_choice="none"))["choices"]
            assert (choice["message"]["content"], choice["finish_reason"]) == (TWO, "stop")
            assert b"get_weather" not in bytes(one.engine.submits[-1].prompt_ids)

    run(scenario())


def test_a_call_that_a_limit_cuts_off_is_told_as_far_as_it_goes(tmp_path):
    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=saying(CALL))).free_run = True
            (choice,) = (await ask(one, tools=[WEATHER], max_tokens=60))["choices"]
            (call,) = choice["message"]["tool_calls"]
            assert choice["finish_reason"] == "length"
            assert ARGUMENTS.startswith(call["function"]["arguments"])
            assert call["function"]["arguments"]

    run(scenario())


def test_a_killed_engine_s_stream_goes_on_within_the_call(tmp_path):
    """Each token of the call is the last of some engine; ids and pieces are as without a kill."""

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            await one.up(token=saying(CALL))
            body = {"messages": QUESTION, "max_tokens": 500, "stream": True, "tools": [WEATHER]}
            answer = asyncio.ensure_future(one.client.post("/v1/chat/completions", json=body))
            await until(lambda: one.ledger.in_flight)
            for _ in range(len(CALL) // 7):
                await one.engine.submitted(1)
                (entry,) = one.ledger.entries
                before = entry.generated
                for _ in range(7):
                    one.engine.step()
                await until(lambda entry=entry, count=before + 7: entry.generated >= count)
                await one.kill()
                await one.up(token=saying(CALL))
            one.engine.free_run = True
            told, finish = put_together(frames((await answer).text))
            (call,) = told["tool_calls"]
            assert (call["arguments"], finish) == (ARGUMENTS, "tool_calls")

    run(scenario())


def test_reasoning_is_told_apart_from_content(tmp_path):
    async def scenario():
        text = "Hm, Paris.\n</think>\n\nIt rains."
        with patch.object(tokenizers, "_PLAIN_TEMPLATE", THINKING):
            async with stack(tmp_path, engine=False) as one:
                (await one.up(token=saying(text))).free_run = True
                whole = await ask(one)
                message = whole["choices"][0]["message"]
                assert (message["reasoning_content"], message["content"]) == ("Hm, Paris.", "It rains.")
                assert message["reasoning"] == message["reasoning_content"]
                reasoned = len("Hm, Paris.\n</think>")
                assert whole["usage"]["completion_tokens_details"] == {"reasoning_tokens": reasoned}
                told, finish = put_together(await streamed(one))
                assert (told["reasoning_content"], told["content"], finish) == ("Hm, Paris.", "It rains.", "stop")

                # Left out, left in, and switched off in the template, whose prompt ends behind reasoning then.
                (choice,) = (await ask(one, include_reasoning=False))["choices"]
                assert (choice["message"]["content"], "reasoning_content" in choice["message"]) == ("It rains.", False)
                (choice,) = (await ask(one, separate_reasoning=False))["choices"]
                assert choice["message"]["content"] == text
                for off in ({"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"}):
                    message = (await ask(one, **off))["choices"][0]["message"]
                    assert (message["content"], "reasoning_content" in message) == (text, False)

    run(scenario())


def test_reasoning_before_a_call(tmp_path):
    async def scenario():
        with patch.object(tokenizers, "_PLAIN_TEMPLATE", THINKING):
            async with stack(tmp_path, engine=False) as one:
                (await one.up(token=saying(f"I must <tool_call> it.</think>\n\n{CALL}"))).free_run = True
                message = (await ask(one, tools=[WEATHER]))["choices"][0]["message"]
                assert message["content"] is None
                assert message["reasoning_content"] == "I must <tool_call> it."
                assert json.loads(message["tool_calls"][0]["function"]["arguments"])["city"] == 'Paris "<tool_call>"'

    run(scenario())


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "get_weather"}}])
def test_required_calls_are_constrained_and_auto_ones_only_if_strict(tmp_path, choice):
    strict = {"type": "function", "function": WEATHER["function"] | {"strict": True}}

    async def scenario():
        async with stack(tmp_path, engine=False) as one:
            (await one.up(token=saying(CALL))).free_run = True
            await ask(one, tools=[WEATHER])
            assert one.engine.submits[-1].params.grammar is None
            for fields in ({"tools": [WEATHER], "tool_choice": choice}, {"tools": [strict]}):
                (answered,) = (await ask(one, **fields))["choices"]
                assert answered["finish_reason"] == "tool_calls"
                grammar = one.engine.submits[-1].params.grammar
                assert grammar.kind == "structural_tag"
                assert json.loads(grammar.text)["type"] == "structural_tag"
            bad = {"type": "function", "function": {"name": "f", "strict": True, "parameters": {"type": 5}}}
            body = {"messages": QUESTION, "tools": [bad]}
            refused = await one.client.post("/v1/chat/completions", json=body)
            param = "tools.0.function.parameters.type"
            assert (refused.status_code, refused.json()["error"]["param"]) == (400, param), refused.text

    run(scenario())


def test_the_format_and_the_place_of_reasoning_can_be_configured(tmp_path):
    async def scenario():
        with patch.object(tokenizers, "_PLAIN_TEMPLATE", THINKING):
            async with stack(tmp_path, engine=False, tool_parser="pythonic", reasoning="content") as one:
                (await one.up(token=saying('[get_weather(city="Paris")]'))).free_run = True
                message = (await ask(one, tools=[WEATHER]))["choices"][0]["message"]
                assert message["tool_calls"][0]["function"] == {"name": "get_weather", "arguments": '{"city": "Paris"}'}
                one.engine.token = saying("Hm.</think>It rains.")
                message = (await ask(one))["choices"][0]["message"]
                assert (message["content"], "reasoning_content" in message) == ("Hm.</think>It rains.", False)
                message = (await ask(one, separate_reasoning=True))["choices"][0]["message"]
                assert (message["content"], message["reasoning_content"]) == ("It rains.", "Hm.")

    run(scenario())


TRANSCRIBED: dict[str, tuple[str, dict[str, Any]]] = {
    "tools": (TWO, {"tools": [WEATHER]}),
    "tools, one call": (TWO, {"tools": [WEATHER], "parallel_tool_calls": False}),
    "functions": (TWO, {"functions": [WEATHER["function"]], "function_call": "auto"}),
    "reasoning and a call": (f"Hm.</think>\n\n{CALL}", {"tools": [WEATHER]}),
    "reasoning left out": ("Hm.</think>It rains.", {"include_reasoning": False}),
    "a broken call": ('<tool_call>{"name": 5}</tool_call>', {"tools": [WEATHER]}),
}
REFUSED: dict[str, dict[str, Any]] = {
    "required without tools": {"tool_choice": "required"},
    "a tool that is none": {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "f"}}},
    "a choice that is none": {"tools": [WEATHER], "tool_choice": "any"},
    "the same name twice": {"tools": [WEATHER, WEATHER]},
    "a name of other letters": {"tools": [{"type": "function", "function": {"name": "get weather"}}]},
    "a schema that is no object": {"tools": [{"type": "function", "function": {"name": "f", "parameters": []}}]},
    "a schema that can't be kept to": {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "x"}, "strict": True}}]
    },
    "a result of no call": {"messages": [*QUESTION, {"role": "tool", "tool_call_id": "c", "content": "5"}]},
    "functions beside tools": {"tools": [WEATHER], "functions": [WEATHER["function"]]},
}


def test_answers_are_those_of_the_transcripts(tmp_path):
    """The tokens of each come at once, so that it is no matter of time how a stream is cut."""

    async def scenario():
        with patch.object(tokenizers, "_PLAIN_TEMPLATE", THINKING):
            async with stack(tmp_path, engine=False) as one:
                await one.up()
                for case, (text, fields) in TRANSCRIBED.items():
                    one.engine.token = saying(text if "</think>" in text else f"</think>{text}")
                    for kind in ("", ", stream"):
                        body = {"messages": QUESTION, "max_tokens": 500} | fields
                        if kind:
                            body |= {"stream": True, "stream_options": {"include_usage": True}}
                        told = asyncio.ensure_future(one.client.post("/v1/chat/completions", json=body))
                        await until(lambda: one.engine.running)
                        one.engine.step(at_once=500)
                        transcripts.check(f"chat/{case}{kind}", transcripts.transcript(body, await told))

    run(scenario())


def test_refusals_are_those_of_the_transcripts(tmp_path):
    async def scenario():
        async with stack(tmp_path) as one:
            parts = []
            for case, fields in REFUSED.items():
                body = {"messages": QUESTION} | fields
                answer = await one.client.post("/v1/chat/completions", json=body)
                assert answer.status_code == 400
                parts.append(f"# {case}\n{transcripts.transcript(fields, answer)}")
            transcripts.check("chat/refusals", "\n".join(parts))

    run(scenario())

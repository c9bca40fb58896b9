"""OpenAI's own client, unchanged: create, stream, parse, tools, what is kept."""

from __future__ import annotations

import asyncio
import json

import openai  # of the extra `clients`
import pytest
from openai import AsyncOpenAI, pydantic_function_tool
from pydantic import BaseModel

from api.frontend_harness import run, stack
from api.responses.speech import said
from api.responses.test_tools_and_reasoning import THINKING, thinks
from lightllmd.errors import NotReady


class Weather(BaseModel):
    """What it is like there."""

    place: str
    degrees: int


RAIN = '{"place": "Bergen", "degrees": 9}'


def speaking(tmp_path, scenario, *texts: str, **http) -> None:
    """Runs `scenario` with a client of a server that says these."""

    async def around():
        async with stack(tmp_path, engine=False, **http) as one:
            (await one.up(token=said(*texts))).free_run = True
            async with AsyncOpenAI(base_url=f"http://127.0.0.1:{one.port}/v1", api_key="none", max_retries=0) as client:
                await scenario(client.responses, one)

    run(around())


def test_a_conversation_with_what_is_kept(tmp_path):
    async def scenario(responses, one):
        first = await responses.create(model="m", input="hi")
        assert (first.output_text, first.status, first.usage.output_tokens) == ("hello", "completed", 6)
        second = await responses.create(model="m", input="how?", previous_response_id=first.id)
        assert second.output_text == "good"
        assert (await responses.retrieve(second.id)).output == second.output
        items = [item async for item in responses.input_items.list(second.id, order="asc", limit=1)]
        assert [item.content[0].text for item in items] == ["hi", "hello", "how?"]
        counted = await responses.input_tokens.count(input="and?", previous_response_id=second.id)
        third = await responses.create(model="m", input="and?", previous_response_id=second.id)
        assert counted.input_tokens == third.usage.input_tokens
        await responses.delete(first.id)
        for call in (responses.retrieve, responses.delete):
            with pytest.raises(openai.NotFoundError):
                await call(first.id)
        with pytest.raises(openai.BadRequestError) as told:
            await responses.create(model="m", input="x", previous_response_id=second.id)
        assert told.value.code == "previous_response_not_found"
        with pytest.raises(openai.BadRequestError, match="synchronous"):
            await responses.cancel(second.id)

    speaking(tmp_path, scenario, "hello", "good")


def test_a_stream_with_its_snapshot(tmp_path):
    async def scenario(responses, one):
        async with responses.stream(model="m", input="hi", top_logprobs=1) as stream:
            kinds = [event.type async for event in stream]
            final = await stream.get_final_response()
        assert kinds[:4] == [
            "response.created",
            "response.in_progress",
            "response.output_item.added",
            "response.content_part.added",
        ]
        assert kinds[-4:] == [
            "response.output_text.done",
            "response.content_part.done",
            "response.output_item.done",
            "response.completed",
        ]
        assert final.output_text == "hello"
        raw = await responses.create(model="m", input="hi", stream=True)
        deltas = [event.delta async for event in raw if event.type == "response.output_text.delta"]
        assert "".join(deltas) == "hello"
        assert all(deltas)

    speaking(tmp_path, scenario, "hello")


def test_structured_text_is_parsed(tmp_path):
    async def scenario(responses, one):
        parsed = await responses.parse(model="m", input="weather?", text_format=Weather)
        assert parsed.output_parsed == Weather(place="Bergen", degrees=9)
        grammar = one.engine.submits[0].params.grammar
        assert grammar.text.index("place") < grammar.text.index("degrees")
        async with responses.stream(model="m", input="weather?", text_format=Weather) as stream:
            assert (await stream.get_final_response()).output_parsed == parsed.output_parsed

    speaking(tmp_path, scenario, RAIN)


def test_tools_there_and_back(tmp_path):
    call = f'<tool_call>\n{{"name": "Weather", "arguments": {RAIN}}}\n</tool_call>'

    async def scenario(responses, one):
        function = pydantic_function_tool(Weather)["function"]
        tool = {"type": "function", "name": "Weather", "parameters": function["parameters"], "strict": False}
        question = [{"role": "user", "content": "tell"}]
        first = await responses.create(model="m", input=question, tools=[tool])
        (made,) = first.output
        assert (made.type, made.name, json.loads(made.arguments)) == ("function_call", "Weather", json.loads(RAIN))
        result = {"type": "function_call_output", "call_id": made.call_id, "output": "done"}
        second = await responses.create(model="m", input=[*question, *first.output, result], tools=[tool])
        assert second.output_text == "It rains."
        async with responses.stream(model="m", input=question, tools=[tool]) as stream:
            deltas = [e.delta async for e in stream if e.type == "response.function_call_arguments.delta"]
            assert "".join(deltas) == made.arguments
            assert (await stream.get_final_response()).output[0].arguments == made.arguments

    speaking(tmp_path, scenario, call, "It rains.", call)


def test_reasoning_streams_into_a_snapshot(tmp_path):
    async def scenario(responses, one):
        thinks(one)
        for reasoning in ({"summary": "auto"}, {"effort": "low"}):
            async with responses.stream(model="m", input="hi", reasoning=reasoning) as stream:
                final = await stream.get_final_response()
            thought = final.output[0].summary or final.output[0].content
            assert [part.text for part in thought] == ["well, well"]
            assert final.output_text == "It is blue."

    speaking(tmp_path, scenario, THINKING)


def test_errors_are_the_client_s_own(tmp_path):
    async def scenario(responses, one):
        with pytest.raises(openai.BadRequestError) as told:
            await responses.create(model="m", input="x", tools=[{"type": "web_search"}])
        assert told.value.param == "tools.0.type"
        one.engine.free_run = False
        asking = asyncio.create_task(responses.create(model="m", input="x", stream=True))
        await one.engine.submitted(1)
        one.engine.step()
        stream = await asking
        kinds = []
        async for event in stream:
            kinds.append(event.type)
            if event.type == "response.output_text.delta":
                one.ledger.fail_all(NotReady("it went away"))
        assert kinds[-2:] == ["error", "response.failed"]
        assert event.response.error.message == "it went away"

    speaking(tmp_path, scenario, "hello")
